//! Guest memory that the device may access.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use vfio_user_protocol::{Command, DmaMap, DmaMapFlags, DmaUnmap};
use zerocopy::IntoBytes;

use crate::calls::Expected;
use crate::client::Client;
use crate::connection::Request;
use crate::error::ConnError;
use crate::setup::Map;

/// What the device may do with memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DmaAccess {
    /// Read it.
    ReadOnly,
    /// Read and write it.
    ReadWrite,
}

impl Client {
    /// Gives the device access to `size` bytes of memory, which it is to see at `iova`.
    ///
    /// The server maps `file` at the offset that comes with it, in bytes. Without a file, or if the server takes no
    /// descriptors, the device's accesses come through [`GuestDma`](crate::GuestDma).
    ///
    /// # Errors
    ///
    /// [`ConnError::Limit`] if the server has no page size of which the range consists, or as many mappings as it
    /// takes, [`ConnError::System`] if this process can have no more descriptors, and those that every call has.
    pub fn dma_map(
        &self,
        iova: u64,
        size: u64,
        file: Option<(BorrowedFd<'_>, u64)>,
        access: DmaAccess,
    ) -> Result<(), ConnError> {
        let smallest_page = 1 << self.limits.page_sizes.trailing_zeros();
        if !(iova | size).is_multiple_of(smallest_page) {
            return Err(ConnError::Limit("its pages are larger than the mapping's"));
        }
        let flags = match access {
            DmaAccess::ReadOnly => DmaMapFlags::READ,
            DmaAccess::ReadWrite => DmaMapFlags::READ | DmaMapFlags::WRITE,
        };
        let file = file.filter(|_| self.limits.max_msg_fds > 0);
        let offset = file.map_or(0, |(_, offset)| offset);
        let map = DmaMap::new(iova, size, offset, flags);
        let fd = file.map(|(fd, _)| fd);
        let request = Request {
            command: Command::DmaMap,
            head: map.as_bytes(),
            data: &[],
            fds: fd.as_slice(),
            expected: Expected { payload: 0, fds: 0 },
        };
        if self.lock_setup().maps() >= self.limits.max_dma_maps {
            return Err(ConnError::Limit("it takes no more mappings"));
        }
        let kept = fd.map(|fd| fd.try_clone_to_owned()).transpose();
        let kept = kept.map_err(ConnError::System)?;
        self.call(&request, self.deadlines.dma_map)?;
        let file = kept.map(|file| (Arc::new(file), offset));
        self.lock_setup().add_map(iova, Map { size, file, access });
        Ok(())
    }

    /// Takes back memory that was given with exactly this address and size. When this returns, the device does not
    /// access it any more, unless the error is [`ConnError::TimedOut`] or [`ConnError::Refused`].
    ///
    /// # Errors
    ///
    /// [`ConnError`], as for every call.
    pub fn dma_unmap(&self, iova: u64, size: u64) -> Result<(), ConnError> {
        let unmapped = self.unmap(&DmaUnmap::new(iova, size));
        if is_gone(&unmapped) {
            self.lock_setup().remove_map(iova);
        }
        unmapped
    }

    /// Takes back all memory. Only libvfio-user is known to understand this.
    ///
    /// # Errors
    ///
    /// [`ConnError`], as for every call.
    pub fn dma_unmap_all(&self) -> Result<(), ConnError> {
        let unmapped = self.unmap(&DmaUnmap::all());
        if is_gone(&unmapped) {
            self.lock_setup().remove_maps();
        }
        unmapped
    }

    fn unmap(&self, unmap: &DmaUnmap) -> Result<(), ConnError> {
        let request = Request {
            command: Command::DmaUnmap,
            head: unmap.as_bytes(),
            data: &[],
            fds: &[],
            // Some servers echo the payload, others don't. It says nothing new.
            expected: Expected {
                payload: size_of::<DmaUnmap>(),
                fds: 0,
            },
        };
        self.call(&request, self.deadlines.dma_map).map(drop)
    }
}

/// Whether the device cannot have the memory any more, now that taking it back has ended like this.
fn is_gone(unmapped: &Result<(), ConnError>) -> bool {
    matches!(unmapped, Ok(()) | Err(ConnError::Lost(_)))
}
