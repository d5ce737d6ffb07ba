//! The registers with which the guest switches the machine off or resets it.

use std::fmt;

use crate::bus::BusDevice;

/// What the guest can do to the machine as a whole.
pub trait PowerSwitch: Send + Sync + fmt::Debug {
    /// Switches it off.
    fn power_off(&self);

    /// Resets it.
    fn reset(&self);
}

/// ACPI's sleep control, sleep status and reset registers (ACPI 6.5, 4.8.3.7 and 4.8.3.6), a byte each.
#[derive(Debug)]
pub struct Power<S> {
    switch: S,
}

/// Offset of the sleep control register.
pub const SLEEP_CONTROL: u64 = 0;
/// Offset of the sleep status register.
pub const SLEEP_STATUS: u64 = 1;
/// Offset of the reset register.
pub const RESET: u64 = 2;

/// What to write to the reset register.
pub const RESET_VALUE: u8 = 1;
/// The sleep type of soft off: what `\_S5` tells.
pub const SOFT_OFF: u8 = 5;

/// Sleep control: the sleep type is in bits 4 to 2, and bit 5 enters it.
const SLEEP_TYPE_SHIFT: u8 = 2;
const SLEEP_TYPE_MASK: u8 = 7;
const SLEEP_ENABLE: u8 = 1 << 5;

impl<S: PowerSwitch> Power<S> {
    /// Registers that work `switch`.
    pub fn new(switch: S) -> Self {
        Self { switch }
    }
}

impl<S: PowerSwitch> BusDevice for Power<S> {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let &[value] = data else { return };
        match offset {
            SLEEP_CONTROL if value & SLEEP_ENABLE != 0 => {
                match value >> SLEEP_TYPE_SHIFT & SLEEP_TYPE_MASK {
                    SOFT_OFF => self.switch.power_off(),
                    other => log::warn!(
                        "the guest wants to sleep in a state that there is not ({other})"
                    ),
                }
            }
            RESET if value == RESET_VALUE => self.switch.reset(),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[derive(Debug, Default)]
    struct Log(Mutex<Vec<&'static str>>);

    impl PowerSwitch for Log {
        fn power_off(&self) {
            self.0.lock().unwrap().push("off");
        }

        fn reset(&self) {
            self.0.lock().unwrap().push("reset");
        }
    }

    #[test]
    fn only_the_right_values_have_an_effect() {
        let power = Power::new(Log::default());
        let soft_off = SOFT_OFF << SLEEP_TYPE_SHIFT;
        power.write(SLEEP_CONTROL, &[soft_off]);
        power.write(SLEEP_CONTROL, &[SLEEP_ENABLE | 3 << SLEEP_TYPE_SHIFT]);
        power.write(RESET, &[0]);
        power.write(SLEEP_STATUS, &[0xff]);
        power.write(SLEEP_CONTROL, &[SLEEP_ENABLE | soft_off, 0]);
        assert!(power.switch.0.lock().unwrap().is_empty());
        power.write(SLEEP_CONTROL, &[SLEEP_ENABLE | soft_off]);
        power.write(RESET, &[RESET_VALUE]);
        assert_eq!(*power.switch.0.lock().unwrap(), ["off", "reset"]);
    }
}
