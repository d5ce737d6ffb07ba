//! Guest RAM on its way: stripes of pages out of the source's memfds and into the destination's, block by block.
//!
//! A stripe always takes the same connection, so an older content of a page never overtakes a newer one.

use std::io::{self, Read, Write};
use std::iter::Sum;
use std::ops::{Add, Range};

use vm_memory::bitmap::BitmapSlice;
use vm_memory::{VolatileMemory, VolatileSlice, WriteVolatile};
use zerocopy::{FromZeros, IntoBytes};

use super::gather::{Gather, into_io};
use super::wire::{self, BLOCK, Kind, PagesHeader, WireError};
use crate::layout::PAGE_SIZE;
use crate::memory::written::RegionPages;
use crate::memory::{Memory, Region};
use crate::sparse::Extents;

/// `PAGE_SIZE`, of memory.
#[expect(clippy::cast_possible_truncation, reason = "it is small")]
const PAGE: usize = PAGE_SIZE as usize;
/// How much takes the same connection, in words with a bit for each page: 2 MiB, in which KVM is asked to log writes
/// again.
const STRIPE_WORDS: usize = 8;

/// Room for the contents of a block.
#[derive(Debug)]
pub(super) struct Buffer(Box<[u8]>);

impl Buffer {
    pub(super) fn new() -> Self {
        Self(vec![0; BLOCK as usize].into())
    }
}

/// What became of pages.
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

impl Sum for Sent {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::default(), Self::add)
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

/// A region of guest RAM on its way out.
#[derive(Debug)]
pub(super) struct Outgoing<'m> {
    region: Region<'m>,
    /// What is a hole now may be data soon. So only data is remembered.
    extents: Extents,
}

impl<'m> Outgoing<'m> {
    pub(super) fn new(region: Region<'m>) -> Self {
        Self {
            region,
            extents: Extents::default(),
        }
    }

    /// Sends those pages of stripe number `stripe` whose bits are set. What is a hole is still as the destination has made
    /// it, and so is what is zero if the destination's RAM is `fresh`: neither is mentioned.
    pub(super) fn send_stripe(
        &mut self,
        stream: &mut Gather<impl Write + WriteVolatile>,
        stripe: u64,
        words: &Words,
        fresh: bool,
    ) -> io::Result<Sent> {
        let blocks = (stripe * STRIPE_WORDS as u64..).zip(words);
        let wanted = blocks.filter(|(_, word)| **word != 0);
        wanted
            .map(|(block, word)| self.send_block(stream, block, *word, fresh))
            .sum()
    }

    fn send_block(
        &mut self,
        stream: &mut Gather<impl Write + WriteVolatile>,
        block: u64,
        word: u64,
        fresh: bool,
    ) -> io::Result<Sent> {
        let start = block * u64::from(BLOCK);
        let at = |pages: Range<u32>| start + bytes(pages.start)..start + bytes(pages.end);
        let (mut data, mut zero) = (0_u64, 0_u64);
        for run in runs(word) {
            let run = at(run);
            let mut position = run.start;
            while let Some(extent) = self.extents.next(self.region.file, position..run.end)? {
                position = extent.end;
                let first = (extent.start - start) / PAGE_SIZE;
                let contents = self.region.contents(extent)?;
                for (page, offset) in (first..).zip((0..contents.len()).step_by(PAGE)) {
                    let content = contents.subslice(offset, PAGE).map_err(into_io)?;
                    if !is_zero(&content) {
                        data |= 1 << page;
                    } else if !fresh {
                        zero |= 1 << page;
                    }
                }
            }
        }
        let sent = Sent {
            data: data.count_ones().into(),
            zero: zero.count_ones().into(),
        };
        if data | zero != 0 {
            let pages = PagesHeader {
                address: (self.region.range.start + start).into(),
                data: data.into(),
                zero: zero.into(),
            };
            let length = size_of_val(&pages) + data.count_ones() as usize * PAGE;
            stream.write_all(wire::head(Kind::Pages, length)?.as_bytes())?;
            stream.write_all(pages.as_bytes())?;
            for run in runs(data) {
                stream.write_memory(&self.region.contents(at(run))?)?;
            }
        }
        Ok(sent)
    }
}

/// Whether a page is all zeroes, which it may cease to be at any time.
fn is_zero<B: BitmapSlice>(page: &VolatileSlice<'_, B>) -> bool {
    let words = page.get_array_ref::<u64>(0, page.len() / size_of::<u64>());
    words.is_ok_and(|words| (0..words.len()).all(|index| words.load(index) == 0))
}

/// Receives what follows the head of a frame of pages, and writes it to RAM.
pub(super) fn receive_block(
    stream: &mut impl Read,
    length: u32,
    memory: &Memory,
    Buffer(buffer): &mut Buffer,
) -> Result<(), WireError> {
    let mut header = PagesHeader::new_zeroed();
    let unexpected = |what: &str| Err(WireError::Unexpected(what.to_owned()));
    let Some(length) = (length as usize).checked_sub(size_of::<PagesHeader>()) else {
        return unexpected("pages without a header");
    };
    stream.read_exact(header.as_mut_bytes())?;
    let data = header.data.get();
    if length != data.count_ones() as usize * PAGE {
        return unexpected("more or fewer pages than it announced");
    }
    let Some(content) = buffer.get_mut(..length) else {
        return unexpected("more pages than there are");
    };
    stream.read_exact(content)?;
    let write = |run: &Range<u32>, content: &[u8]| {
        let at = header.address.get().saturating_add(bytes(run.start));
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
    for run in runs(data) {
        let size = run.len() * PAGE;
        let (content, others) = rest.split_at_checked(size).unwrap_or((rest, &[]));
        rest = others;
        write(&run, content)?;
    }
    for run in runs(header.zero.get()) {
        for page in run {
            write(&(page..page + 1), &[0; PAGE])?;
        }
    }
    Ok(())
}

/// Takes `bytes` for all that a peer says on a connection, and returns whether they are that. Pages go to `memory`.
#[cfg(any(test, fuzzing))]
pub(crate) fn overhear(mut bytes: &[u8], memory: &Memory) -> bool {
    let mut buffer = Buffer::new();
    let mut hear = || -> Result<(), WireError> {
        wire::hear_hello(&mut bytes)?;
        while !bytes.is_empty() {
            match wire::receive_head(&mut bytes)? {
                (Kind::Pages, length) => receive_block(&mut bytes, length, memory, &mut buffer)?,
                (_, length) => drop(wire::receive_rest(&mut bytes, length)?),
            }
        }
        Ok(())
    };
    let heard = hear();
    if let Err(error) = &heard {
        // What is said of it is made of what the peer says.
        assert!(!error.to_string().is_empty());
    }
    heard.is_ok()
}

/// The runs of bits that are set, from the lowest on.
fn runs(word: u64) -> impl Iterator<Item = Range<u32>> {
    let mut rest = word;
    std::iter::from_fn(move || {
        let start = rest.trailing_zeros();
        let ones = rest.checked_shr(start)?.trailing_ones();
        let end = start + ones;
        rest &= u64::MAX.checked_shl(end).unwrap_or(0);
        Some(start..end)
    })
}

/// How many bytes so many pages have.
fn bytes(pages: u32) -> u64 {
    u64::from(pages) * PAGE_SIZE
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::os::unix::fs::FileExt;

    use proptest::prelude::*;

    #[test]
    fn runs_are_told() {
        assert_eq!(runs(0).count(), 0);
        let expected = [0..1, 2..4, 63..64];
        assert_eq!(runs(0b1101 | 1 << 63).collect::<Vec<_>>(), expected);
        let mut all = runs(u64::MAX);
        assert_eq!((all.next(), all.next()), (Some(0..64), None));
    }

    const RAM: u64 = 8 << 20;
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
            receive_block(&mut wire, length, memory, &mut buffer)?;
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
            let mut wire = Gather::new(Vec::new());
            let mut outgoing = Outgoing::new(region(&from));
            for (stripe, words) in (0..).zip(&words) {
                outgoing.send_stripe(&mut wire, stripe, words, false).unwrap();
            }
            receive(&wire.into_stream().unwrap(), &to).unwrap();
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
        let send = |stripe, fresh| {
            let mut wire = Gather::new(Vec::new());
            let mut outgoing = Outgoing::new(region(&from));
            let sent = outgoing.send_stripe(&mut wire, stripe, words, fresh);
            (sent.unwrap(), wire.into_stream().unwrap().len())
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
            header.data.set(data);
            header.zero.set(zero);
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
