//! A request, as the driver has put it into a chain of descriptors (virtio 1.2, 5.2.6).

use std::ops::Range;

use thiserror::Error;
use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use virtio_queue::desc::split::Descriptor;

use super::image::SECTOR;
use crate::virtio::guest::{self, MAX_DESCRIPTORS, Segment};

/// A request. All addresses in it are the guest's, and may be anything.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) operation: Operation,
    /// The data: of a read or the serial number, where it goes; of others, where it is.
    pub(super) data: Vec<Segment>,
    /// Bytes in the data.
    pub(super) length: usize,
    /// Where the status goes.
    pub(super) status: u64,
}

/// What the driver asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    Read { sector: u64 },
    Write { sector: u64 },
    Flush,
    SerialNumber,
    Discard,
    WriteZeroes,
    Unknown,
}

/// Why a chain is no request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub(super) enum Malformed {
    #[error("a chain with more than {MAX_DESCRIPTORS} descriptors")]
    TooLong,
    #[error("a chain with something to be read behind what can be written")]
    Order,
    #[error("a chain without a whole header")]
    Header,
    #[error("a chain without room for the status")]
    Status,
}

/// Bytes in `struct virtio_blk_req` before its data.
const HEADER: usize = 16;

impl Request {
    /// Parses a chain. `read` reads guest memory, and returns whether it could.
    pub(super) fn parse(
        chain: impl Iterator<Item = Descriptor>,
        mut read: impl FnMut(u64, &mut [u8]) -> bool,
    ) -> Result<Self, Malformed> {
        let (mut readable, mut writable) = split(chain)?;
        let status = take_last_byte(&mut writable).ok_or(Malformed::Status)?;
        let mut header = [0; HEADER];
        let mut rest = header.as_mut_slice();
        while !rest.is_empty() {
            let segment = readable.first_mut().ok_or(Malformed::Header)?;
            let length = rest.len().min(segment.length);
            let (piece, next) = rest.split_at_mut_checked(length).ok_or(Malformed::Header)?;
            if !read(segment.address, piece) {
                return Err(Malformed::Header);
            }
            rest = next;
            skip(&mut readable, length);
        }
        let [k0, k1, k2, k3, _, _, _, _, sector @ ..] = header;
        let sector = u64::from_le_bytes(sector);
        let (operation, data) = match u32::from_le_bytes([k0, k1, k2, k3]) {
            VIRTIO_BLK_T_IN => (Operation::Read { sector }, writable),
            VIRTIO_BLK_T_OUT => (Operation::Write { sector }, readable),
            VIRTIO_BLK_T_FLUSH => (Operation::Flush, Vec::new()),
            VIRTIO_BLK_T_GET_ID => (Operation::SerialNumber, writable),
            VIRTIO_BLK_T_DISCARD => (Operation::Discard, readable),
            VIRTIO_BLK_T_WRITE_ZEROES => (Operation::WriteZeroes, readable),
            _ => (Operation::Unknown, Vec::new()),
        };
        Ok(Self {
            operation,
            length: guest::length(&data),
            data,
            status,
        })
    }
}

/// What is to be discarded or to become zeroes (`struct virtio_blk_discard_write_zeroes`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Extent {
    sector: u64,
    sectors: u32,
    flags: u32,
}

impl Extent {
    /// Bytes in one, as the driver has it.
    pub(super) const SIZE: usize = 16;

    pub(super) fn parse(bytes: [u8; Self::SIZE]) -> Self {
        let [sector @ .., n0, n1, n2, n3, f0, f1, f2, f3] = bytes;
        Self {
            sector: u64::from_le_bytes(sector),
            sectors: u32::from_le_bytes([n0, n1, n2, n3]),
            flags: u32::from_le_bytes([f0, f1, f2, f3]),
        }
    }

    /// Where it is in an image of `size` bytes. `None` if it is not all in it.
    pub(super) fn range(&self, size: u64) -> Option<Range<u64>> {
        range(
            self.sector,
            u64::from(self.sectors) * u64::from(SECTOR),
            size,
        )
    }

    /// Whether the sectors may be deallocated.
    pub(super) fn may_unmap(&self) -> bool {
        self.flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0
    }

    /// Whether there are flags other than [`may_unmap`](Self::may_unmap).
    pub(super) fn has_other_flags(&self) -> bool {
        self.flags & !VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0
    }
}

/// Where `length` bytes from a sector on are in an image of `size` bytes. `None` if they are not all in it.
pub(super) fn range(sector: u64, length: u64, size: u64) -> Option<Range<u64>> {
    let start = sector.checked_mul(SECTOR.into())?;
    let end = start.checked_add(length)?;
    (end <= size).then_some(start..end)
}

/// Takes `count` bytes off the beginning.
pub(super) fn skip(segments: &mut Vec<Segment>, count: usize) {
    let mut count = count;
    let mut gone = 0;
    for segment in segments.iter_mut() {
        let piece = segment.length.min(count);
        segment.address = segment.address.wrapping_add(piece as u64);
        segment.length -= piece;
        count -= piece;
        if segment.length > 0 {
            break;
        }
        gone += 1;
    }
    segments.drain(..gone);
}

/// The descriptors that the device may read, and those that it may write, without empty ones.
fn split(
    chain: impl Iterator<Item = Descriptor>,
) -> Result<(Vec<Segment>, Vec<Segment>), Malformed> {
    let (mut readable, mut writable) = (Vec::new(), Vec::new());
    for (index, descriptor) in chain.enumerate() {
        if index >= MAX_DESCRIPTORS {
            return Err(Malformed::TooLong);
        }
        if descriptor.is_write_only() {
            writable.push(Segment::from(descriptor));
        } else if writable.is_empty() {
            readable.push(Segment::from(descriptor));
        } else {
            return Err(Malformed::Order);
        }
    }
    for segments in [&mut readable, &mut writable] {
        segments.retain(|segment| segment.length > 0);
    }
    Ok((readable, writable))
}

/// Takes the last byte off, and returns its address.
fn take_last_byte(segments: &mut Vec<Segment>) -> Option<u64> {
    let last = segments.last_mut()?;
    last.length -= 1;
    let address = last.address.wrapping_add(last.length as u64);
    if last.length == 0 {
        segments.pop();
    }
    Some(address)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    // Flags of descriptors.
    const NEXT: u16 = 1;
    const WRITE: u16 = 2;

    /// Guest memory: at each multiple of 16 is a header, whose kind the address tells. Some of it is not there.
    fn byte(address: u64) -> Option<u8> {
        let [low, high, ..] = address.to_le_bytes();
        let value = match address % 16 {
            0 => high & 0xf,
            1..8 => 0,
            _ => low,
        };
        (address < 0x8000).then_some(value)
    }

    fn read(address: u64, data: &mut [u8]) -> bool {
        let addresses = (0..data.len() as u64).map(|at| address.checked_add(at).and_then(byte));
        let bytes: Option<Vec<_>> = addresses.collect();
        bytes.map(|bytes| data.copy_from_slice(&bytes)).is_some()
    }

    /// The naive model: all addresses, one after the other. The kind of request, its sector, its data, and where the
    /// status goes.
    fn model(chain: &[Descriptor]) -> Option<(u32, u64, Vec<u64>, u64)> {
        let first_writable = chain.iter().position(Descriptor::is_write_only)?;
        let (readable, writable) = chain.split_at(first_writable);
        if chain.len() > MAX_DESCRIPTORS || !writable.iter().all(Descriptor::is_write_only) {
            return None;
        }
        let addresses = |part: &[Descriptor]| {
            let each = part.iter().flat_map(|descriptor| {
                let start = descriptor.addr().0;
                (0..u64::from(descriptor.len())).map(move |at| start + at)
            });
            each.collect::<Vec<_>>()
        };
        let (readable, mut writable) = (addresses(readable), addresses(writable));
        let status = writable.pop()?;
        let header: Option<Vec<_>> = readable.get(..16)?.iter().copied().map(byte).collect();
        let header = header?;
        let kind = u32::from_le_bytes(header[..4].try_into().unwrap());
        let sector = u64::from_le_bytes(header[8..].try_into().unwrap());
        let data = match kind {
            0 | 8 => writable,
            1 | 11 | 13 => readable[16..].to_vec(),
            _ => Vec::new(),
        };
        Some((kind, sector, data, status))
    }

    fn descriptors() -> impl Strategy<Value = Vec<Descriptor>> {
        let header = (0_u64..16).prop_map(|kind| kind << 8);
        let address = prop_oneof![header, 0_u64..0x8100];
        let length = prop_oneof![3 => Just(16_u32), 1 => Just(1), 2 => 0_u32..40];
        let descriptor = (address, length).prop_map(|(address, length)| (address, length));
        let part = |flags| {
            prop::collection::vec(descriptor.clone(), 0..6).prop_map(move |part| {
                let each = part.into_iter();
                let each = each.map(|(address, length)| Descriptor::new(address, length, flags, 0));
                each.collect::<Vec<_>>()
            })
        };
        (part(NEXT), part(NEXT | WRITE), prop::bool::weighted(0.1)).prop_map(
            |(readable, writable, swapped)| {
                if swapped {
                    [writable, readable].concat()
                } else {
                    [readable, writable].concat()
                }
            },
        )
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, cases: 2000, ..ProptestConfig::default() })]

        #[test]
        fn chains_are_parsed_as_the_model_has_it(chain in descriptors()) {
            let parsed = Request::parse(chain.iter().copied(), read);
            let Some((kind, sector, data, status)) = model(&chain) else {
                prop_assert!(parsed.is_err());
                return Ok(());
            };
            let request = parsed.unwrap();
            let operation = match kind {
                0 => Operation::Read { sector },
                1 => Operation::Write { sector },
                4 => Operation::Flush,
                8 => Operation::SerialNumber,
                11 => Operation::Discard,
                13 => Operation::WriteZeroes,
                _ => Operation::Unknown,
            };
            prop_assert_eq!(request.operation, operation);
            prop_assert_eq!(request.status, status);
            prop_assert_eq!(request.length, data.len());
            let addresses = request.data.iter().flat_map(|segment| {
                (0..segment.length as u64).map(|at| segment.address + at)
            });
            prop_assert_eq!(addresses.collect::<Vec<_>>(), data);
        }

        #[test]
        fn skipping_drops_the_first_bytes(lengths in prop::collection::vec(0_usize..10, 0..8), count in 0_usize..100) {
            let mut start = 0;
            let mut segments: Vec<_> = lengths.iter().map(|length| {
                start += 100;
                Segment { address: start, length: *length }
            }).collect();
            let bytes = |segments: &[Segment]| segments.iter().flat_map(|segment| {
                (0..segment.length as u64).map(|at| segment.address + at)
            }).collect::<Vec<_>>();
            let before = bytes(&segments);
            skip(&mut segments, count);
            let gone = before.len().min(count);
            prop_assert_eq!(bytes(&segments), &before[gone..]);
        }
    }

    #[test]
    fn ranges_end_where_the_image_does() {
        assert_eq!(range(2, 1024, 2048), Some(1024..2048));
        assert_eq!(range(4, 0, 2048), Some(2048..2048));
        for (sector, length) in [
            (4, 1),
            (3, 1024),
            (u64::MAX, 1),
            (u64::MAX >> 9, 512),
            (0, u64::MAX),
        ] {
            assert_eq!(range(sector, length, 2048), None, "{sector} {length}");
        }
    }

    #[test]
    fn chains_that_are_too_long_are_refused() {
        let chain = |count: usize| {
            let first = std::iter::once(Descriptor::new(0x100, 16, NEXT, 0));
            let rest = std::iter::repeat(Descriptor::new(0x200, 1, NEXT | WRITE, 0));
            first.chain(rest).take(count)
        };
        assert!(Request::parse(chain(MAX_DESCRIPTORS), read).is_ok());
        let refused = Request::parse(chain(MAX_DESCRIPTORS + 1), read);
        assert_eq!(refused, Err(Malformed::TooLong));
    }
}
