//! MSI-X (7.7.2): a table of messages in one of the function's BARs.

use std::iter;
use std::ops::Range;

use thiserror::Error;

use crate::config::ConfigSpace;
use crate::endpoint::BarIndex;
use crate::msi::MsiMessage;
use crate::register::{self, Register};
use crate::state::{MsixState, StateError};

/// The size of a table entry in bytes.
const ENTRY_SIZE: usize = 16;

/// Message Control (7.7.2.2), at 2 in the capability: the number of vectors minus one.
const TABLE_SIZE: u16 = 0x7ff;
/// All vectors are masked.
const FUNCTION_MASK: u16 = 1 << 14;
/// Messages are sent.
const ENABLE: u16 = 1 << 15;

/// Where a function's MSI-X table and pending bits are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MsixLayout {
    /// How many vectors there are: 1 to 2048.
    pub vectors: u16,
    /// The BAR with the table.
    pub table_bar: BarIndex,
    /// Where the table is in it, in bytes: a multiple of 8.
    pub table_offset: u32,
    /// The BAR with the pending bits.
    pub pba_bar: BarIndex,
    /// Where the pending bits are in it, in bytes: a multiple of 8.
    pub pba_offset: u32,
}

impl MsixLayout {
    /// Reads the capability at `offset`.
    pub fn parse(config: &ConfigSpace, offset: u8) -> Result<Self, MsixError> {
        let offset = u16::from(offset);
        let (table_bar, table_offset) = location(config.dword(offset + 4))?;
        let (pba_bar, pba_offset) = location(config.dword(offset + 8))?;
        let layout = Self {
            vectors: (config.word(offset + 2) & TABLE_SIZE) + 1,
            table_bar,
            table_offset,
            pba_bar,
            pba_offset,
        };
        let (table, pba) = (layout.table_range(), layout.pba_range());
        if table_bar == pba_bar && table.start < pba.end && pba.start < table.end {
            return Err(MsixError::Overlap { bar: table_bar });
        }
        Ok(layout)
    }

    /// Checks that both the table and the pending bits are within their BARs, whose sizes in bytes `size` tells, zero
    /// for one that is not there.
    pub fn check(&self, size: impl Fn(BarIndex) -> u64) -> Result<(), MsixError> {
        for (bar, range) in [
            (self.table_bar, self.table_range()),
            (self.pba_bar, self.pba_range()),
        ] {
            let size = size(bar);
            if range.end > size {
                return Err(MsixError::OutOfBar {
                    bar,
                    end: range.end,
                    size,
                });
            }
        }
        Ok(())
    }

    /// The bytes of [`MsixLayout::table_bar`] that the table takes: 16 for each vector.
    pub fn table_range(&self) -> Range<u64> {
        let start = u64::from(self.table_offset);
        start..start + u64::from(self.vectors) * ENTRY_SIZE as u64
    }

    /// The bytes of [`MsixLayout::pba_bar`] that the pending bits take: 8 for every 64 vectors.
    pub fn pba_range(&self) -> Range<u64> {
        let start = u64::from(self.pba_offset);
        start..start + u64::from(self.vectors).div_ceil(64) * 8
    }
}

/// The BAR and the offset that a Table Offset/BIR or a PBA Offset/BIR register tells (7.7.2.3, 7.7.2.4).
fn location(register: u32) -> Result<(BarIndex, u32), MsixError> {
    let bir = (register & 7) as u8;
    let bar = BarIndex::new(bir).ok_or(MsixError::ReservedBir { bir })?;
    Ok((bar, register & !7))
}

/// Why a device's MSI-X capability makes no sense.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum MsixError {
    /// A BAR that no function has.
    #[error("MSI-X is in BAR{bir}, and there is no such BAR")]
    ReservedBir {
        /// The BAR Indicator Register.
        bir: u8,
    },
    /// The table and the pending bits overlap.
    #[error("the MSI-X table and its pending bits overlap in {bar}")]
    Overlap {
        /// The BAR with both.
        bar: BarIndex,
    },
    /// The table or the pending bits end after their BAR.
    #[error("MSI-X takes {bar} up to {end:#x}, and it is only {size:#x} bytes")]
    OutOfBar {
        /// Which BAR.
        bar: BarIndex,
        /// Where the table or the pending bits end in it, in bytes.
        end: u64,
        /// The size of the BAR in bytes.
        size: u64,
    },
}

/// The MSI-X state of a function: what its vectors send, and whether they may.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Msix {
    control: u16,
    /// Message Address, Message Upper Address, Message Data and Vector Control (7.7.2.5 to 7.7.2.8) of each vector.
    table: Vec<[Register; 4]>,
}

/// An entry after a reset: all zero but masked. Reserved bits are read-only.
const RESET_ENTRY: [Register; 4] = [
    Register::new(0, !3),
    Register::new(0, u32::MAX),
    Register::new(0, u32::MAX),
    Register::new(VECTOR_MASK, VECTOR_MASK),
];

/// Vector Control: the vector is masked.
const VECTOR_MASK: u32 = 1 << 0;

impl Msix {
    /// The state after a reset of a function with so many vectors, 1 to 2048: disabled, and every vector masked.
    pub fn new(vectors: u16) -> Self {
        Self {
            control: vectors.saturating_sub(1) & TABLE_SIZE,
            table: vec![RESET_ENTRY; vectors.into()],
        }
    }

    /// How many vectors there are: 1 to 2048.
    pub fn vectors(&self) -> u16 {
        (self.control & TABLE_SIZE) + 1
    }

    /// What Message Control reads (7.7.2.2).
    pub fn control(&self) -> u16 {
        self.control
    }

    /// Whether MSI-X is enabled.
    pub fn enabled(&self) -> bool {
        self.control & ENABLE != 0
    }

    /// What this vector sends; `None` while MSI-X is disabled, or the function or the vector is masked.
    pub fn message(&self, vector: u16) -> Option<MsiMessage> {
        let [low, high, data, control] = self.table.get(usize::from(vector))?;
        let sends = self.sends() && control.value & VECTOR_MASK == 0;
        sends.then(|| MsiMessage {
            address: u64::from(high.value) << 32 | u64::from(low.value),
            data: data.value,
        })
    }

    /// The guest writes Message Control, of which only bits 15, enable, and 14, function mask, can change. Returns
    /// the vectors whose message changed, as of [`Msix::message`].
    pub fn set_control(&mut self, control: u16) -> Vec<(u16, Option<MsiMessage>)> {
        let sent = self.sends();
        self.control = self.control & TABLE_SIZE | control & (ENABLE | FUNCTION_MASK);
        if self.sends() == sent {
            return Vec::new();
        }
        (0..)
            .zip(&self.table)
            .filter(|(_, [.., control])| control.value & VECTOR_MASK == 0)
            .map(|(vector, _)| (vector, self.message(vector)))
            .collect()
    }

    /// The guest reads the table, `offset` bytes from its start. Bytes past its end are left as they are.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        if let Ok(offset) = usize::try_from(offset) {
            register::read(self.table.as_flattened(), offset, data);
        }
    }

    /// The guest writes the table, `offset` bytes from its start. Bytes past its end are dropped. Returns the vectors
    /// whose message changed, as of [`Msix::message`].
    pub fn write_table(&mut self, offset: u64, data: &[u8]) -> Vec<(u16, Option<MsiMessage>)> {
        let mut changes = Vec::new();
        let Ok(mut offset) = usize::try_from(offset) else {
            return changes;
        };
        let (head, tail) = data.split_at(data.len().min(ENTRY_SIZE - offset % ENTRY_SIZE));
        for part in iter::once(head).chain(tail.chunks(ENTRY_SIZE)) {
            let Ok(vector) = u16::try_from(offset / ENTRY_SIZE) else {
                break;
            };
            let before = self.message(vector);
            register::write(self.table.as_flattened_mut(), offset, part);
            let after = self.message(vector);
            if before != after {
                changes.push((vector, after));
            }
            offset += part.len();
        }
        changes
    }

    /// The guest reads the pending bits, `offset` bytes from their start. Bits past the last vector are zero.
    ///
    /// `pending` tells whether a vector has been signalled while it was masked; it is asked only about vectors that
    /// are masked while MSI-X is enabled, for no others can be pending. Writes of the guest have no effect (7.7.2.9).
    pub fn read_pba(&self, offset: u64, data: &mut [u8], pending: impl Fn(u16) -> bool) {
        for (index, byte) in (0..).zip(data) {
            let first = offset.saturating_add(index).saturating_mul(8);
            let masked = |bit: &u64| self.masked(first.saturating_add(*bit));
            *byte = (0..8)
                .filter(|bit| masked(bit).is_some_and(&pending))
                .fold(0, |bits, bit| bits | 1 << bit);
        }
    }

    /// Back to the state after a reset. Returns the vectors whose message changed: those that had one.
    pub fn reset(&mut self) -> Vec<(u16, Option<MsiMessage>)> {
        let changes = self.set_control(0);
        self.table.fill(RESET_ENTRY);
        changes
    }

    /// What is to be saved of it.
    pub fn save(&self) -> MsixState {
        let entry = |entry: &[Register; 4]| entry.map(|register| register.value);
        MsixState {
            control: self.control,
            table: self.table.iter().map(entry).collect(),
        }
    }

    /// The same capability with what was saved of one.
    pub fn restored(&self, state: &MsixState) -> Result<Self, StateError> {
        let fixed = !(ENABLE | FUNCTION_MASK);
        if (state.control ^ self.control) & fixed != 0 {
            let control = state.control.into();
            return Err(StateError::impossible("control of MSI-X", 0, control));
        }
        if state.table.len() != self.table.len() {
            return Err(StateError::Count {
                what: "entries of the MSI-X table",
                saved: state.table.len(),
                here: self.table.len(),
            });
        }
        let mut msix = self.clone();
        msix.control = state.control;
        for (index, (entry, saved)) in msix.table.iter_mut().zip(&state.table).enumerate() {
            for (register, &value) in entry.iter_mut().zip(saved) {
                *register = register.restored(value).ok_or_else(|| {
                    StateError::impossible("entries of the MSI-X table", index, value)
                })?;
            }
        }
        Ok(msix)
    }

    /// This vector, if there is one and it is masked while MSI-X is enabled.
    fn masked(&self, vector: u64) -> Option<u16> {
        let vector = u16::try_from(vector).ok()?;
        let masked = self.enabled() && self.message(vector).is_none();
        (masked && vector < self.vectors()).then_some(vector)
    }

    /// Whether vectors that are not masked on their own send anything.
    fn sends(&self) -> bool {
        self.control & (ENABLE | FUNCTION_MASK) == ENABLE
    }
}

#[cfg(test)]
mod tests;
