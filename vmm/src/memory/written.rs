//! Which pages of guest RAM have been written: what has to be sent (again) to where the VM moves.
//!
//! There are three kinds of writers. KVM logs the guest, each device logs itself, and what this process writes is marked
//! in the RAM's own bitmap. [`WriteLog`] has the first and the last.

use std::ops::Range;

use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, MmapRegion};

use super::{MARKED, Memory};
use crate::layout::PAGE_SIZE;
use crate::slots::DirtyLogError;

/// A bit for each page of guest RAM, region by region.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Pages {
    regions: Vec<RegionPages>,
}

/// A bit for each page of a region.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RegionPages {
    /// The guest physical addresses of the region.
    range: Range<u64>,
    words: Vec<u64>,
}

/// How many pages a word has bits for.
const PAGES_OF_WORD: u64 = u64::BITS as u64;

impl Pages {
    /// None of the pages of these regions.
    pub(crate) fn none(regions: impl IntoIterator<Item = Range<u64>>) -> Self {
        let region = |range: Range<u64>| {
            let words = (range.end - range.start).div_ceil(PAGE_SIZE * PAGES_OF_WORD);
            RegionPages {
                range,
                words: vec![0; usize::try_from(words).unwrap_or(0)],
            }
        };
        Self {
            regions: regions.into_iter().map(region).collect(),
        }
    }

    /// All of them.
    pub(crate) fn all(regions: impl IntoIterator<Item = Range<u64>>) -> Self {
        let mut pages = Self::none(regions);
        for region in &mut pages.regions {
            region.add(region.range.clone());
        }
        pages
    }

    /// Those of each region.
    pub(crate) fn regions(&self) -> &[RegionPages] {
        &self.regions
    }

    /// How many there are.
    pub(crate) fn count(&self) -> u64 {
        let words = self.regions.iter().flat_map(|region| &region.words);
        words.map(|word| u64::from(word.count_ones())).sum()
    }

    /// Adds other pages of the same regions.
    pub(crate) fn add_all(&mut self, others: &Self) {
        for (region, others) in self.regions.iter_mut().zip(&others.regions) {
            region.or(&others.words);
        }
    }

    /// Adds all pages that the guest physical addresses touch.
    pub(crate) fn add(&mut self, addresses: &Range<u64>) {
        for region in &mut self.regions {
            let start = addresses.start.max(region.range.start);
            let end = addresses.end.min(region.range.end);
            region.add(start..end.max(start));
        }
    }

    /// Adds what a device has logged: a bit for each `page_size` bytes from `start` on.
    pub(crate) fn add_log(&mut self, start: u64, page_size: u64, log: &[u64]) {
        let set = |word: u64| (0..u64::BITS).filter(move |bit| word >> bit & 1 != 0);
        for (word, base) in log.iter().zip((0..).step_by(64)) {
            for bit in set(*word) {
                let index: u64 = base + u64::from(bit);
                let first = index
                    .checked_mul(page_size)
                    .and_then(|offset| start.checked_add(offset));
                let Some(first) = first else { return };
                self.add(&(first..first.saturating_add(page_size)));
            }
        }
    }
}

impl RegionPages {
    /// A bit for each page, from the lowest bit of the first word on.
    pub(crate) fn words(&self) -> &[u64] {
        &self.words
    }

    /// Adds the pages of these addresses, which are within the region.
    fn add(&mut self, addresses: Range<u64>) {
        if addresses.is_empty() {
            return;
        }
        let mut page = (addresses.start - self.range.start) / PAGE_SIZE;
        let end = (addresses.end - self.range.start).div_ceil(PAGE_SIZE);
        while page < end {
            let (index, bit) = (page / PAGES_OF_WORD, page % PAGES_OF_WORD);
            let count = (PAGES_OF_WORD - bit).min(end - page);
            let bits = u64::MAX >> (PAGES_OF_WORD - count) << bit;
            let word = usize::try_from(index)
                .ok()
                .and_then(|index| self.words.get_mut(index));
            if let Some(word) = word {
                *word |= bits;
            }
            page += count;
        }
    }

    fn or(&mut self, words: &[u64]) {
        for (word, other) in self.words.iter_mut().zip(words) {
            *word |= other;
        }
    }
}

/// A log of the guest's writes and this process' own, while it lives.
#[derive(Debug)]
pub(crate) struct WriteLog<'m> {
    memory: &'m Memory,
}

impl<'m> WriteLog<'m> {
    /// Starts the log, with all pages in it.
    pub(crate) fn start(memory: &'m Memory) -> Result<Self, DirtyLogError> {
        // Should one of them not log, those that do are stopped.
        let log = Self { memory };
        for slot in &memory.slots {
            slot.log_writes(true)?;
        }
        for region in memory.ram.iter() {
            MmapRegion::bitmap(region).reset();
        }
        Ok(log)
    }

    /// What has been written since the last time. What the guest wrote stays in the log until it is
    /// [cleared](Self::clear).
    pub(crate) fn take(&self) -> Result<Pages, DirtyLogError> {
        let mut pages = Pages::none(self.memory.regions().map(|region| region.range));
        for (pages, slot) in pages.regions.iter_mut().zip(&self.memory.slots) {
            pages.or(&slot.written()?);
        }
        for ram in self.memory.ram.iter() {
            let marked = MmapRegion::bitmap(ram).get_and_reset();
            pages.add_log(ram.start_addr().0, MARKED.get() as u64, &marked);
        }
        Ok(pages)
    }

    /// Has the guest's writes to some pages logged again, before these are read: those of the `region`th region whose
    /// bits are set in `words`, which begin with the word number `first`.
    pub(crate) fn clear(
        &self,
        region: usize,
        first: usize,
        words: &[u64],
    ) -> Result<(), DirtyLogError> {
        let (Some(slot), Some(ram)) = (
            self.memory.slots.get(region),
            self.memory.ram.iter().nth(region),
        ) else {
            return Err(DirtyLogError::NoSlot);
        };
        let first_page = first as u64 * PAGES_OF_WORD;
        let pages = (words.len() as u64 * PAGES_OF_WORD).min(ram.len() / PAGE_SIZE - first_page);
        slot.clear_written(first_page, pages, words)
    }
}

impl Drop for WriteLog<'_> {
    fn drop(&mut self) {
        for slot in &self.memory.slots {
            if let Err(error) = slot.log_writes(false) {
                log::warn!("{error}");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use crate::test_machine::{Guest, Machine, ROUNDS, Rest, Timer, has_kvm};

    const REGIONS: [Range<u64>; 2] = [0..0x100_0000, 0x1_0000_0000..0x1_0010_3000];

    fn addresses(pages: &Pages) -> BTreeSet<u64> {
        let region = |region: &RegionPages| {
            let start = region.range.start;
            let words = region.words.clone();
            (0..words.len() as u64 * 64)
                .filter(move |page| words[(page / 64) as usize] >> (page % 64) & 1 != 0)
                .map(move |page| start + page * PAGE_SIZE)
        };
        pages.regions.iter().flat_map(region).collect()
    }

    #[test]
    fn all_are_those_of_the_regions_and_no_more() {
        let pages = Pages::all(REGIONS);
        assert_eq!(pages.count(), 0x1000 + 0x103);
        assert_eq!(addresses(&pages).last(), Some(&0x1_0010_2000));
        assert_eq!(Pages::none(REGIONS).count(), 0);
    }

    #[test]
    fn a_log_beyond_all_ram_adds_nothing() {
        let mut pages = Pages::none(REGIONS);
        pages.add_log(0x2_0000_0000, 0x1000, &[u64::MAX; 4]);
        pages.add_log(u64::MAX - 0x1fff, 0x1000, &[u64::MAX]);
        pages.add_log(0, u64::MAX, &[1 << 63]);
        assert_eq!(pages.count(), 0);
        pages.add_log(0, u64::MAX, &[1]);
        assert_eq!(pages, Pages::all(REGIONS));
    }

    #[test]
    fn what_is_written_is_logged_until_it_is_cleared() {
        if !has_kvm() {
            return;
        }
        let guest = Guest::new(Timer::Periodic, Rest::Never, false);
        let mut machine = Machine::with_guest(1, &guest);
        machine.run();
        machine.wait_for_more(ROUNDS, 10);
        machine.pause();
        let log = WriteLog::start(&machine.memory).unwrap();
        let take = || log.take().unwrap();
        let clear = |pages: &Pages| {
            for (index, region) in pages.regions().iter().enumerate() {
                log.clear(index, 0, region.words()).unwrap();
            }
        };
        let all = Pages::all(machine.memory.regions().map(|region| region.range));
        assert_eq!(take(), all, "at first");
        clear(&all);
        assert_eq!(take().count(), 0);
        machine.vcpus.resume();
        machine.wait_for_more(ROUNDS, 10);
        let data = u64::from(ROUNDS) & !(PAGE_SIZE - 1);
        for _ in 0..3 {
            assert!(addresses(&take()).contains(&data), "until it is cleared");
        }
        // What is written after it has been cleared is there again.
        clear(&all);
        machine.wait_for_more(ROUNDS, 10);
        assert!(addresses(&take()).contains(&data));
        machine.pause();
        clear(&all);
        assert_eq!(take().count(), 0);
        // What this process writes is told once.
        machine.set_word(ROUNDS + 0x1000, 1);
        let marked = addresses(&take());
        assert!(marked.contains(&(data + 0x1000)) && marked.len() == MARKED.get() / 0x1000);
        assert_eq!(take().count(), 0);
        drop(log);
        // It can be started anew.
        let log = WriteLog::start(&machine.memory).unwrap();
        assert_eq!(log.take().unwrap(), all);
    }

    proptest! {
        #[test]
        fn pages_are_those_that_are_touched(
            ranges in proptest::collection::vec((0..0x110_0000_u64, 0..0x20000_u64, any::<bool>()), 0..10),
        ) {
            let mut pages = Pages::none(REGIONS);
            let mut model = BTreeSet::new();
            for (start, length, high) in ranges {
                let start = start + if high { 0x1_0000_0000 } else { 0 };
                pages.add(&(start..start + length));
                let all = REGIONS.into_iter().flat_map(|region| region.step_by(0x1000));
                model.extend(all.filter(|page| {
                    length > 0 && page + PAGE_SIZE > start && *page < start + length
                }));
            }
            prop_assert_eq!(addresses(&pages), model);
        }

        #[test]
        fn logs_of_other_page_sizes_cover_the_same_bytes(
            start in (0..0x100_u64).prop_map(|page| page << 16),
            shift in 9..17_u32,
            log in proptest::collection::vec(any::<u64>(), 1..4),
        ) {
            let mut pages = Pages::none(REGIONS);
            pages.add_log(start, 1 << shift, &log);
            let mut model = Pages::none(REGIONS);
            for bit in (0..log.len() as u64 * 64).filter(|bit| log[(bit / 64) as usize] >> (bit % 64) & 1 != 0) {
                let first = start + (bit << shift);
                model.add(&(first..first + (1 << shift)));
            }
            prop_assert_eq!(pages, model);
        }
    }
}
