//! Guest memory as a device uses it: mapped, or reached by messages.

use vfio_user_server::{Memory, PageLog, View};
use virtio_queue::desc::split::Descriptor;
use vm_memory::bitmap::BS;
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, Permissions, VolatileSlice};

use super::queue::Chain;

/// Some of guest memory that is mapped.
pub type GuestSlice<'g> = VolatileSlice<'g, BS<'g, PageLog>>;

/// Some of guest memory, as the driver says. The address may be anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Where it begins.
    pub address: u64,
    /// Bytes in it.
    pub length: usize,
}

/// Most descriptors of a chain that are looked at.
pub const MAX_DESCRIPTORS: usize = 1024;

impl From<Descriptor> for Segment {
    fn from(descriptor: Descriptor) -> Self {
        Self {
            address: descriptor.addr().0,
            length: usize::try_from(descriptor.len()).unwrap_or(usize::MAX),
        }
    }
}

/// What of a chain the device may write, or what it may read, without empty pieces.
pub fn segments(chain: Chain<'_>, writable: bool) -> Vec<Segment> {
    let wanted = chain
        .take(MAX_DESCRIPTORS)
        .filter(|descriptor| descriptor.is_write_only() == writable && descriptor.len() > 0);
    wanted.map(Segment::from).collect()
}

/// How many bytes there are in segments.
pub fn length(segments: &[Segment]) -> usize {
    let lengths = segments.iter().map(|segment| segment.length);
    lengths.fold(0, usize::saturating_add)
}

/// Guest memory while a batch or a request is served.
#[derive(Clone, Debug)]
pub struct Guest {
    /// What is mapped, and stays so.
    pub view: View,
    memory: Memory,
}

impl Guest {
    pub(super) fn new(memory: &Memory) -> Self {
        Self {
            view: memory.view(),
            memory: memory.clone(),
        }
    }

    /// Where segments are in this process. `None` if not all of them are mapped.
    pub fn slices(&self, segments: &[Segment]) -> Option<Vec<GuestSlice<'_>>> {
        let view: &GuestMemoryMmap<PageLog> = &self.view;
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

    /// Reads memory, and returns whether it could.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        // What the view has stays readable when the client takes it away; what it has not may still be there.
        let from_view = self.view.read_slice(data, GuestAddress(address));
        from_view.is_ok() || self.memory.read(address, data).is_ok()
    }

    /// Writes memory, and returns whether it could.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        let to_view = self.view.write_slice(data, GuestAddress(address));
        to_view.is_ok() || self.memory.write(address, data).is_ok()
    }

    /// Reads segments, from their beginning on, until `data` is full, and returns whether it is.
    pub fn gather(&self, segments: &[Segment], data: &mut [u8]) -> bool {
        let mut rest = data;
        for segment in segments {
            let (piece, next) = rest.split_at_mut(segment.length.min(rest.len()));
            if !self.read(segment.address, piece) {
                return false;
            }
            rest = next;
            if rest.is_empty() {
                break;
            }
        }
        rest.is_empty()
    }

    /// Writes all of `data` to segments, from their beginning on, and returns whether it could.
    pub fn scatter<'s>(
        &self,
        segments: impl IntoIterator<Item = &'s Segment>,
        data: &[u8],
    ) -> bool {
        let mut rest = data;
        for segment in segments {
            let (piece, next) = rest.split_at(segment.length.min(rest.len()));
            if !self.write(segment.address, piece) {
                return false;
            }
            rest = next;
            if rest.is_empty() {
                break;
            }
        }
        rest.is_empty()
    }
}
