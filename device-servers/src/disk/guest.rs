//! Guest memory as requests reach it: mapped or by messages.

use vfio_user_server::{Memory, View};
use vm_memory::{Bytes, GuestAddress};

use super::request::Segment;

/// Guest memory while a request is served.
#[derive(Clone, Copy, Debug)]
pub(super) struct Guest<'a> {
    pub(super) view: &'a View,
    pub(super) memory: &'a Memory,
}

impl Guest<'_> {
    /// Reads memory, and returns whether it could.
    pub(super) fn read(&self, address: u64, data: &mut [u8]) -> bool {
        // What the view has stays readable when the client takes it away; what it has not may still be there.
        let from_view = self.view.read_slice(data, GuestAddress(address));
        from_view.is_ok() || self.memory.read(address, data).is_ok()
    }

    /// Writes memory, and returns whether it could.
    pub(super) fn write(&self, address: u64, data: &[u8]) -> bool {
        let to_view = self.view.write_slice(data, GuestAddress(address));
        to_view.is_ok() || self.memory.write(address, data).is_ok()
    }

    /// Reads segments, from their beginning on, until `data` is full, and returns whether it is.
    pub(super) fn gather(&self, segments: &[Segment], data: &mut [u8]) -> bool {
        let mut rest = data;
        for segment in segments {
            let length = length(segment).min(rest.len());
            let (piece, next) = rest.split_at_mut(length);
            if !self.read(segment.address, piece) {
                return false;
            }
            rest = next;
        }
        rest.is_empty()
    }

    /// Writes all of `data` to segments, from their beginning on, and returns whether it could.
    pub(super) fn scatter(&self, segments: &[Segment], data: &[u8]) -> bool {
        let mut rest = data;
        for segment in segments {
            let (piece, next) = rest.split_at(length(segment).min(rest.len()));
            if !self.write(segment.address, piece) {
                return false;
            }
            rest = next;
        }
        rest.is_empty()
    }
}

fn length(segment: &Segment) -> usize {
    usize::try_from(segment.length).unwrap_or(usize::MAX)
}
