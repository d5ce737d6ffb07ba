//! Who reaches guest memory by DMA.

use std::fmt;
use std::os::fd::BorrowedFd;

use crate::backend::BackendError;

/// Whatever translates devices' accesses to guest memory: an IOMMU container that many devices share, or the process at
/// the other end of one vfio-user connection.
pub trait DmaTarget: Send + Sync + fmt::Debug {
    /// Lets the device read and write guest memory.
    fn map(&self, mapping: &Mapping<'_>) -> Result<(), BackendError>;

    /// Takes `size` bytes at `iova`, mapped before in one piece, from the device. When this returns, the device no
    /// longer uses them or is gone.
    fn unmap(&self, iova: u64, size: u64) -> Result<(), BackendError>;
}

/// A piece of guest memory, told in both ways that a target may want it: as memory of this process, and as a part of a
/// file that another process or the kernel can map.
#[derive(Debug, Clone, Copy)]
pub struct Mapping<'a> {
    /// Where the device finds it: the guest physical address.
    pub iova: u64,
    /// Its length in bytes.
    pub size: u64,
    /// Where this process has it mapped.
    pub address: *const u8,
    /// The file that holds it, and the offset in that file in bytes.
    pub file: (BorrowedFd<'a>, u64),
}
