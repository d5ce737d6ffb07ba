//! Registers of which the guest can write some bits.

/// A 32-bit register.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Register {
    /// What reads return.
    pub(crate) value: u32,
    /// The bits that writes change.
    pub(crate) writable: u32,
}

impl Register {
    pub(crate) const fn new(value: u32, writable: u32) -> Self {
        Self { value, writable }
    }

    /// The same register with a saved value, if it can read that.
    pub(crate) fn restored(self, value: u32) -> Option<Self> {
        let differ = self.value ^ value;
        (differ & !self.writable == 0).then_some(Self { value, ..self })
    }

    /// Writes the whole register.
    pub(crate) fn write(&mut self, value: u32) {
        self.write_bits(value, u32::MAX);
    }

    fn write_bits(&mut self, value: u32, bits: u32) {
        let bits = bits & self.writable;
        self.value = self.value & !bits | value & bits;
    }
}

/// Reads consecutive registers from byte `offset` on. Bytes past the last register are left as they are.
pub(crate) fn read(registers: &[Register], offset: usize, data: &mut [u8]) {
    for (index, byte) in data.iter_mut().enumerate() {
        let (register, shift) = locate(offset, index);
        if let Some(register) = registers.get(register) {
            *byte = (register.value >> shift & 0xff) as u8;
        }
    }
}

/// Writes consecutive registers from byte `offset` on. Bytes past the last register are dropped.
pub(crate) fn write(registers: &mut [Register], offset: usize, data: &[u8]) {
    for (index, &byte) in data.iter().enumerate() {
        let (register, shift) = locate(offset, index);
        if let Some(register) = registers.get_mut(register) {
            register.write_bits(u32::from(byte) << shift, 0xff << shift);
        }
    }
}

/// The register that holds the byte `index` bytes after `offset`, and by how many bits it is shifted there.
fn locate(offset: usize, index: usize) -> (usize, usize) {
    let offset = offset.saturating_add(index);
    (offset / 4, offset % 4 * 8)
}
