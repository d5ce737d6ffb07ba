//! One packet between a descriptor and guest memory, without a copy in between.
#![expect(
    unsafe_code,
    reason = "the kernel is given addresses of guest memory, which no reference may be to"
)]

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use libc::{c_int, iovec};
use vm_memory::bitmap::Bitmap;

use crate::virtio::guest::GuestSlice;

/// Most pieces of guest memory that a packet can be in: what the kernel takes at once (`UIO_MAXIOV`), but for the one of
/// this process's own.
pub(super) const MAX_SLICES: usize = 1023;

/// Reads a packet into guest memory, and what there is no room for into `rest`. Returns how long it is: neither more nor
/// less than one packet is read at a time. What of it is in guest memory is logged for migration.
pub(super) fn read<'a, 'v: 'a>(
    fd: &impl AsFd,
    slices: impl Iterator<Item = &'a GuestSlice<'v>> + Clone,
    rest: &mut [u8],
) -> io::Result<usize> {
    let mut iovecs: Vec<_> = slices.clone().map(guest_iovec).collect();
    iovecs.push(iovec {
        iov_base: rest.as_mut_ptr().cast(),
        iov_len: rest.len(),
    });
    // SAFETY: the descriptor is open while it is borrowed. Each piece is mapped and can be written while its slice is
    // there, or is `rest`. Nobody here has a reference to guest memory, and the kernel is done when it returns.
    let result = unsafe { libc::readv(fd.as_fd().as_raw_fd(), iovecs.as_ptr(), count(&iovecs)) };
    let length = outcome(result)?;
    let mut unmarked = length;
    for slice in slices {
        let written = slice.len().min(unmarked);
        slice.bitmap().mark_dirty(0, written);
        unmarked -= written;
    }
    Ok(length)
}

/// Writes a packet that is in guest memory.
pub(super) fn write(fd: &impl AsFd, slices: &[GuestSlice<'_>]) -> io::Result<usize> {
    let iovecs: Vec<_> = slices.iter().map(guest_iovec).collect();
    // SAFETY: as for `read`, but that the kernel reads the pieces.
    let result = unsafe { libc::writev(fd.as_fd().as_raw_fd(), iovecs.as_ptr(), count(&iovecs)) };
    outcome(result)
}

fn guest_iovec(slice: &GuestSlice<'_>) -> iovec {
    iovec {
        iov_base: slice.ptr_guard_mut().as_ptr().cast(),
        iov_len: slice.len(),
    }
}

/// How many there are. Too many are refused by the kernel.
fn count(iovecs: &[iovec]) -> c_int {
    c_int::try_from(iovecs.len()).unwrap_or(c_int::MAX)
}

fn outcome(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}
