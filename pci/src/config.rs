//! A function's configuration space, as bytes that the guest can write or not.

use std::fmt;

use crate::state::{ByteState, ConfigSpaceState, StateError};

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

impl Byte {
    /// Whether the guest can change it.
    fn changes(&self) -> bool {
        self.writable | self.clearable != 0
    }
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
            let writable = byte.writable & !byte.clearable;
            let cleared = byte.clearable & data;
            byte.value = (byte.value & !writable | data & writable) & !cleared;
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

    /// Sets which bits the guest clears by writing a one. It cannot write these in any other way.
    pub fn set_clearable(&mut self, offset: u16, mask: &[u8]) {
        for (byte, &mask) in self.tail_mut(offset).zip(mask) {
            byte.clearable = mask;
        }
    }

    /// What is to be saved of it.
    pub fn save(&self) -> ConfigSpaceState {
        let bytes = (0..).zip(&self.bytes).filter(|(_, byte)| byte.changes());
        let saved = |(offset, byte): (u16, &Byte)| ByteState {
            offset,
            value: byte.value,
        };
        ConfigSpaceState {
            bytes: bytes.map(saved).collect(),
        }
    }

    /// The same space with the registers of a saved one.
    pub fn restored(&self, state: &ConfigSpaceState) -> Result<Self, StateError> {
        let here = self.bytes.iter().filter(|byte| byte.changes()).count();
        if state.bytes.len() != here {
            return Err(StateError::Count {
                what: "bytes of configuration space that the guest can write",
                saved: state.bytes.len(),
                here,
            });
        }
        let mut space = self.clone();
        let mut next = 0;
        for &ByteState { offset, value } in &state.bytes {
            // In order, so that none is there twice.
            let byte = space.bytes.get_mut(usize::from(offset));
            let byte = byte.filter(|byte| byte.changes() && offset >= next);
            let byte = byte.ok_or(StateError::Unexpected { offset })?;
            if (byte.value ^ value) & !(byte.writable | byte.clearable) != 0 {
                let what = "bytes of configuration space";
                return Err(StateError::impossible(what, offset.into(), value.into()));
            }
            byte.value = value;
            next = offset + 1;
        }
        Ok(space)
    }

    /// The bits of the byte at `offset` that a guest can change.
    pub fn writable(&self, offset: u16) -> u8 {
        let byte = self.tail(offset).next();
        byte.map_or(0, |byte| byte.writable | byte.clearable)
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

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    /// One bit, and what a write does to it.
    #[derive(Debug, Clone, Copy)]
    struct NaiveBit {
        value: bool,
        writable: bool,
        clearable: bool,
    }

    impl NaiveBit {
        fn write(&mut self, one: bool) {
            if self.clearable {
                self.value &= !one;
            } else if self.writable {
                self.value = one;
            }
        }
    }

    #[derive(Debug, Clone)]
    enum Step {
        Set(u16, Vec<u8>),
        SetWritable(u16, Vec<u8>),
        SetClearable(u16, Vec<u8>),
        Write(u16, Vec<u8>),
    }

    fn step() -> impl Strategy<Value = Step> {
        let offset = prop_oneof![0u16..16, 4088u16..4100, Just(u16::MAX)];
        let data = vec(any::<u8>(), 1..=8);
        (0..4, offset, data).prop_map(|(kind, offset, data)| match kind {
            0 => Step::Set(offset, data),
            1 => Step::SetWritable(offset, data),
            2 => Step::SetClearable(offset, data),
            _ => Step::Write(offset, data),
        })
    }

    proptest! {
        #[test]
        fn behaves_as_bits_do(steps in vec(step(), 0..64)) {
            let zero = NaiveBit { value: false, writable: false, clearable: false };
            let mut naive = vec![zero; 4096 * 8];
            let mut config = ConfigSpace::new();
            for step in steps {
                let (Step::Set(offset, data)
                | Step::SetWritable(offset, data)
                | Step::SetClearable(offset, data)
                | Step::Write(offset, data)) = &step;
                for (index, bit) in naive.iter_mut().skip(usize::from(*offset) * 8).enumerate() {
                    let Some(byte) = data.get(index / 8) else { break };
                    let one = byte & 1 << (index % 8) != 0;
                    match step {
                        Step::Set(..) => bit.value = one,
                        Step::SetWritable(..) => bit.writable = one,
                        Step::SetClearable(..) => bit.clearable = one,
                        Step::Write(..) => bit.write(one),
                    }
                }
                match &step {
                    Step::Set(offset, data) => config.set(*offset, data),
                    Step::SetWritable(offset, mask) => config.set_writable(*offset, mask),
                    Step::SetClearable(offset, mask) => config.set_clearable(*offset, mask),
                    Step::Write(offset, data) => config.write(*offset, data),
                }
            }
            for (offset, bits) in (0..).zip(naive.chunks(8)) {
                let byte = (0..8).map(|i| u8::from(bits[i].value) << i).sum::<u8>();
                prop_assert_eq!(config.byte(offset), byte);
            }
        }
    }

    #[test]
    fn registers_are_little_endian() {
        let mut config = ConfigSpace::new();
        config.set(0x10, &[0x78, 0x56, 0x34, 0x12]);
        assert_eq!(config.byte(0x11), 0x56);
        assert_eq!(config.word(0x11), 0x3456);
        assert_eq!(config.dword(0x10), 0x1234_5678);
    }

    #[test]
    fn past_the_end_reads_as_ones() {
        let config = ConfigSpace::new();
        assert_eq!(config.dword(ConfigSpace::SIZE - 2), 0xffff_0000);
        assert_eq!(config.dword(u16::MAX), 0xffff_ffff);
    }
}
