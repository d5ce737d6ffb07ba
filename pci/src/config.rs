//! A function's configuration space, as bytes that the guest can write or not.

use std::fmt;

/// The shadow of a function's configuration space: 4096 bytes (7.2), each with the bits that the guest can write and
/// those it clears by writing a one.
///
/// Everything is zero and read-only until set. Registers are little-endian, and accesses of any size and alignment
/// are taken byte by byte.
#[derive(Clone, PartialEq, Eq)]
pub struct ConfigSpace {
    bytes: Box<[Byte]>,
}

#[derive(Clone, Copy, PartialEq, Eq, Default)]
struct Byte {
    value: u8,
    writable: u8,
    clearable: u8,
}

impl ConfigSpace {
    /// How many bytes there are.
    pub const SIZE: u16 = 4096;

    /// All zero and read-only.
    pub fn new() -> Self {
        Self {
            bytes: vec![Byte::default(); usize::from(Self::SIZE)].into(),
        }
    }

    /// The guest reads. Bytes past the end read as all-ones.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        data.fill(0xff);
        for (to, byte) in data.iter_mut().zip(self.tail(offset)) {
            *to = byte.value;
        }
    }

    /// The guest writes: changes writable bits, and clears clearable ones where `data` has a one.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        for (byte, &data) in self.tail_mut(offset).zip(data) {
            let written = byte.value & !byte.writable | data & byte.writable;
            byte.value = written & !(data & byte.clearable);
        }
    }

    /// Sets registers to these values, whatever the guest could write there.
    pub fn set(&mut self, offset: u16, data: &[u8]) {
        for (byte, &value) in self.tail_mut(offset).zip(data) {
            byte.value = value;
        }
    }

    /// Sets which bits the guest can write.
    pub fn set_writable(&mut self, offset: u16, mask: &[u8]) {
        for (byte, &mask) in self.tail_mut(offset).zip(mask) {
            byte.writable = mask;
        }
    }

    /// Sets which bits the guest clears by writing a one. Where a bit is writable too, a one clears it and a zero
    /// does so as well.
    pub fn set_clearable(&mut self, offset: u16, mask: &[u8]) {
        for (byte, &mask) in self.tail_mut(offset).zip(mask) {
            byte.clearable = mask;
        }
    }

    /// The byte at `offset`.
    pub fn byte(&self, offset: u16) -> u8 {
        let [byte] = self.array(offset);
        byte
    }

    /// The two bytes at `offset`.
    pub fn word(&self, offset: u16) -> u16 {
        u16::from_le_bytes(self.array(offset))
    }

    /// The four bytes at `offset`.
    pub fn dword(&self, offset: u16) -> u32 {
        u32::from_le_bytes(self.array(offset))
    }

    fn array<const N: usize>(&self, offset: u16) -> [u8; N] {
        let mut data = [0; N];
        self.read(offset, &mut data);
        data
    }

    fn tail(&self, offset: u16) -> impl Iterator<Item = &Byte> {
        self.bytes.iter().skip(usize::from(offset))
    }

    fn tail_mut(&mut self, offset: u16) -> impl Iterator<Item = &mut Byte> {
        self.bytes.iter_mut().skip(usize::from(offset))
    }
}

impl Default for ConfigSpace {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for ConfigSpace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConfigSpace").finish_non_exhaustive()
    }
}
