//! What is saved of a function's registers: values apart from the live types, so that either can change alone, and with
//! nothing in them that could not have been read.
//!
//! A live type saves itself, and makes of saved values and its own kind a new one. Saved values may come from another
//! host and be anything: all are checked, and what cannot be is an error that names the register.

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Saved registers of a [`ConfigSpace`](crate::ConfigSpace): those bytes that the guest can write.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConfigSpaceState {
    /// By ascending offset.
    pub bytes: Vec<ByteState>,
}

/// A byte of configuration space.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ByteState {
    /// Where it is.
    pub offset: u16,
    /// What it reads.
    pub value: u8,
}

/// Saved [`Bars`](crate::Bars): what their registers read, which is their addresses unless the guest was sizing them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BarsState {
    /// The six base address registers.
    pub registers: [u32; 6],
    /// The expansion ROM's.
    pub rom: u32,
}

/// A saved [`Msi`](crate::Msi) capability. What is pending, its vectors know.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MsiState {
    /// Message Control.
    pub control: u16,
    /// Message Address, and Message Upper Address.
    pub address: u64,
    /// Message Data.
    pub data: u32,
    /// Mask Bits.
    pub mask: u32,
}

/// A saved [`Msix`](crate::Msix) capability. What is pending, its vectors know.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MsixState {
    /// Message Control.
    pub control: u16,
    /// The table: Message Address, Message Upper Address, Message Data and Vector Control of each vector.
    pub table: Vec<[u32; 4]>,
}

/// Why saved registers cannot be those of a function.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum StateError {
    /// There are more or fewer than the function has.
    #[error("{what}: {saved} saved, and there are {here}")]
    Count {
        /// What there is another number of.
        what: &'static str,
        /// How many were saved.
        saved: usize,
        /// How many there are.
        here: usize,
    },
    /// A register reads what it cannot.
    #[error("{what}: number {index} was saved as {value:#x}, which it cannot read")]
    Impossible {
        /// What register it is.
        what: &'static str,
        /// Which of them, or its offset.
        index: usize,
        /// Its saved value.
        value: u32,
    },
    /// A byte of configuration space was saved that the guest cannot write.
    #[error("configuration space at {offset:#x} was saved, and the guest cannot write there")]
    Unexpected {
        /// Where it is.
        offset: u16,
    },
}

impl StateError {
    /// A register, the one with this index, that cannot have this value.
    pub(crate) fn impossible(what: &'static str, index: usize, value: u32) -> Self {
        Self::Impossible { what, index, value }
    }
}

#[cfg(test)]
mod tests;
