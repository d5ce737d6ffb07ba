//! Guest RAM on its way: stripes of pages out of the source's memfds and into the destination's.
//!
//! A stripe always takes the same connection, so an older content of a page never overtakes a newer one.

use std::io::{self, Read, Write};
use std::ops::{Add, Range};
use std::os::unix::fs::FileExt;

use zerocopy::{FromZeros, IntoBytes};

use super::wire::{self, Kind, PagesHeader, STRIPE, STRIPE_WORDS, WireError};
use crate::layout::PAGE_SIZE;
use crate::memory::written::RegionPages;
use crate::memory::{Memory, Region};
use crate::sparse;

/// `PAGE_SIZE`, of memory.
#[expect(clippy::cast_possible_truncation, reason = "it is small")]
const PAGE: usize = PAGE_SIZE as usize;

/// Room for the contents of a stripe.
#[derive(Debug)]
pub(super) struct Buffer(Box<[u8]>);

impl Buffer {
    pub(super) fn new() -> Self {
        Self(vec![0; STRIPE_WORDS * 64 * PAGE].into())
    }
}

/// What became of the pages of a stripe.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Sent {
    /// How many were sent with their contents.
    pub(super) data: u64,
    /// How many were said to be zero.
    pub(super) zero: u64,
}

impl Sent {
    /// How many bytes of contents were sent.
    pub(super) fn bytes(self) -> u64 {
        self.data * PAGE_SIZE
    }
}

impl Add for Sent {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            data: self.data + other.data,
            zero: self.zero + other.zero,
        }
    }
}

/// Which pages of a stripe, a bit for each.
pub(super) type Words = [u64; STRIPE_WORDS];

/// How many bytes these pages have.
pub(super) fn size(words: &Words) -> u64 {
    let pages: u64 = words.iter().map(|word| u64::from(word.count_ones())).sum();
    pages * PAGE_SIZE
}

/// The numbers of the stripes of a region, and for each which of its pages are wanted; not those of which none is.
pub(super) fn stripes(pages: &RegionPages) -> impl Iterator<Item = (u64, Words)> {
    let stripe = |words: &[u64]| {
        let mut all = [0; STRIPE_WORDS];
        all.iter_mut().zip(words).for_each(|(to, from)| *to = *from);
        all
    };
    let stripes = pages.words().chunks(STRIPE_WORDS).map(stripe);
    (0..)
        .zip(stripes)
        .filter(|(_, words)| words.iter().any(|word| *word != 0))
}

/// Sends those pages of stripe number `stripe` of a region whose bits are set. What is a hole is still as the destination
/// has made it, and so is what is zero if the destination's RAM is `fresh`: neither is mentioned.
pub(super) fn send_stripe(
    stream: &mut impl Write,
    region: &Region<'_>,
    stripe: u64,
    words: &Words,
    fresh: bool,
    buffer: &mut Buffer,
) -> io::Result<Sent> {
    let start = stripe * STRIPE;
    let mut header = PagesHeader::new_zeroed();
    header.address.set(region.range.start + start);
    let mut length = 0;
    for run in runs(words) {
        let run = start + run.start * PAGE_SIZE..start + run.end * PAGE_SIZE;
        let mut position = run.start;
        while let Some(extent) = sparse::next_extent(region.file, position..run.end)? {
            position = extent.end;
            let first = length;
            let size = usize::try_from(extent.end - extent.start).unwrap_or(usize::MAX);
            let Some(data) = buffer.0.get_mut(first..first + size) else {
                return Err(io::ErrorKind::InvalidInput.into());
            };
            region.file.read_exact_at(data, extent.start)?;
            for index in 0..size / PAGE {
                let page = (extent.start - start) / PAGE_SIZE + index as u64;
                let at = first + index * PAGE;
                let is_zero = buffer.0.get(at..at + PAGE).is_some_and(sparse::is_zero);
                if !is_zero {
                    buffer.0.copy_within(at..at + PAGE, length);
                    length += PAGE;
                    set(&mut header.data, page);
                } else if !fresh {
                    set(&mut header.zero, page);
                }
            }
        }
    }
    let sent = Sent {
        data: (length / PAGE) as u64,
        zero: count(&header.zero),
    };
    if sent != Sent::default() {
        let data = buffer.0.get(..length).unwrap_or_default();
        wire::send(stream, Kind::Pages, &[header.as_bytes(), data])?;
    }
    Ok(sent)
}

/// Receives what follows the head of a frame of pages, and writes it to RAM.
pub(super) fn receive_stripe(
    stream: &mut impl Read,
    length: u32,
    memory: &Memory,
    buffer: &mut Buffer,
) -> Result<(), WireError> {
    let mut header = PagesHeader::new_zeroed();
    let unexpected = |what: &str| Err(WireError::Unexpected(what.to_owned()));
    let Some(length) = (length as usize).checked_sub(size_of::<PagesHeader>()) else {
        return unexpected("pages without a header");
    };
    stream.read_exact(header.as_mut_bytes())?;
    let (data, zero) = (header.data.map(Into::into), header.zero.map(Into::into));
    if length as u64 != count(&header.data) * PAGE_SIZE {
        return unexpected("more or fewer pages than it announced");
    }
    let Some(content) = buffer.0.get_mut(..length) else {
        return unexpected("more pages than there are");
    };
    stream.read_exact(content)?;
    let address = header.address.get();
    let write = |run: &Range<u64>, content: &[u8]| {
        let at = address.saturating_add(run.start * PAGE_SIZE);
        memory
            .write(at, content)
            .map_err(|error| match error.kind() {
                io::ErrorKind::InvalidInput => {
                    WireError::Unexpected(format!("pages at {at:#x}, where there is no RAM"))
                }
                _ => WireError::Io(error),
            })
    };
    let mut rest = &*content;
    for run in runs(&data) {
        let size = usize::try_from(run.end - run.start).unwrap_or(0) * PAGE;
        let (content, others) = rest.split_at_checked(size).unwrap_or((rest, &[]));
        rest = others;
        write(&run, content)?;
    }
    for run in runs(&zero) {
        for page in run {
            write(&(page..page + 1), &[0; PAGE])?;
        }
    }
    Ok(())
}

/// The runs of bits that are set, from the lowest of the first word on.
fn runs(words: &Words) -> impl Iterator<Item = Range<u64>> {
    let is_set = |bit: u64| {
        let word = usize::try_from(bit / 64)
            .ok()
            .and_then(|index| words.get(index));
        word.is_some_and(|word| word >> (bit % 64) & 1 != 0)
    };
    let bits = STRIPE / PAGE_SIZE;
    let mut next = 0;
    std::iter::from_fn(move || {
        let start = (next..bits).find(|bit| is_set(*bit))?;
        let end = (start..bits).find(|bit| !is_set(*bit)).unwrap_or(bits);
        next = end;
        Some(start..end)
    })
}

type Bits = [zerocopy::little_endian::U64; STRIPE_WORDS];

fn set(bits: &mut Bits, page: u64) {
    let word = usize::try_from(page / 64)
        .ok()
        .and_then(|index| bits.get_mut(index));
    if let Some(word) = word {
        word.set(word.get() | 1 << (page % 64));
    }
}

fn count(bits: &Bits) -> u64 {
    bits.iter()
        .map(|word| u64::from(word.get().count_ones()))
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    use proptest::prelude::*;

    #[test]
    fn runs_are_told() {
        let mut words = [0; STRIPE_WORDS];
        assert_eq!(runs(&words).count(), 0);
        words[0] = 0b1101 | 1 << 63;
        words[1] = 1;
        words[7] = 1 << 63;
        let expected = [0..1, 2..4, 63..65, 511..512];
        assert_eq!(runs(&words).collect::<Vec<_>>(), expected);
        let mut all = runs(&[u64::MAX; STRIPE_WORDS]);
        assert_eq!((all.next(), all.next()), (Some(0..512), None));
    }

    const RAM: u64 = 4 * STRIPE;
    const RAM_PAGES: usize = 2048;

    fn memory() -> Memory {
        Memory::without_kvm(RAM)
    }

    fn region(memory: &Memory) -> Region<'_> {
        memory.regions().next().unwrap()
    }

    fn content(memory: &Memory) -> Vec<u8> {
        let mut content = vec![0; RAM_PAGES * PAGE];
        region(memory).file.read_exact_at(&mut content, 0).unwrap();
        content
    }

    fn receive(mut wire: &[u8], memory: &Memory) -> Result<(), WireError> {
        let mut buffer = Buffer::new();
        while !wire.is_empty() {
            let (kind, length) = wire::receive_head(&mut wire)?;
            assert_eq!(kind, Kind::Pages);
            receive_stripe(&mut wire, length, memory, &mut buffer)?;
        }
        Ok(())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn pages_arrive_where_they_were(
            pages in proptest::collection::vec((0..2048_u64, any::<u8>()), 0..100),
            words in proptest::collection::vec(any::<[u64; STRIPE_WORDS]>(), 4),
        ) {
            let [from, to] = [memory(), memory()];
            let mut model = vec![0; RAM_PAGES * PAGE];
            for (page, value) in pages {
                let page_content = [value; PAGE];
                region(&from).file.write_all_at(&page_content, page * PAGE_SIZE).unwrap();
                // Something older is there already.
                region(&to).file.write_all_at(&[1; PAGE], page * PAGE_SIZE).unwrap();
            }
            let before = content(&to);
            let source = content(&from);
            let mut wire = Vec::new();
            let mut buffer = Buffer::new();
            for (stripe, words) in (0..).zip(&words) {
                send_stripe(&mut wire, &region(&from), stripe, words, false, &mut buffer).unwrap();
            }
            receive(&wire, &to).unwrap();
            for page in 0..2048_usize {
                let wanted = words[page / 512][page % 512 / 64] >> (page % 64) & 1 != 0;
                let model = &mut model[page * PAGE..(page + 1) * PAGE];
                let origin = if wanted { &source } else { &before };
                model.copy_from_slice(&origin[page * PAGE..(page + 1) * PAGE]);
            }
            prop_assert!(content(&to) == model);
        }
    }

    #[test]
    fn fresh_ram_is_not_told_of_zeroes_and_holes_never_are() {
        let from = memory();
        region(&from).file.write_all_at(&[0; PAGE], 0).unwrap();
        region(&from).file.write_all_at(&[1; PAGE], 0x3000).unwrap();
        let words = &[u64::MAX; STRIPE_WORDS];
        let mut buffer = Buffer::new();
        let mut send = |stripe, fresh| {
            let mut wire = Vec::new();
            let sent = send_stripe(&mut wire, &region(&from), stripe, words, fresh, &mut buffer);
            (sent.unwrap(), wire.len())
        };
        let (sent, _) = send(0, true);
        assert_eq!(sent, Sent { data: 1, zero: 0 });
        let (sent, length) = send(0, false);
        assert_eq!(sent.data, 1);
        assert!(length < 2 * PAGE);
        assert_eq!(send(1, false), (Sent::default(), 0), "nothing but a hole");
    }

    #[test]
    fn pages_that_make_no_sense_are_refused() {
        let to = memory();
        let frame = |address: u64, data: u64, zero: u64, pages: usize| {
            let mut header = PagesHeader::new_zeroed();
            header.address.set(address);
            header.data[0].set(data);
            header.zero[0].set(zero);
            let mut wire = Vec::new();
            let content = vec![1; pages * PAGE];
            wire::send(&mut wire, Kind::Pages, &[header.as_bytes(), &content]).unwrap();
            receive(&wire, &to)
        };
        frame(0, 0b11, 0, 2).unwrap();
        let refused = |result| matches!(result, Err(WireError::Unexpected(_)));
        assert!(refused(frame(0, 0b11, 0, 1)), "fewer than announced");
        assert!(refused(frame(0, 0b11, 0, 3)), "more than announced");
        assert!(
            refused(frame(RAM - PAGE_SIZE, 0b11, 0, 2)),
            "half of it outside"
        );
        assert!(refused(frame(RAM, 0, 1, 0)));
        assert!(refused(frame(u64::MAX - 0xfff, 0b11, 0, 2)));
        let mut wire = Vec::new();
        wire::send(&mut wire, Kind::Pages, &[&[0; 8]]).unwrap();
        assert!(refused(receive(&wire, &to)));
    }
}
