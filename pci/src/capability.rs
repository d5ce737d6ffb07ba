//! Capabilities: walks over their lists that no device can lead astray, and the edits by which some are hidden.

mod edit;

use std::collections::BTreeSet;
use std::mem;
use std::ops::Range;

use thiserror::Error;

use crate::config::ConfigSpace;
use crate::header::{self, Status};

pub use edit::{hide_capability, hide_extended_capability, make_integrated_endpoint};

/// A capability in the first 256 bytes of configuration space (PCI Local Bus 3.0, 6.7).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capability {
    /// What it is.
    pub id: u8,
    /// Where it is, in bytes: a multiple of four, 0x40 to 0xfc.
    pub offset: u8,
}

/// Ids of capabilities (PCI Code and ID Assignment Specification 1.11, 2).
impl Capability {
    /// Power management (7.5.2).
    pub const POWER_MANAGEMENT: u8 = 0x01;
    /// Vital product data (7.9.19).
    pub const VPD: u8 = 0x03;
    /// Message signalled interrupts (7.7.1).
    pub const MSI: u8 = 0x05;
    /// Vendor-specific (7.9.4).
    pub const VENDOR: u8 = 0x09;
    /// PCI Express (7.5.3).
    pub const EXPRESS: u8 = 0x10;
    /// MSI-X (7.7.2).
    pub const MSIX: u8 = 0x11;
    /// Advanced features: a function-level reset for conventional PCI (7.9.22).
    pub const ADVANCED_FEATURES: u8 = 0x13;
}

/// A capability in the extended configuration space, from 256 on (7.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExtendedCapability {
    /// What it is.
    pub id: u16,
    /// The version of its layout, 0 to 15.
    pub version: u8,
    /// Where it is, in bytes: a multiple of four, 0x100 to 0xffc.
    pub offset: u16,
}

/// Ids of extended capabilities (PCI Code and ID Assignment Specification 1.11, 3).
impl ExtendedCapability {
    /// Nothing: only its pointer to the next one counts.
    pub const NULL: u16 = 0x00;
    /// Advanced error reporting (7.8.4).
    pub const AER: u16 = 0x01;
    /// Virtual channels (7.9.1).
    pub const VIRTUAL_CHANNEL: u16 = 0x02;
    /// Device serial number (7.9.3).
    pub const SERIAL_NUMBER: u16 = 0x03;
    /// Vendor-specific (7.9.5).
    pub const VENDOR: u16 = 0x0b;
    /// Access control services (7.7.8).
    pub const ACS: u16 = 0x0d;
    /// Alternative routing ID: more than eight functions (7.8.7).
    pub const ARI: u16 = 0x0e;
    /// Address translation services (10.5.1).
    pub const ATS: u16 = 0x0f;
    /// Single root I/O virtualisation (9.3.3).
    pub const SRIOV: u16 = 0x10;
    /// Page requests (10.5.2).
    pub const PRI: u16 = 0x13;
    /// BARs whose size software chooses (7.8.6).
    pub const RESIZABLE_BAR: u16 = 0x15;
    /// Hints for caches (7.9.13).
    pub const TPH: u16 = 0x17;
    /// Latency tolerance reporting (7.8.2).
    pub const LTR: u16 = 0x18;
    /// Process address spaces (7.8.8).
    pub const PASID: u16 = 0x1b;
    /// Downstream port containment (7.9.15).
    pub const DPC: u16 = 0x1d;
    /// Substates of a link's L1 (7.8.3).
    pub const L1_SUBSTATES: u16 = 0x1e;
    /// Precision time measurement (7.9.16).
    pub const PTM: u16 = 0x1f;
    /// Vendor-specific, of a group of vendors (7.9.6).
    pub const DESIGNATED_VENDOR: u16 = 0x23;
    /// Resizable BARs of virtual functions (9.3).
    pub const VF_RESIZABLE_BAR: u16 = 0x24;
}

/// Walks the capabilities of a function whose configuration space `read` reads, a dword at a time at offsets that are
/// multiples of four.
///
/// An error is the last item: what came before it is sound, and what would follow is out of reach. Bits 1:0 of a
/// pointer are ignored, as the specification asks of software.
pub fn capabilities(
    read: impl Fn(u16) -> u32,
) -> impl Iterator<Item = Result<Capability, CapabilityError>> {
    let status = Status::from_bits_retain((read(header::COMMAND) >> 16) as u16);
    let first = if status.contains(Status::CAPABILITIES) {
        read(header::CAPABILITIES)
    } else {
        0
    };
    let walk = Walk {
        read,
        space: header::END..EXTENDED_START,
        next_of: |header| (header >> 8 & 0xfc) as u16,
        from: header::CAPABILITIES,
        to: (first & 0xfc) as u16,
        visited: BTreeSet::new(),
    };
    walk.map(|found| {
        let (offset, header) = found?;
        Ok(Capability {
            id: (header & 0xff) as u8,
            offset: (offset & 0xff) as u8,
        })
    })
}

/// Walks the extended capabilities of a function, in the manner of [`capabilities`].
///
/// There are none where the first header is zero (7.6.1), and where it reads as all-ones, because the function has no
/// extended configuration space.
pub fn extended_capabilities(
    read: impl Fn(u16) -> u32,
) -> impl Iterator<Item = Result<ExtendedCapability, CapabilityError>> {
    let absent = matches!(read(EXTENDED_START), 0 | u32::MAX);
    let walk = Walk {
        read,
        space: EXTENDED_START..ConfigSpace::SIZE,
        next_of: |header| (header >> 20 & 0xffc) as u16,
        from: EXTENDED_START,
        to: if absent { 0 } else { EXTENDED_START },
        visited: BTreeSet::new(),
    };
    walk.map(|found| {
        let (offset, header) = found?;
        Ok(ExtendedCapability {
            id: (header & 0xffff) as u16,
            version: (header >> 16 & 0xf) as u8,
            offset,
        })
    })
}

/// Where the extended configuration space starts, with the first extended capability.
const EXTENDED_START: u16 = 0x100;

/// A walk over a list. It visits each dword of the list's space at most once, so it ends.
struct Walk<F> {
    read: F,
    space: Range<u16>,
    next_of: fn(u32) -> u16,
    from: u16,
    to: u16,
    visited: BTreeSet<u16>,
}

impl<F: Fn(u16) -> u32> Iterator for Walk<F> {
    /// A capability's offset and header.
    type Item = Result<(u16, u32), CapabilityError>;

    fn next(&mut self) -> Option<Self::Item> {
        let (from, to) = (self.from, mem::take(&mut self.to));
        if to == 0 {
            return None;
        }
        if !self.space.contains(&to) {
            return Some(Err(CapabilityError::Outside { from, to }));
        }
        if !self.visited.insert(to) {
            return Some(Err(CapabilityError::Loop { from, to }));
        }
        let header = (self.read)(to);
        if header == u32::MAX {
            return Some(Err(CapabilityError::NoAnswer { offset: to }));
        }
        self.from = to;
        self.to = (self.next_of)(header);
        Some(Ok((to, header)))
    }
}

/// What is wrong with a list of capabilities.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum CapabilityError {
    /// A pointer to where no capability of this list can be.
    #[error("the capability at {from:#x} points to {to:#x}, which is outside of its list's space")]
    Outside {
        /// Where the pointer is.
        from: u16,
        /// Where it points.
        to: u16,
    },
    /// A pointer to a capability that was in the list before.
    #[error("the capability at {from:#x} points back to {to:#x}")]
    Loop {
        /// Where the pointer is.
        from: u16,
        /// Where it points.
        to: u16,
    },
    /// A capability reads as all-ones: the device does not answer.
    #[error("there is no answer where the capability at {offset:#x} should be")]
    NoAnswer {
        /// Where the capability should be.
        offset: u16,
    },
    /// The capability to hide is not in the list.
    #[error("no capability at {offset:#x} is in the list")]
    NotFound {
        /// Where it was said to be.
        offset: u16,
    },
}

#[cfg(test)]
mod tests;
