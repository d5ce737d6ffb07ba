//! Guest memory that the device may access.

use std::os::fd::BorrowedFd;
use std::sync::atomic::Ordering;

use vfio_user_protocol::{Command, DmaMap, DmaMapFlags, DmaUnmap};
use zerocopy::IntoBytes;

use crate::calls::Expected;
use crate::client::Client;
use crate::connection::Request;
use crate::error::ConnError;

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
    /// takes, and those that every call has.
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
        if self.maps.fetch_add(1, Ordering::Relaxed) >= self.limits.max_dma_maps {
            self.maps.fetch_sub(1, Ordering::Relaxed);
            return Err(ConnError::Limit("it takes no more mappings"));
        }
        let mapped = self.call(&request, self.deadlines.dma_map).map(drop);
        if let Err(ConnError::Refused { .. }) = mapped {
            self.maps.fetch_sub(1, Ordering::Relaxed);
        }
        mapped
    }

    /// Takes back memory that was given with exactly this address and size. When this returns, the device does not
    /// access it any more, unless the error is [`ConnError::TimedOut`] or [`ConnError::Refused`].
    ///
    /// # Errors
    ///
    /// [`ConnError`], as for every call.
    pub fn dma_unmap(&self, iova: u64, size: u64) -> Result<(), ConnError> {
        self.unmap(&DmaUnmap::new(iova, size))?;
        // It cannot fall below 0 but by unmapping what was not mapped, which a server refuses.
        let less = |maps: usize| Some(maps.saturating_sub(1));
        let _ = self
            .maps
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
        Ok(())
    }

    /// Takes back all memory. Only libvfio-user is known to understand this.
    ///
    /// # Errors
    ///
    /// [`ConnError`], as for every call.
    pub fn dma_unmap_all(&self) -> Result<(), ConnError> {
        self.unmap(&DmaUnmap::all())?;
        self.maps.store(0, Ordering::Relaxed);
        Ok(())
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
