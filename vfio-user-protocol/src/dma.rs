//! Guest memory: `DMA_MAP` and `DMA_UNMAP`, and the device's own `DMA_READ` and `DMA_WRITE`.

use bitflags::bitflags;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::argsz;

/// Payload of `DMA_MAP`. The reply has none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct DmaMap {
    /// Size of this struct, in bytes.
    pub argsz: u32,
    /// See [`DmaMapFlags`].
    pub flags: u32,
    /// Where in the file that comes with the message the memory begins, in bytes; 0 without a file.
    pub offset: u64,
    /// First address of the memory as the device sees it.
    pub address: u64,
    /// Size of the memory in bytes.
    pub size: u64,
}

impl DmaMap {
    /// The command's payload for `size` bytes at `address`, which are at `offset` of the file sent with it.
    pub fn new(address: u64, size: u64, offset: u64, flags: DmaMapFlags) -> Self {
        Self {
            argsz: argsz::<Self>(),
            flags: flags.bits(),
            offset,
            address,
            size,
        }
    }
}

bitflags! {
    /// What the device may do with the memory.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct DmaMapFlags: u32 {
        /// The device may read the memory.
        const READ = 1 << 0;
        /// The device may write the memory.
        const WRITE = 1 << 1;
    }
}

/// Payload of `DMA_UNMAP`, in both directions.
///
/// libvfio-user answers a device without DMA with an empty payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct DmaUnmap {
    /// Size in bytes of the largest reply payload that is wanted.
    pub argsz: u32,
    /// See [`DmaUnmapFlags`].
    pub flags: u32,
    /// First address of the memory, as it was mapped.
    pub address: u64,
    /// Size of the memory in bytes, as it was mapped.
    pub size: u64,
}

impl DmaUnmap {
    /// The payload that unmaps one mapping.
    pub fn new(address: u64, size: u64) -> Self {
        Self {
            argsz: argsz::<Self>(),
            flags: 0,
            address,
            size,
        }
    }

    /// The payload that unmaps everything. libvfio-user knows it; the specification does not.
    pub fn all() -> Self {
        Self {
            flags: DmaUnmapFlags::ALL.bits(),
            ..Self::new(0, 0)
        }
    }
}

bitflags! {
    /// Extensions of `DMA_UNMAP` by libvfio-user, with the bits of `VFIO_DMA_UNMAP_FLAG_*` in `linux/vfio.h`. The
    /// specification, since version 0.9.2, has none.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct DmaUnmapFlags: u32 {
        /// A [`DirtyBitmap`] follows the payload; the reply holds the bitmap too.
        const GET_DIRTY_BITMAP = 1 << 0;
        /// Unmap everything; address and size must be 0.
        const ALL = 1 << 1;
    }
}

/// What follows a [`DmaUnmap`] with [`DmaUnmapFlags::GET_DIRTY_BITMAP`]; in the reply, the bitmap comes after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct DirtyBitmap {
    /// Bytes that a bit stands for.
    pub page_size: u64,
    /// Size of the bitmap in bytes.
    pub size: u64,
}

/// Head of the payload of `DMA_READ` and `DMA_WRITE`, in both directions.
///
/// The specification's table shows a `DMA_WRITE` reply with a count of four bytes. libvfio-user and everybody who
/// talks to it use eight, and drop the connection on twelve-byte payloads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct DmaAccess {
    /// Address of the first byte, as mapped.
    pub address: u64,
    /// Number of bytes.
    pub count: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dma_map_has_the_layout_of_the_specification() {
        let map = DmaMap::new(
            0x1_0000_0000,
            0x20_0000,
            0x1000,
            DmaMapFlags::READ | DmaMapFlags::WRITE,
        );
        let bytes = [
            32, 0, 0, 0, 3, 0, 0, 0, // argsz, flags
            0, 0x10, 0, 0, 0, 0, 0, 0, // offset
            0, 0, 0, 0, 1, 0, 0, 0, // address
            0, 0, 0x20, 0, 0, 0, 0, 0, // size
        ];
        assert_eq!(map.as_bytes(), bytes);
    }

    #[test]
    fn dma_unmap_has_the_layout_of_the_specification() {
        let bytes = [
            24, 0, 0, 0, 0, 0, 0, 0, // argsz, flags
            0, 0x10, 0, 0, 0, 0, 0, 0, // address
            0, 0x20, 0, 0, 0, 0, 0, 0, // size
        ];
        assert_eq!(DmaUnmap::new(0x1000, 0x2000).as_bytes(), bytes);
        let mut all = [0; 24];
        (all[0], all[4]) = (24, 2);
        assert_eq!(DmaUnmap::all().as_bytes(), all);
    }

    #[test]
    fn dirty_bitmap_has_the_layout_of_libvfio_user() {
        let bitmap = DirtyBitmap {
            page_size: 4096,
            size: 32,
        };
        assert_eq!(
            bitmap.as_bytes(),
            [0, 0x10, 0, 0, 0, 0, 0, 0, 32, 0, 0, 0, 0, 0, 0, 0]
        );
    }

    #[test]
    fn dma_access_counts_in_eight_bytes() {
        let access = DmaAccess {
            address: 0x1234,
            count: 0x400,
        };
        assert_eq!(
            access.as_bytes(),
            [0x34, 0x12, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0]
        );
    }
}
