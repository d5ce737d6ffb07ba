//! Regions: `DEVICE_GET_REGION_INFO`, `REGION_READ`, `REGION_WRITE` and `REGION_WRITE_MULTI`.

use bitflags::bitflags;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::{ProtocolError, argsz, take};

/// Head of the payload of `DEVICE_GET_REGION_INFO`, in both directions.
///
/// In the reply, capabilities may follow, of which [`sparse_areas`] reads the one that matters, and a file may come
/// with the message.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct RegionInfo {
    /// Command: bytes of reply payload that are wanted. Reply: bytes that there are. If there are more than were
    /// wanted, the reply is this struct alone, without capabilities or file.
    pub argsz: u32,
    /// See [`RegionFlags`].
    pub flags: u32,
    /// Number of the region.
    pub index: u32,
    /// Offset of the first capability from the start of this struct in bytes, or 0.
    pub cap_offset: u32,
    /// Size of the region in bytes; 0 if the device has no such region.
    pub size: u64,
    /// Where in the file the region begins, in bytes.
    pub offset: u64,
}

impl RegionInfo {
    /// The command's payload, for a reply payload of up to `argsz` bytes.
    pub fn query(index: u32, argsz: u32) -> Self {
        Self {
            argsz,
            index,
            ..Self::default()
        }
    }
}

bitflags! {
    /// What can be done with a region (`VFIO_REGION_INFO_FLAG_*` of `linux/vfio.h`).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct RegionFlags: u32 {
        /// The region can be read.
        const READ = 1 << 0;
        /// The region can be written.
        const WRITE = 1 << 1;
        /// The region, or parts of it, can be mapped.
        const MMAP = 1 << 2;
        /// Capabilities follow.
        const CAPS = 1 << 3;
    }
}

/// A part of a region that can be mapped. On the wire as in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct SparseArea {
    /// Offset in the region, in bytes.
    pub offset: u64,
    /// Size in bytes.
    pub size: u64,
}

/// The mappable areas that a reply to `DEVICE_GET_REGION_INFO` lists in its capabilities.
///
/// `payload` is the whole reply payload. `None` means that there is no such list, so that a mappable region is mappable
/// from end to end. Areas are as the peer sent them: whether they lie in the region is the caller's to check.
///
/// # Errors
///
/// [`ProtocolError`] if the payload is short, or the chain of capabilities leaves it, does not advance, or holds more
/// than 32 of them, or the list of areas does not fit.
pub fn sparse_areas(payload: &[u8]) -> Result<Option<Vec<SparseArea>>, ProtocolError> {
    let (info, _) = take::<RegionInfo>(payload)?;
    if !RegionFlags::from_bits_retain(info.flags).contains(RegionFlags::CAPS) {
        return Ok(None);
    }
    let mut offset = info.cap_offset;
    let mut end_of_last = argsz::<RegionInfo>();
    for _ in 0..MAX_CAPABILITIES {
        if offset == 0 {
            return Ok(None);
        }
        // Each capability must come after the one before it, which no loop can do.
        if offset < end_of_last {
            return Err(ProtocolError::CapabilityChain(offset));
        }
        let bytes = usize::try_from(offset)
            .ok()
            .and_then(|offset| payload.get(offset..))
            .ok_or(ProtocolError::CapabilityChain(offset))?;
        let (header, rest) = take::<CapabilityHeader>(bytes)?;
        if header.id == SPARSE_MMAP {
            return areas(rest).map(Some);
        }
        end_of_last = offset.saturating_add(argsz::<CapabilityHeader>());
        offset = header.next;
    }
    Err(ProtocolError::CapabilityChain(offset))
}

/// Reads a list of areas, the body of a sparse mmap capability.
fn areas(body: &[u8]) -> Result<Vec<SparseArea>, ProtocolError> {
    let (list, mut rest) = take::<SparseList>(body)?;
    let count = usize::try_from(list.count).unwrap_or(usize::MAX);
    if count > rest.len() / size_of::<SparseArea>() {
        return Err(ProtocolError::SparseAreas(list.count));
    }
    let mut areas = Vec::with_capacity(count);
    for _ in 0..count {
        let (area, next) = take::<SparseArea>(rest)?;
        areas.push(area);
        rest = next;
    }
    Ok(areas)
}

/// Appends the payload of a reply to `DEVICE_GET_REGION_INFO` that lists `areas` as the mappable ones.
///
/// The size, the flags that say so and the offset of the list are filled in. If the payload has more than `room` bytes,
/// which is what the command's `argsz` says, the list is left out, and the size tells how much room it takes.
pub fn encode_sparse_areas(
    info: &RegionInfo,
    areas: &[SparseArea],
    room: u32,
    payload: &mut Vec<u8>,
) {
    let size = size_of::<RegionInfo>()
        + size_of::<CapabilityHeader>()
        + size_of::<SparseList>()
        + size_of_val(areas);
    let mut info = *info;
    info.argsz = u32::try_from(size).unwrap_or(u32::MAX);
    info.flags |= RegionFlags::MMAP.bits();
    if info.argsz > room {
        payload.extend_from_slice(info.as_bytes());
        return;
    }
    info.flags |= RegionFlags::CAPS.bits();
    info.cap_offset = argsz::<RegionInfo>();
    let header = CapabilityHeader {
        id: SPARSE_MMAP,
        _version: 1,
        next: 0,
    };
    let list = SparseList {
        count: u32::try_from(areas.len()).unwrap_or(u32::MAX),
        _reserved: 0,
    };
    payload.extend_from_slice(info.as_bytes());
    payload.extend_from_slice(header.as_bytes());
    payload.extend_from_slice(list.as_bytes());
    payload.extend_from_slice(areas.as_bytes());
}

/// The head of a capability (`struct vfio_info_cap_header` of `linux/vfio.h`).
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct CapabilityHeader {
    id: u16,
    _version: u16,
    /// Offset of the next capability from the start of the region information, or 0.
    next: u32,
}

/// The head of the body of a sparse mmap capability.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct SparseList {
    count: u32,
    _reserved: u32,
}

/// `VFIO_REGION_INFO_CAP_SPARSE_MMAP` of `linux/vfio.h`.
const SPARSE_MMAP: u16 = 1;

/// More capabilities than any region has: `linux/vfio.h` defines six.
const MAX_CAPABILITIES: usize = 32;

/// Head of the payload of `REGION_READ` and `REGION_WRITE`, in both directions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct RegionAccess {
    /// Offset in the region, in bytes.
    pub offset: u64,
    /// Number of the region.
    pub region: u32,
    /// Number of bytes.
    pub count: u32,
}

/// Head of the payload of `REGION_WRITE_MULTI`, and its reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct RegionWrites {
    /// Command: writes that follow. Reply: writes that were done.
    pub count: u64,
}

/// One write of a `REGION_WRITE_MULTI`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct WriteMulti {
    /// Where to, and how many bytes: at most 8.
    pub access: RegionAccess,
    /// The bytes; those beyond the count mean nothing.
    pub data: [u8; 8],
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn region_info_has_the_layout_of_the_specification() {
        let info = RegionInfo {
            argsz: 64,
            flags: 0xf,
            index: 7,
            cap_offset: 32,
            size: 0x1_0000,
            offset: 0x70_0000,
        };
        let bytes = [
            64, 0, 0, 0, 15, 0, 0, 0, 7, 0, 0, 0, 32, 0, 0, 0, // four words
            0, 0, 1, 0, 0, 0, 0, 0, // size
            0, 0, 0x70, 0, 0, 0, 0, 0, // offset
        ];
        assert_eq!(info.as_bytes(), bytes);
    }

    #[test]
    fn region_access_has_the_layout_of_the_specification() {
        let access = RegionAccess {
            offset: 0x1008,
            region: 2,
            count: 4,
        };
        let bytes = [8, 0x10, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 4, 0, 0, 0];
        assert_eq!(access.as_bytes(), bytes);
    }

    #[test]
    fn write_multi_has_the_layout_of_the_specification() {
        let write = WriteMulti {
            access: RegionAccess {
                offset: 0x10,
                region: 1,
                count: 2,
            },
            data: [0xaa, 0xbb, 0, 0, 0, 0, 0, 0],
        };
        let bytes = [
            0x10, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 0xaa, 0xbb, 0, 0, 0, 0, 0, 0,
        ];
        assert_eq!(write.as_bytes(), bytes);
        assert_eq!(
            RegionWrites { count: 3 }.as_bytes(),
            [3, 0, 0, 0, 0, 0, 0, 0]
        );
    }

    /// A reply payload: region information and the words of capabilities that follow it.
    fn payload(cap_offset: u32, words: &[u32]) -> Vec<u8> {
        let info = RegionInfo {
            argsz: 32,
            flags: RegionFlags::CAPS.bits(),
            cap_offset,
            ..RegionInfo::default()
        };
        let mut payload = info.as_bytes().to_vec();
        payload.extend(words.iter().flat_map(|word| word.to_ne_bytes()));
        payload
    }

    #[test]
    fn a_list_of_areas_has_the_layout_of_the_specification() {
        let info = RegionInfo {
            flags: 3,
            index: 2,
            size: 0x4000,
            ..RegionInfo::default()
        };
        let areas = [SparseArea {
            offset: 0x1000,
            size: 0x2000,
        }];
        let mut payload = Vec::new();
        encode_sparse_areas(&info, &areas, 64, &mut payload);
        let bytes = [
            64, 0, 0, 0, 15, 0, 0, 0, 2, 0, 0, 0, 32, 0, 0, 0, // four words
            0, 0x40, 0, 0, 0, 0, 0, 0, // size
            0, 0, 0, 0, 0, 0, 0, 0, // offset
            1, 0, 1, 0, 0, 0, 0, 0, // the list's header: id, version, no next
            1, 0, 0, 0, 0, 0, 0, 0, // one area
            0, 0x10, 0, 0, 0, 0, 0, 0, 0, 0x20, 0, 0, 0, 0, 0, 0,
        ];
        assert_eq!(payload, bytes);
        assert_eq!(sparse_areas(&payload).unwrap().unwrap(), areas);

        payload.clear();
        encode_sparse_areas(&info, &areas, 63, &mut payload);
        assert_eq!(
            payload[..16],
            [64, 0, 0, 0, 7, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]
        );
        assert_eq!(payload.len(), 32);
    }

    /// The first word of a capability: its id and version 1.
    fn cap(id: u32) -> u32 {
        id | 1 << 16
    }

    #[test]
    fn areas_are_found_behind_other_capabilities() {
        let words = [
            cap(2),
            48,
            0,
            0, // a type capability at 32
            cap(1),
            0,
            2,
            0, // a list of two areas at 48
            0,
            0,
            0x1000,
            0,
            0x2000,
            0,
            0x3000,
            0,
        ];
        let areas = sparse_areas(&payload(32, &words)).unwrap().unwrap();
        let expected =
            [(0, 0x1000), (0x2000, 0x3000)].map(|(offset, size)| SparseArea { offset, size });
        assert_eq!(areas, expected);
    }

    #[test]
    fn no_list_is_not_an_empty_list() {
        assert!(sparse_areas(&payload(0, &[])).unwrap().is_none());
        assert!(sparse_areas(&payload(32, &[cap(2), 0])).unwrap().is_none());
        let empty = sparse_areas(&payload(32, &[cap(1), 0, 0, 0])).unwrap();
        assert_eq!(empty, Some(vec![]));
    }

    #[test]
    fn bad_chains_are_refused() {
        let cases: [(&str, u32, &[u32]); 8] = [
            ("points into the region information", 16, &[cap(1), 0, 0, 0]),
            ("points past the end", 4096, &[cap(1), 0, 0, 0]),
            ("points at the largest offset", u32::MAX, &[]),
            ("points at itself", 32, &[cap(2), 32]),
            ("points backwards", 40, &[cap(2), 40, cap(2), 32]),
            ("is cut off", 32, &[cap(1)]),
            (
                "lists more areas than it holds",
                32,
                &[cap(1), 0, 1, 0, 0, 0, 1],
            ),
            ("lists four billion areas", 32, &[cap(1), 0, u32::MAX, 0]),
        ];
        for (what, offset, words) in cases {
            assert!(sparse_areas(&payload(offset, words)).is_err(), "{what}");
        }
    }

    #[test]
    fn a_chain_longer_than_any_is_refused() {
        let words: Vec<u32> = (0..200).flat_map(|i| [cap(2), 40 + 8 * i]).collect();
        assert!(sparse_areas(&payload(32, &words)).is_err());
    }
}
