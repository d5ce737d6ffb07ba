//! Configuration space: what it holds, and which of its bits can be written.

/// Configuration space of one function: 256 bytes, or 4096 for a PCI Express device.
#[derive(Clone, Debug)]
pub(crate) struct ConfigSpace {
    bytes: Vec<u8>,
    /// Bits that a write changes.
    writable: Vec<u8>,
    after_reset: Vec<u8>,
}

/// Bytes in the configuration space of a conventional device.
pub(crate) const CONVENTIONAL_SIZE: usize = 256;
/// Bytes in the configuration space of a PCI Express device.
pub(crate) const EXPRESS_SIZE: usize = 4096;

/// Offsets of registers in the header (PCI Local Bus 3.0, 6.1), in bytes.
pub(crate) mod register {
    pub(crate) const VENDOR: usize = 0x00;
    pub(crate) const DEVICE: usize = 0x02;
    pub(crate) const COMMAND: usize = 0x04;
    pub(crate) const STATUS: usize = 0x06;
    pub(crate) const REVISION: usize = 0x08;
    pub(crate) const CACHE_LINE_SIZE: usize = 0x0c;
    pub(crate) const BAR: usize = 0x10;
    pub(crate) const SUBSYSTEM_VENDOR: usize = 0x2c;
    pub(crate) const SUBSYSTEM: usize = 0x2e;
    pub(crate) const CAPABILITIES: usize = 0x34;
    pub(crate) const INTERRUPT_LINE: usize = 0x3c;
    pub(crate) const INTERRUPT_PIN: usize = 0x3d;
}

/// Bits of the Command register.
pub(crate) mod command {
    pub(crate) const IO: u16 = 1 << 0;
    pub(crate) const MEMORY: u16 = 1 << 1;
    pub(crate) const BUS_MASTER: u16 = 1 << 2;
    pub(crate) const PARITY: u16 = 1 << 6;
    pub(crate) const SERR: u16 = 1 << 8;
    pub(crate) const INTX_DISABLE: u16 = 1 << 10;
}

/// Bits of the Status register.
const INTERRUPT_STATUS: u8 = 1 << 3;
const CAPABILITIES_LIST: u16 = 1 << 4;

impl ConfigSpace {
    /// Configuration space of `size` bytes, all of them 0.
    pub(crate) fn new(size: usize) -> Self {
        Self {
            bytes: vec![0; size],
            writable: vec![0; size],
            after_reset: vec![0; size],
        }
    }

    /// Sets what a register reads after a reset, and now, and which of its bits can be written.
    pub(crate) fn define(&mut self, offset: usize, value: &[u8], writable: &[u8]) {
        for bytes in [&mut self.bytes, &mut self.after_reset] {
            put(bytes, offset, value);
        }
        put(&mut self.writable, offset, writable);
    }

    /// Says that there is a list of capabilities, which begins at `first`.
    pub(crate) fn define_capabilities(&mut self, first: u8) {
        self.define(register::STATUS, &CAPABILITIES_LIST.to_le_bytes(), &[0; 2]);
        self.define(register::CAPABILITIES, &[first], &[0]);
    }

    pub(crate) fn size(&self) -> usize {
        self.bytes.len()
    }

    /// Reads from `offset`; `None` if there are not as many bytes.
    pub(crate) fn read(&self, offset: u64, data: &mut [u8]) -> Option<()> {
        let start = usize::try_from(offset).ok()?;
        let bytes = self.bytes.get(start..start.checked_add(data.len())?)?;
        data.copy_from_slice(bytes);
        Some(())
    }

    /// Writes what can be written of `data`; `None` if there are not as many bytes.
    pub(crate) fn write(&mut self, offset: u64, data: &[u8]) -> Option<()> {
        let start = usize::try_from(offset).ok()?;
        let range = start..start.checked_add(data.len())?;
        let bytes = self.bytes.get_mut(range.clone())?;
        let writable = self.writable.get(range)?;
        for ((byte, writable), new) in bytes.iter_mut().zip(writable).zip(data) {
            *byte = *byte & !writable | new & writable;
        }
        Some(())
    }

    pub(crate) fn reset(&mut self) {
        self.bytes.clone_from(&self.after_reset);
    }

    /// All of it, for migration.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Takes over what another device of the same kind had; `None`, and nothing is changed, if it is of another kind:
    /// what cannot be written has to be the same.
    pub(crate) fn restore(&mut self, bytes: &[u8]) -> Option<()> {
        if bytes.len() != self.bytes.len() {
            return None;
        }
        let fixed = |offset: usize, byte: u8, writable: u8| {
            // The interrupt's status follows from the interrupt.
            let status = u8::from(offset == register::STATUS) * INTERRUPT_STATUS;
            byte & !writable & !status
        };
        let pairs = self.bytes.iter().zip(bytes).zip(&self.writable).enumerate();
        for (offset, ((ours, theirs), writable)) in pairs {
            if fixed(offset, *ours, *writable) != fixed(offset, *theirs, *writable) {
                return None;
            }
        }
        self.bytes.copy_from_slice(bytes);
        Some(())
    }

    /// Two bytes, or 0 where there are none.
    pub(crate) fn word(&self, offset: usize) -> u16 {
        let bytes = self
            .bytes
            .get(offset..)
            .and_then(|bytes| bytes.first_chunk());
        bytes.map_or(0, |bytes| u16::from_le_bytes(*bytes))
    }

    pub(crate) fn is_set(&self, command: u16) -> bool {
        self.word(register::COMMAND) & command != 0
    }

    /// Shows the level of INTx in the Status register, whether or not it may interrupt.
    pub(crate) fn set_interrupt_status(&mut self, high: bool) {
        if let Some(status) = self.bytes.get_mut(register::STATUS) {
            *status = *status & !INTERRUPT_STATUS | (u8::from(high) * INTERRUPT_STATUS);
        }
    }
}

fn put(bytes: &mut [u8], offset: usize, value: &[u8]) {
    let end = offset.saturating_add(value.len());
    if let Some(bytes) = bytes.get_mut(offset..end) {
        bytes.copy_from_slice(value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_writable_bits_change_and_a_reset_undoes_it() {
        let mut config = ConfigSpace::new(CONVENTIONAL_SIZE);
        config.define(0x10, &[0x01, 0x02], &[0xf0, 0x0f]);
        config.write(0x0f, &[0xff, 0xff, 0xff, 0xff]).unwrap();
        let mut bytes = [0; 4];
        config.read(0x0f, &mut bytes).unwrap();
        assert_eq!(bytes, [0, 0xf1, 0x0f, 0]);
        config.reset();
        config.read(0x0f, &mut bytes).unwrap();
        assert_eq!(bytes, [0, 0x01, 0x02, 0]);
    }

    #[test]
    fn accesses_beyond_the_end_are_refused() {
        let mut config = ConfigSpace::new(CONVENTIONAL_SIZE);
        for offset in [253, 256, u64::MAX - 3, u64::MAX] {
            assert!(config.read(offset, &mut [0; 4]).is_none(), "{offset}");
            assert!(config.write(offset, &[0; 4]).is_none(), "{offset}");
        }
        assert!(config.read(252, &mut [0; 4]).is_some());
    }

    #[test]
    fn only_the_same_kind_of_device_is_restored() {
        let mut config = ConfigSpace::new(CONVENTIONAL_SIZE);
        config.define(register::VENDOR, &[0x34, 0x12], &[0, 0]);
        config.define(register::COMMAND, &[0, 0], &[7, 4]);
        let mut other = config.clone();
        other.write(4, &[6, 4]).unwrap();
        other.set_interrupt_status(true);
        config.restore(other.bytes()).unwrap();
        assert_eq!(config.bytes(), other.bytes());

        other.define(register::VENDOR, &[0x35, 0x12], &[0, 0]);
        assert!(config.restore(other.bytes()).is_none());
        assert!(config.restore(&[0; 255]).is_none());
    }
}
