//! The tree of functions that configuration requests find their way through.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::iter;
use std::ops::Range;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use thiserror::Error;

use crate::address::Bdf;
use crate::config::ConfigSpace;
use crate::endpoint::Endpoint;

/// A PCI segment: the buses that share one configuration space.
///
/// Functions come and go while vCPUs run. No lock is held while an endpoint is called, so an access that began before
/// its function was removed may still reach it.
#[derive(Debug)]
pub struct Segment {
    root: RwLock<Bus>,
}

impl Segment {
    /// A segment whose root bus is bus 0, with nothing on it.
    pub fn new() -> Self {
        Self {
            root: RwLock::new(Bus {
                number: 0,
                functions: BTreeMap::new(),
            }),
        }
    }

    /// Puts a function on its bus.
    pub fn insert(&self, bdf: Bdf, endpoint: Arc<dyn Endpoint>) -> Result<(), BusError> {
        let mut root = self.write();
        let bus = root.find_mut(bdf.bus()).ok_or(BusError::NoBus { bdf })?;
        match bus.functions.entry(device_function(bdf)) {
            Entry::Vacant(slot) => {
                slot.insert(Node::Endpoint(endpoint));
                Ok(())
            }
            Entry::Occupied(_) => Err(BusError::Taken { bdf }),
        }
    }

    /// Takes a function off its bus and returns it, if there is one.
    pub fn remove(&self, bdf: Bdf) -> Option<Arc<dyn Endpoint>> {
        let Node::Endpoint(endpoint) = self
            .write()
            .find_mut(bdf.bus())?
            .functions
            .remove(&device_function(bdf))?;
        Some(endpoint)
    }

    /// The function with this address, if there is one.
    pub fn endpoint(&self, bdf: Bdf) -> Option<Arc<dyn Endpoint>> {
        let root = self.read();
        let Node::Endpoint(endpoint) =
            root.find(bdf.bus())?.functions.get(&device_function(bdf))?;
        Some(Arc::clone(endpoint))
    }

    /// Every function, by ascending address.
    pub fn endpoints(&self) -> Vec<(Bdf, Arc<dyn Endpoint>)> {
        let root = self.read();
        root.endpoints()
            .map(|(bdf, endpoint)| (bdf, Arc::clone(endpoint)))
            .collect()
    }

    /// The lowest device number with no function on this bus; `None` if it is full or not there.
    pub fn free_device(&self, bus: u8) -> Option<u8> {
        let root = self.read();
        let functions = &root.find(bus)?.functions;
        (0..32).find(|device| {
            functions
                .range(device << 3..=device << 3 | 0x7)
                .next()
                .is_none()
        })
    }

    /// Reads a function's configuration space. What there is not reads as all-ones: an absent function, or bytes past
    /// the end of its space.
    pub fn config_read(&self, bdf: Bdf, offset: u16, data: &mut [u8]) {
        data.fill(0xff);
        let Some(endpoint) = self.endpoint(bdf) else {
            return;
        };
        for (offset, range) in naturally_aligned(offset, data.len()) {
            if let Some(part) = data.get_mut(range) {
                endpoint.config_read(offset, part);
            }
        }
    }

    /// Writes a function's configuration space. What goes to an absent function, or past the end of its space, is
    /// dropped.
    pub fn config_write(&self, bdf: Bdf, offset: u16, data: &[u8]) {
        let Some(endpoint) = self.endpoint(bdf) else {
            return;
        };
        for (offset, range) in naturally_aligned(offset, data.len()) {
            if let Some(part) = data.get(range) {
                endpoint.config_write(offset, part);
            }
        }
    }

    fn read(&self) -> RwLockReadGuard<'_, Bus> {
        self.root.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Bus> {
        self.root.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for Segment {
    fn default() -> Self {
        Self::new()
    }
}

/// Splits an access to configuration space into naturally aligned ones of 1, 2 or 4 bytes, as few as can be: the
/// offset of each, and which bytes of the access it has. Bytes past the end of the space are left out.
fn naturally_aligned(offset: u16, length: usize) -> impl Iterator<Item = (u16, Range<usize>)> {
    let end = usize::from(offset)
        .saturating_add(length)
        .min(usize::from(ConfigSpace::SIZE));
    let mut next = offset;
    iter::from_fn(move || {
        let at = next;
        let left = end.saturating_sub(usize::from(at));
        let size = [4, 2, 1]
            .into_iter()
            .find(|&size| at.is_multiple_of(size) && usize::from(size) <= left)?;
        next += size;
        Some((at, usize::from(at - offset)..usize::from(next - offset)))
    })
}

/// A bus, and the functions on it by device and function number, as in the low byte of a [`Bdf`].
#[derive(Debug)]
struct Bus {
    number: u8,
    functions: BTreeMap<u8, Node>,
}

/// What can be on a bus.
#[derive(Debug)]
enum Node {
    Endpoint(Arc<dyn Endpoint>),
}

impl Bus {
    /// This bus or the one below it with this number.
    fn find(&self, number: u8) -> Option<&Self> {
        (self.number == number).then_some(self)
    }

    fn find_mut(&mut self, number: u8) -> Option<&mut Self> {
        (self.number == number).then_some(self)
    }

    /// The endpoints on this bus and those below it, by ascending address.
    fn endpoints(&self) -> impl Iterator<Item = (Bdf, &Arc<dyn Endpoint>)> {
        self.functions
            .iter()
            .map(|(&device_function, Node::Endpoint(endpoint))| {
                let bdf = Bdf::from_bits(u16::from_be_bytes([self.number, device_function]));
                (bdf, endpoint)
            })
    }
}

fn device_function(bdf: Bdf) -> u8 {
    let [_bus, device_function] = bdf.bits().to_be_bytes();
    device_function
}

/// Why a function cannot be put on a bus.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum BusError {
    /// There is no bus with this number.
    #[error("{bdf} is on a bus that does not exist")]
    NoBus {
        /// Where the function should be.
        bdf: Bdf,
    },
    /// There is a function with this address.
    #[error("{bdf} is taken")]
    Taken {
        /// Where the function should be.
        bdf: Bdf,
    },
}

#[cfg(test)]
mod tests;
