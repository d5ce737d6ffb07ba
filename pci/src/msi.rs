//! Message signalled interrupts (7.7.1).

use std::array;

use crate::register::{self, Register};
use crate::state::{MsiState, StateError};

/// What a message signalled interrupt writes, and where (PCI Local Bus 3.0, 6.8.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MsiMessage {
    /// The guest physical address that is written.
    pub address: u64,
    /// The value that is written there.
    pub data: u32,
}

/// Message Control (7.7.1.2): messages are sent.
const ENABLE: u16 = 1 << 0;
/// Where the binary logarithm of the number of vectors that the function asks for is, three bits wide.
const CAPABLE_SHIFT: u32 = 1;
/// Where the binary logarithm of the number of vectors that software grants is, three bits wide.
const GRANTED_SHIFT: u32 = 4;
/// The address has an upper half.
const ADDRESS_64: u16 = 1 << 7;
/// There are Mask and Pending registers.
const MASKABLE: u16 = 1 << 8;

/// The largest value that the two fields above can have: more than 32 vectors is reserved.
const MAX_LOG2: u16 = 5;
/// The number of vectors at that value.
const MAX_VECTORS: usize = 32;

/// The MSI capability of a function: registers of which a guest makes messages.
///
/// Offsets are in bytes from the start of the capability. Its first two bytes, id and next pointer, are not kept
/// here. Extended Message Data (7.7.1.6) is not offered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Msi {
    /// Message Control in the upper half, Message Address, Message Upper Address, Message Data, Mask Bits and Pending
    /// Bits. Where a function has no upper address, the registers after it are 4 bytes earlier in its capability.
    registers: [Register; 6],
}

const CONTROL: usize = 0;
const MASK: usize = 4;
const PENDING: usize = 5;

impl Msi {
    /// The capability after a reset, where a function's Message Control reads `control`.
    pub fn new(control: u16) -> Self {
        let log2 = (control >> CAPABLE_SHIFT & 7).min(MAX_LOG2);
        let fixed = control & (ADDRESS_64 | MASKABLE) | log2 << CAPABLE_SHIFT;
        let vectors = u32::MAX >> (32 - (1u32 << log2));
        let if_set = |bit: u16, mask: u32| if control & bit != 0 { mask } else { 0 };
        let granted_and_enable = ENABLE | 7 << GRANTED_SHIFT;
        Self {
            registers: [
                Register::new(u32::from(fixed) << 16, u32::from(granted_and_enable) << 16),
                Register::new(0, !3),
                Register::new(0, if_set(ADDRESS_64, u32::MAX)),
                Register::new(0, 0xffff),
                Register::new(0, if_set(MASKABLE, vectors)),
                Register::new(0, 0),
            ],
        }
    }

    /// How many bytes the capability takes, rounded up to a multiple of four: 12 to 24.
    pub fn length(&self) -> u8 {
        let address = if self.has(ADDRESS_64) { 8 } else { 4 };
        let mask_and_pending = if self.has(MASKABLE) { 8 } else { 0 };
        4 + address + 4 + mask_and_pending
    }

    /// How many vectors the function has: 1 to 32.
    pub fn vectors(&self) -> u16 {
        1 << self.capable_log2()
    }

    /// How many vectors software has granted: 1 to 32.
    pub fn granted(&self) -> u16 {
        1 << self.granted_log2()
    }

    /// Whether MSI is enabled.
    pub fn enabled(&self) -> bool {
        self.has(ENABLE)
    }

    /// What this vector sends; `None` while MSI is disabled, the vector is masked or software has not granted it.
    pub fn message(&self, vector: u16) -> Option<MsiMessage> {
        let granted = self.granted();
        let sends = self.enabled() && vector < granted && !self.masked(vector);
        let [_, low, high, data, ..] = self.registers.map(|register| register.value);
        sends.then(|| MsiMessage {
            address: u64::from(high) << 32 | u64::from(low),
            data: data & !u32::from(granted - 1) | u32::from(vector),
        })
    }

    /// The guest reads. Bytes 0 and 1 are left as they are. `pending` tells whether a masked vector has been
    /// signalled.
    pub fn read(&self, offset: u16, data: &mut [u8], pending: impl Fn(u16) -> bool) {
        let mut registers = self.registers;
        registers[PENDING].value = self.pending(pending);
        let skipped = usize::from(2u16.saturating_sub(offset));
        if let Some(data) = data.get_mut(skipped..) {
            register::read(&registers, self.locate(offset) + skipped, data);
        }
    }

    /// The guest writes. Returns the vectors whose message changed, as of [`Msi::message`].
    pub fn write(&mut self, offset: u16, data: &[u8]) -> Vec<(u16, Option<MsiMessage>)> {
        let before = self.messages();
        let offset = self.locate(offset);
        register::write(&mut self.registers, offset, data);
        self.changes_since(before)
    }

    /// Back to the state after a reset. Returns the vectors whose message changed: those that had one.
    pub fn reset(&mut self) -> Vec<(u16, Option<MsiMessage>)> {
        let before = self.messages();
        *self = Self::new(self.control());
        self.changes_since(before)
    }

    /// What is to be saved of it.
    pub fn save(&self) -> MsiState {
        let [_, low, high, data, mask, _] = self.registers.map(|register| register.value);
        MsiState {
            control: self.control(),
            address: u64::from(high) << 32 | u64::from(low),
            data,
            mask,
        }
    }

    /// The same capability with what was saved of one.
    pub fn restored(&self, state: &MsiState) -> Result<Self, StateError> {
        let MsiState {
            control,
            address,
            data,
            mask,
        } = *state;
        let high = (address >> 32) as u32;
        let low = (address & 0xffff_ffff) as u32;
        let saved = [u32::from(control) << 16, low, high, data, mask];
        let mut msi = self.clone();
        for ((index, register), value) in (0..).zip(&mut msi.registers).zip(saved) {
            *register = register
                .restored(value)
                .ok_or_else(|| StateError::impossible("registers of MSI", index, value))?;
        }
        Ok(msi)
    }

    fn messages(&self) -> [Option<MsiMessage>; MAX_VECTORS] {
        let mut vectors = 0..;
        array::from_fn(|_| self.message(vectors.next()?))
    }

    fn changes_since(
        &self,
        before: [Option<MsiMessage>; MAX_VECTORS],
    ) -> Vec<(u16, Option<MsiMessage>)> {
        (0..)
            .zip(before.into_iter().zip(self.messages()))
            .filter(|(_, (before, after))| before != after)
            .map(|(vector, (_, after))| (vector, after))
            .collect()
    }

    /// The Pending register: vectors that are masked and have been signalled.
    fn pending(&self, pending: impl Fn(u16) -> bool) -> u32 {
        if !self.enabled() || !self.has(MASKABLE) {
            return 0;
        }
        (0..1u16 << self.granted_log2())
            .filter(|&vector| self.masked(vector) && pending(vector))
            .fold(0, |bits, vector| bits | 1 << vector)
    }

    fn masked(&self, vector: u16) -> bool {
        self.registers[MASK].value >> vector & 1 != 0
    }

    fn granted_log2(&self) -> u16 {
        (self.control() >> GRANTED_SHIFT & 7).min(self.capable_log2())
    }

    fn capable_log2(&self) -> u16 {
        self.control() >> CAPABLE_SHIFT & 7
    }

    fn has(&self, bit: u16) -> bool {
        self.control() & bit != 0
    }

    fn control(&self) -> u16 {
        (self.registers[CONTROL].value >> 16) as u16
    }

    /// Where `offset` is in `registers`.
    fn locate(&self, offset: u16) -> usize {
        let upper_address = if self.has(ADDRESS_64) { 0 } else { 4 };
        let offset = usize::from(offset);
        if offset < 8 {
            offset
        } else {
            offset + upper_address
        }
    }
}

#[cfg(test)]
mod tests;
