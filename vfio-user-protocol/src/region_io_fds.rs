//! `DEVICE_GET_REGION_IO_FDS`: descriptors that stand for parts of a region, such as doorbells.

use bitflags::bitflags;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::{ProtocolError, take};

/// Head of the payload of `DEVICE_GET_REGION_IO_FDS`, in both directions. In the reply, entries follow; see [`io_fds`].
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct RegionIoFds {
    /// Command: bytes of reply payload that are wanted. Reply: bytes that there are. If there are more than were
    /// wanted, the reply has no entries and no descriptors.
    pub argsz: u32,
    /// Reserved.
    pub flags: u32,
    /// Number of the region.
    pub index: u32,
    /// Reply: number of entries.
    pub count: u32,
}

impl RegionIoFds {
    /// The command's payload, for a reply payload of up to `argsz` bytes.
    pub fn query(index: u32, argsz: u32) -> Self {
        Self {
            argsz,
            index,
            ..Self::default()
        }
    }
}

/// A part of a region that a descriptor stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IoFd {
    /// Offset in the region, in bytes.
    pub offset: u64,
    /// Size in bytes; 0 for a write of any size at the offset.
    pub size: u64,
    /// Which of the descriptors sent with the reply it is.
    pub fd_index: u32,
    /// What the descriptor is: [`IoFd::EVENTFD`] or another.
    pub kind: u32,
    /// See [`IoFdFlags`].
    pub flags: u32,
    /// The value that a write must have, if [`IoFdFlags::DATAMATCH`] is set.
    pub datamatch: u64,
}

impl IoFd {
    /// The [`kind`](Self::kind) of an ioeventfd. 1 is an ioregionfd, which no kernel has; 2 is libvfio-user's shadow
    /// ioeventfd, of which the plain eventfd would lose the value.
    pub const EVENTFD: u32 = 0;
}

bitflags! {
    /// What a write must be (`KVM_IOEVENTFD_FLAG_*` of `linux/kvm.h`).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct IoFdFlags: u32 {
        /// The write must have one value.
        const DATAMATCH = 1 << 0;
        /// The region is in I/O space.
        const PIO = 1 << 1;
    }
}

/// The entries of a reply to `DEVICE_GET_REGION_IO_FDS`.
///
/// `payload` is the whole reply payload. An entry has 40 bytes in the specification and 48 in libvfio-user, where the
/// value to match moved to the end; which it is follows from `argsz` and the count. Offsets and descriptor indexes are
/// as the peer sent them: whether they lie in the region is the caller's to check.
///
/// # Errors
///
/// [`ProtocolError`] if the payload is short or the entries have any other size.
pub fn io_fds(payload: &[u8]) -> Result<Vec<IoFd>, ProtocolError> {
    let (list, entries) = take::<RegionIoFds>(payload)?;
    if list.count == 0 {
        return Ok(Vec::new());
    }
    let bytes = usize::try_from(list.argsz)
        .unwrap_or(usize::MAX)
        .saturating_sub(size_of::<RegionIoFds>());
    let count = usize::try_from(list.count).unwrap_or(usize::MAX);
    let bad = || ProtocolError::IoFdEntries {
        count: list.count,
        bytes,
    };
    let stride = bytes / count;
    if !matches!(stride, SPECIFIED_ENTRY | LIBVFIO_USER_ENTRY) || stride * count != bytes {
        return Err(bad());
    }
    let entries = entries.get(..bytes).ok_or_else(bad)?;
    entries.chunks_exact(stride).map(entry).collect()
}

/// Appends the payload of a reply to `DEVICE_GET_REGION_IO_FDS` for the region `index`, with entries as the
/// specification has them.
///
/// If the payload has more than `room` bytes, which is what the command's `argsz` says, the entries are left out, and
/// the size tells how much room they take.
pub fn encode_io_fds(index: u32, entries: &[IoFd], room: u32, payload: &mut Vec<u8>) {
    let size = size_of::<RegionIoFds>() + entries.len() * SPECIFIED_ENTRY;
    let head = RegionIoFds {
        argsz: u32::try_from(size).unwrap_or(u32::MAX),
        flags: 0,
        index,
        count: u32::try_from(entries.len()).unwrap_or(u32::MAX),
    };
    payload.extend_from_slice(head.as_bytes());
    if head.argsz > room {
        return;
    }
    for entry in entries {
        let head = EntryHead {
            offset: entry.offset,
            size: entry.size,
            fd_index: entry.fd_index,
            kind: entry.kind,
            flags: entry.flags,
            _padding: 0,
        };
        payload.extend_from_slice(head.as_bytes());
        payload.extend_from_slice(entry.datamatch.as_bytes());
    }
}

/// Reads one entry, of either size.
fn entry(bytes: &[u8]) -> Result<IoFd, ProtocolError> {
    let (head, rest) = take::<EntryHead>(bytes)?;
    let (value, _) = take::<u64>(rest.get(rest.len().saturating_sub(8)..).unwrap_or(&[]))?;
    Ok(IoFd {
        offset: head.offset,
        size: head.size,
        fd_index: head.fd_index,
        kind: head.kind,
        flags: head.flags,
        datamatch: value,
    })
}

/// The fields at the head of an entry, whatever its size and kind. The value to match is its last 8 bytes.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct EntryHead {
    offset: u64,
    size: u64,
    fd_index: u32,
    kind: u32,
    flags: u32,
    _padding: u32,
}

/// Size of an entry in bytes, by the specification.
const SPECIFIED_ENTRY: usize = 40;

/// Size of an entry in bytes in libvfio-user, which puts `shadow_offset` before the value to match.
const LIBVFIO_USER_ENTRY: usize = 48;

#[cfg(test)]
mod tests {
    use super::*;

    /// A reply payload with `count` entries, each of which is `entry`.
    fn payload(argsz: u32, count: u32, entry: &[u8]) -> Vec<u8> {
        let list = RegionIoFds {
            argsz,
            index: 2,
            count,
            ..RegionIoFds::default()
        };
        let mut payload = list.as_bytes().to_vec();
        for _ in 0..count {
            payload.extend(entry);
        }
        payload
    }

    /// An ioeventfd of four bytes at 0x1000 for the value 7, with the fourth descriptor.
    const ENTRY: [u8; 40] = [
        0, 0x10, 0, 0, 0, 0, 0, 0, // offset
        4, 0, 0, 0, 0, 0, 0, 0, // size
        3, 0, 0, 0, 0, 0, 0, 0, // descriptor, kind
        1, 0, 0, 0, 0, 0, 0, 0, // flags, padding
        7, 0, 0, 0, 0, 0, 0, 0, // value
    ];

    const EXPECTED: IoFd = IoFd {
        offset: 0x1000,
        size: 4,
        fd_index: 3,
        kind: IoFd::EVENTFD,
        flags: 1,
        datamatch: 7,
    };

    #[test]
    fn the_head_has_the_layout_of_the_specification() {
        assert_eq!(
            payload(56, 1, &[])[..],
            [56, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0]
        );
    }

    #[test]
    fn entries_are_written_as_the_specification_has_them() {
        let mut written = Vec::new();
        encode_io_fds(2, &[EXPECTED, EXPECTED], 96, &mut written);
        assert_eq!(written, payload(96, 2, &ENTRY));
        written.clear();
        encode_io_fds(2, &[EXPECTED, EXPECTED], 95, &mut written);
        assert_eq!(written, payload(96, 2, &[]));
    }

    #[test]
    fn entries_of_both_sizes_are_read() {
        let long = [&ENTRY[..32], &[9; 8], &ENTRY[32..]].concat();
        let two = [EXPECTED, EXPECTED];
        assert_eq!(io_fds(&payload(16 + 2 * 40, 2, &ENTRY)).unwrap(), two);
        assert_eq!(io_fds(&payload(16 + 2 * 48, 2, &long)).unwrap(), two);
        assert_eq!(io_fds(&payload(16, 0, &[])).unwrap(), []);
    }

    #[test]
    fn entries_of_other_sizes_are_refused() {
        for (argsz, count) in [
            (16, 1),
            (0, 1),
            (55, 1),
            (57, 1),
            (16 + 41, 1),
            (16 + 80, 1),
            (16 + 88, 2),
            (u32::MAX, 1),
            (16 + 40, u32::MAX),
        ] {
            let mut payload = payload(argsz, 1, &[0; 48]);
            payload[12..16].copy_from_slice(&count.to_ne_bytes());
            assert!(io_fds(&payload).is_err(), "{argsz} {count}");
        }
    }

    #[test]
    fn entries_that_are_not_there_are_refused() {
        assert!(io_fds(&payload(16 + 40, 1, &ENTRY[..39])).is_err());
        assert!(io_fds(&payload(16 + 40, 1, &[])).is_err());
        assert!(io_fds(&[0; 15]).is_err());
    }
}
