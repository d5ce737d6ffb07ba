//! Guest memory as packets use it: mapped, or reached by messages.

use vfio_user_server::{Memory, PageLog, View};
use vm_memory::bitmap::BS;
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, Permissions, VolatileSlice};

use crate::virtio::Chain;

/// Some of guest memory that is mapped.
pub(super) type GuestSlice<'v> = VolatileSlice<'v, BS<'v, PageLog>>;

/// Some of guest memory, as the driver says. The address may be anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    pub(super) address: u64,
    pub(super) length: usize,
}

/// Most descriptors of a chain that are looked at.
const MAX_DESCRIPTORS: usize = 1024;

/// What of a chain the device may write, or what it may read, without empty pieces.
pub(super) fn segments(chain: Chain<'_>, writable: bool) -> Vec<Segment> {
    let wanted = chain
        .take(MAX_DESCRIPTORS)
        .filter(|descriptor| descriptor.is_write_only() == writable && descriptor.len() > 0);
    let segments = wanted.map(|descriptor| Segment {
        address: descriptor.addr().0,
        length: usize::try_from(descriptor.len()).unwrap_or(0),
    });
    segments.collect()
}

/// How many bytes there are in segments.
pub(super) fn length(segments: &[Segment]) -> usize {
    segments.iter().map(|segment| segment.length).sum()
}

/// Guest memory during a batch.
#[derive(Clone, Copy, Debug)]
pub(super) struct Guest<'v> {
    pub(super) view: &'v View,
    pub(super) memory: &'v Memory,
}

impl<'v> Guest<'v> {
    /// Where segments are in this process. `None` if not all of them are mapped.
    pub(super) fn slices(&self, segments: &[Segment]) -> Option<Vec<GuestSlice<'v>>> {
        let view: &'v GuestMemoryMmap<PageLog> = self.view;
        let mut found = Vec::with_capacity(segments.len());
        for segment in segments {
            let address = GuestAddress(segment.address);
            let slices = view.get_slices(address, segment.length, Permissions::ReadWrite);
            for slice in slices.ok()? {
                found.push(slice.ok()?);
            }
        }
        Some(found)
    }

    /// Reads segments, from their beginning on, until `data` is full, and returns whether it is.
    pub(super) fn gather(&self, segments: &[Segment], data: &mut [u8]) -> bool {
        let mut rest = data;
        for segment in segments {
            let (piece, next) = rest.split_at_mut(segment.length.min(rest.len()));
            // What the view has stays readable when the client takes it away; what it has not may still be there.
            let from_view = self.view.read_slice(piece, GuestAddress(segment.address));
            if from_view.is_err() && self.memory.read(segment.address, piece).is_err() {
                return false;
            }
            rest = next;
        }
        rest.is_empty()
    }

    /// Writes all of `data` to segments, from their beginning on. What cannot be written is not.
    pub(super) fn scatter<'s>(&self, segments: impl Iterator<Item = &'s Segment>, data: &[u8]) {
        let mut rest = data;
        for segment in segments {
            let (piece, next) = rest.split_at(segment.length.min(rest.len()));
            let to_view = self.view.write_slice(piece, GuestAddress(segment.address));
            if to_view.is_err()
                && let Err(error) = self.memory.write(segment.address, piece)
            {
                log::debug!("a part of a packet is lost: {error}");
            }
            rest = next;
            if rest.is_empty() {
                return;
            }
        }
    }
}
