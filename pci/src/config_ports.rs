//! Configuration mechanism #1: configuration space behind two I/O ports (PCI Local Bus 3.0, 3.2.2.3.2).

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::address::Bdf;
use crate::bus::Segment;
use crate::state::StateError;

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

    /// What CONFIG_ADDRESS reads, to be saved.
    pub fn save(&self) -> u32 {
        *self.address()
    }

    /// Sets CONFIG_ADDRESS to what was saved.
    pub fn restore(&self, address: u32) -> Result<(), StateError> {
        if address & !IMPLEMENTED != 0 {
            return Err(StateError::impossible("CONFIG_ADDRESS", 0, address));
        }
        *self.address() = address;
        Ok(())
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

    /// What an access to CONFIG_DATA goes to. Anything but a dword at CONFIG_ADDRESS is not for this mechanism: it
    /// goes nowhere.
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recorder::Access::{Read, Write};
    use crate::recorder::Recorder;

    /// One function at 00:02.1, and CONFIG_ADDRESS at its register 0x10.
    fn ports() -> (ConfigPorts, Arc<Recorder>) {
        let segment = Arc::new(Segment::new());
        let recorder = Arc::new(Recorder::default());
        segment
            .insert(Bdf::new(0, 2, 1).unwrap(), recorder.clone())
            .unwrap();
        let ports = ConfigPorts::new(segment);
        ports.write(0, &0x8000_1110u32.to_le_bytes());
        (ports, recorder)
    }

    fn read(ports: &ConfigPorts, offset: u8) -> u32 {
        let mut data = [0; 4];
        ports.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn data_accesses_the_register_that_address_names() {
        let (ports, recorder) = ports();
        assert_eq!(read(&ports, 0), 0x8000_1110);
        assert_eq!(read(&ports, 4), 0x1312_1110);
        ports.write(4, &[1, 2, 3, 4]);
        ports.write(6, &[5, 6]);
        ports.write(7, &[7]);
        let accesses = [
            Read(0x10, 4),
            Write(0x10, vec![1, 2, 3, 4]),
            Write(0x12, vec![5, 6]),
            Write(0x13, vec![7]),
        ];
        assert_eq!(recorder.take(), accesses);
    }

    #[test]
    fn reserved_bits_of_the_address_do_not_stick() {
        let (ports, _) = ports();
        ports.write(0, &[0xff; 4]);
        assert_eq!(read(&ports, 0), 0x80ff_fffc);
        assert_eq!(read(&ports, 4), u32::MAX);
    }

    #[test]
    fn nothing_is_accessed_while_disabled() {
        let (ports, recorder) = ports();
        ports.write(0, &0x0000_1110u32.to_le_bytes());
        assert_eq!(read(&ports, 4), u32::MAX);
        ports.write(4, &[0; 4]);
        assert_eq!(recorder.take(), []);
    }

    #[test]
    fn only_a_dword_reaches_the_address() {
        let (ports, recorder) = ports();
        for (offset, length) in [
            (0, 1),
            (0, 2),
            (1, 1),
            (2, 2),
            (3, 4),
            (0, 8),
            (5, 4),
            (8, 1),
        ] {
            let mut data = vec![0; length];
            ports.read(offset, &mut data);
            ports.write(offset, &vec![0; length]);
            assert_eq!(data, vec![0xff; length], "{length} bytes at {offset}");
        }
        assert_eq!(read(&ports, 0), 0x8000_1110);
        assert_eq!(recorder.take(), []);
    }
}
