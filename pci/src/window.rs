//! The host bridge's windows, and the assignment of BARs to addresses within them.

use std::cmp::Reverse;
use std::fmt;

use thiserror::Error;
use vm_allocator::{AddressAllocator, AllocPolicy, RangeInclusive};

use crate::bar::{BarKind, BarSpec, Bars};

/// The smallest unit in which memory BARs are placed, so that a page which is mapped into the guest is never shared
/// between two of them.
const PAGE_SIZE: u64 = 4096;

/// A range of addresses that the host bridge forwards to the bus.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    /// Its first address: a guest physical address, or a port.
    pub start: u64,
    /// How many addresses it has, at least one.
    pub length: u64,
}

impl Window {
    /// Whether all of a range is within the window.
    pub const fn contains(&self, start: u64, length: u64) -> bool {
        let Some(offset) = start.checked_sub(self.start) else {
            return false;
        };
        let Some(end) = offset.checked_add(length) else {
            return false;
        };
        end <= self.length
    }
}

/// The windows of a host bridge, as its _CRS tells them to the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Windows {
    /// I/O ports.
    pub io: Window,
    /// Memory below 4 GiB.
    pub memory32: Window,
    /// Memory above 4 GiB.
    pub memory64: Window,
}

impl Windows {
    /// Whether a BAR at this address is within a window of its space.
    pub const fn contain(&self, spec: &BarSpec, address: u64) -> bool {
        match spec.kind {
            BarKind::Io => self.io.contains(address, spec.size),
            BarKind::Memory32 { .. } | BarKind::Memory64 { .. } => {
                self.memory32.contains(address, spec.size)
                    || self.memory64.contains(address, spec.size)
            }
        }
    }
}

/// Names one of the [`Windows`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WindowKind {
    /// I/O ports.
    Io,
    /// Memory below 4 GiB.
    Memory32,
    /// Memory above 4 GiB.
    Memory64,
}

impl fmt::Display for WindowKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Io => "I/O",
            Self::Memory32 => "32-bit memory",
            Self::Memory64 => "64-bit memory",
        })
    }
}

/// Why BARs cannot be placed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum WindowError {
    /// A window that is empty or that wraps around.
    #[error("the {kind} window of {:#x} bytes at {:#x} is empty or wraps around", window.length, window.start)]
    Invalid {
        /// Which window.
        kind: WindowKind,
        /// Where it is said to be.
        window: Window,
    },
    /// There is no room.
    #[error(
        "no room for a BAR of {size:#x} bytes in the {kind} window, where {free:#x} bytes are left"
    )]
    Full {
        /// The window that the BAR belongs in.
        kind: WindowKind,
        /// How many bytes the BAR needs.
        size: u64,
        /// How many bytes are left, not necessarily contiguous.
        free: u64,
    },
    /// An address was freed at which no BAR of this size had been placed.
    #[error("no BAR of {size:#x} bytes was placed at {address:#x}")]
    NotAllocated {
        /// The address.
        address: u64,
        /// The size of the BAR in bytes.
        size: u64,
    },
}

/// Places BARs in the windows, as firmware would.
///
/// A BAR is aligned to its size, and a memory BAR gets whole pages. A 64-bit BAR is placed above 4 GiB whether it is
/// prefetchable or not, since no bridge is before it whose window could not reach there, and below only if there is
/// no room above.
#[derive(Debug, Clone)]
pub struct BarAllocator {
    io: Pool,
    memory32: Pool,
    memory64: Pool,
}

impl BarAllocator {
    /// All of the windows, with nothing placed.
    pub fn new(windows: &Windows) -> Result<Self, WindowError> {
        Ok(Self {
            io: Pool::new(WindowKind::Io, windows.io)?,
            memory32: Pool::new(WindowKind::Memory32, windows.memory32)?,
            memory64: Pool::new(WindowKind::Memory64, windows.memory64)?,
        })
    }

    /// Places all BARs of a function, largest first, and sets their registers; or none if there is no room for one.
    pub fn assign(&mut self, bars: &mut Bars) -> Result<(), WindowError> {
        let mut specs: Vec<_> = bars.specs().map(|(bar, spec)| (bar, *spec)).collect();
        specs.sort_by_key(|(_, spec)| Reverse(spec.size));

        let mut trial = self.clone();
        let mut placed = bars.clone();
        for (bar, spec) in specs {
            placed.set_address(bar, trial.allocate(&spec)?);
        }
        *self = trial;
        *bars = placed;
        Ok(())
    }

    /// Places one BAR and returns its address.
    pub fn allocate(&mut self, spec: &BarSpec) -> Result<u64, WindowError> {
        let length = footprint(spec);
        match spec.kind {
            BarKind::Io => self.io.allocate(length),
            BarKind::Memory32 { .. } => self.memory32.allocate(length),
            BarKind::Memory64 { .. } => self
                .memory64
                .allocate(length)
                .or_else(|full| self.memory32.allocate(length).map_err(|_| full)),
        }
    }

    /// Takes back what [`BarAllocator::allocate`] returned for this BAR, wherever the guest has moved it since.
    pub fn free(&mut self, spec: &BarSpec, address: u64) -> Result<(), WindowError> {
        let pool = match spec.kind {
            BarKind::Io => &mut self.io,
            _ if self.memory32.contains(address) => &mut self.memory32,
            _ => &mut self.memory64,
        };
        pool.free(address, footprint(spec))
    }
}

/// How many bytes of its window a BAR takes; also its alignment.
fn footprint(spec: &BarSpec) -> u64 {
    match spec.kind {
        BarKind::Io => spec.size,
        BarKind::Memory32 { .. } | BarKind::Memory64 { .. } => spec.size.max(PAGE_SIZE),
    }
}

/// What is left of a window.
#[derive(Debug, Clone)]
struct Pool {
    kind: WindowKind,
    allocator: AddressAllocator,
    free: u64,
}

impl Pool {
    fn new(kind: WindowKind, window: Window) -> Result<Self, WindowError> {
        let allocator = AddressAllocator::new(window.start, window.length)
            .map_err(|_| WindowError::Invalid { kind, window })?;
        Ok(Self {
            kind,
            allocator,
            free: window.length,
        })
    }

    fn contains(&self, address: u64) -> bool {
        (self.allocator.base()..=self.allocator.end()).contains(&address)
    }

    fn allocate(&mut self, length: u64) -> Result<u64, WindowError> {
        let full = WindowError::Full {
            kind: self.kind,
            size: length,
            free: self.free,
        };
        let range = self
            .allocator
            .allocate(length, length, AllocPolicy::FirstMatch)
            .map_err(|_| full)?;
        self.free -= length;
        Ok(range.start())
    }

    fn free(&mut self, address: u64, length: u64) -> Result<(), WindowError> {
        let not_allocated = WindowError::NotAllocated {
            address,
            size: length,
        };
        let last = address
            .checked_add(length.saturating_sub(1))
            .ok_or(not_allocated)?;
        RangeInclusive::new(address, last)
            .and_then(|range| self.allocator.free(&range))
            .map_err(|_| not_allocated)?;
        self.free += length;
        Ok(())
    }
}

#[cfg(test)]
mod tests;
