//! The keyboard controller's one use on a machine without a keyboard: kernels reset the machine by it.

use std::convert::Infallible;
use std::sync::{Mutex, PoisonError};

use vm_superio::{I8042Device, Trigger};

use crate::bus::BusDevice;
use crate::power::PowerSwitch;

/// The controller's ports, 0x60 to 0x64.
pub struct I8042(Mutex<I8042Device<Reset>>);

struct Reset(Box<dyn PowerSwitch>);

impl Trigger for Reset {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.0.reset();
        Ok(())
    }
}

impl I8042 {
    /// A controller that resets the machine by `switch`.
    pub fn new(switch: Box<dyn PowerSwitch>) -> Self {
        Self(Mutex::new(I8042Device::new(Reset(switch))))
    }
}

impl BusDevice for I8042 {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if let (&mut [ref mut byte], Ok(offset)) = (data, u8::try_from(offset)) {
            *byte = self
                .0
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .read(offset);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (&[byte], Ok(offset)) = (data, u8::try_from(offset)) {
            let Ok(()) = self
                .0
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .write(offset, byte);
        }
    }
}

impl std::fmt::Debug for I8042 {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("I8042")
    }
}
