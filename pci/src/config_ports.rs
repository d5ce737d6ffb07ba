//! Configuration mechanism #1: configuration space behind two I/O ports (PCI Local Bus 3.0, 3.2.2.3.2).

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::address::Bdf;
use crate::bus::Segment;

/// The eight ports from 0xcf8: CONFIG_ADDRESS names a dword of the first 256 bytes of some function's configuration
/// space, and CONFIG_DATA accesses it.
///
/// A guest serialises its own pairs of accesses; where it does not, they race as they do on real hardware.
#[derive(Debug)]
pub struct ConfigPorts {
    segment: Arc<Segment>,
    address: Mutex<u32>,
}

/// How many ports there are.
const PORTS: usize = 8;
/// Where CONFIG_DATA is, from the first of them.
const DATA: u8 = 4;

/// CONFIG_ADDRESS: accesses to CONFIG_DATA are configuration accesses.
const ENABLE: u32 = 1 << 31;
/// CONFIG_ADDRESS: the bits that are not reserved, which are the above, bus, device, function and dword.
const IMPLEMENTED: u32 = 0x80ff_fffc;

impl ConfigPorts {
    /// The ports of this segment, disabled.
    pub fn new(segment: Arc<Segment>) -> Self {
        Self {
            segment,
            address: Mutex::new(0),
        }
    }

    /// Reads at port 0xcf8 + `offset`.
    pub fn read(&self, offset: u8, data: &mut [u8]) {
        if let (0, Ok(data)) = (offset, <&mut [u8; 4]>::try_from(&mut *data)) {
            *data = self.address().to_le_bytes();
            return;
        }
        data.fill(0xff);
        if let Some((bdf, register)) = self.decode(offset, data.len()) {
            self.segment.config_read(bdf, register, data);
        }
    }

    /// Writes at port 0xcf8 + `offset`.
    pub fn write(&self, offset: u8, data: &[u8]) {
        if let (0, Ok(&address)) = (offset, <&[u8; 4]>::try_from(data)) {
            *self.address() = u32::from_le_bytes(address) & IMPLEMENTED;
        } else if let Some((bdf, register)) = self.decode(offset, data.len()) {
            self.segment.config_write(bdf, register, data);
        }
    }

    /// What an access to CONFIG_DATA goes to. Anything but a dword at CONFIG_ADDRESS is not for this mechanism: it goes
    /// nowhere.
    fn decode(&self, offset: u8, length: usize) -> Option<(Bdf, u16)> {
        let byte = offset.checked_sub(DATA)?;
        let address = *self.address();
        if address & ENABLE == 0 || usize::from(offset) + length > PORTS {
            return None;
        }
        let bdf = Bdf::from_bits((address >> 8 & 0xffff) as u16);
        Some((bdf, (address & 0xfc) as u16 + u16::from(byte)))
    }

    fn address(&self) -> MutexGuard<'_, u32> {
        self.address.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
