//! Owns the memory mappings of the program: BARs, and buffers that the device reads and writes.
#![expect(
    unsafe_code,
    reason = "mapping memory, and reaching what somebody else changes"
)]

use std::fs::File;
use std::io;
use std::ptr::{self, NonNull};

use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

/// The integers that one access to a mapping can move.
pub(crate) trait Width: Copy {}
impl Width for u8 {}
impl Width for u16 {}
impl Width for u32 {}
impl Width for u64 {}

/// A mapping whose every access is one load or store of the CPU.
#[derive(Debug)]
pub(crate) struct Mapping {
    base: NonNull<u8>,
    len: usize,
}

impl Mapping {
    /// Maps the first `len` bytes of a file, such as a BAR's.
    pub(crate) fn of(file: &File, len: usize) -> io::Result<Self> {
        // SAFETY: a new mapping at an address of the kernel's choosing overlaps nothing that exists.
        let base = unsafe {
            mmap(
                ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                file,
                0,
            )
        }?;
        Self::at(base.cast(), len)
    }

    /// Memory that is in RAM and stays there.
    pub(crate) fn locked(len: usize) -> io::Result<Self> {
        let flags = MapFlags::PRIVATE | MapFlags::LOCKED | MapFlags::POPULATE;
        // SAFETY: a new mapping at an address of the kernel's choosing overlaps nothing that exists.
        let base = unsafe {
            mmap_anonymous(
                ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                flags,
            )
        }?;
        Self::at(base.cast(), len)
    }

    fn at(base: *mut u8, len: usize) -> io::Result<Self> {
        let base = NonNull::new(base).ok_or(io::ErrorKind::AddrNotAvailable)?;
        Ok(Self { base, len })
    }

    /// Where the mapping is in this process.
    pub(crate) fn address(&self) -> usize {
        self.base.as_ptr().addr()
    }

    /// One load from `offset`.
    ///
    /// # Panics
    /// When the access is not aligned or leaves the mapping.
    pub(crate) fn read<T: Width>(&self, offset: usize) -> T {
        // SAFETY: `slot` proves that the pointer is aligned and points to mapped memory, and every bit pattern is a T.
        unsafe { self.slot::<T>(offset).read_volatile() }
    }

    /// One store to `offset`.
    ///
    /// # Panics
    /// When the access is not aligned or leaves the mapping.
    pub(crate) fn write<T: Width>(&self, offset: usize, value: T) {
        // SAFETY: `slot` proves that the pointer is aligned and points to mapped memory, to which no reference exists.
        unsafe { self.slot::<T>(offset).write_volatile(value) }
    }

    fn slot<T: Width>(&self, offset: usize) -> *mut T {
        assert!(
            offset.is_multiple_of(size_of::<T>()),
            "{offset:#x} is not aligned"
        );
        assert!(
            offset < self.len && self.len - offset >= size_of::<T>(),
            "{offset:#x} is outside"
        );
        self.base.as_ptr().wrapping_add(offset).cast()
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: this value is the mapping's only owner, and lends no reference to it.
        let unmapped = unsafe { munmap(self.base.as_ptr().cast(), self.len) };
        debug_assert!(unmapped.is_ok());
    }
}
