//! The log of the guest memory that the device has written.
//!
//! It is kept by address and not by mapping, so that what was written to memory that is not mapped any more is still in
//! it. A page is logged after it has been written: what is read from the log has been written before.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use vm_memory::bitmap::{Bitmap, RefSlice, WithBitmapSlice};

/// The log. Any thread may add to it, at any time.
#[derive(Debug, Default)]
pub(crate) struct DirtyLog {
    on: AtomicBool,
    /// Bits of pages, by the number of the chunk that they are in.
    chunks: RwLock<BTreeMap<u64, Chunk>>,
    /// Whether there was no room for a page. Then all pages count as written.
    overflown: AtomicBool,
}

/// A bit for each of 4096 pages.
type Chunk = Box<[AtomicU64; WORDS]>;

const WORDS: usize = 64;

/// Bytes that a bit of the log stands for.
pub(crate) const PAGE_SIZE: u64 = 4096;

const PAGES_PER_WORD: u64 = 64;
const PAGES_PER_CHUNK: u64 = PAGES_PER_WORD * WORDS as u64;

/// Most chunks that are kept: the log of 2 TiB of memory, in 64 MiB.
const MAX_CHUNKS: usize = 1 << 17;

impl DirtyLog {
    /// Starts to log. What has been logged since an earlier start stays.
    pub(crate) fn start(&self) {
        if !self.on.load(Ordering::SeqCst) {
            self.clear();
            self.on.store(true, Ordering::SeqCst);
        }
    }

    pub(crate) fn stop(&self) {
        self.on.store(false, Ordering::SeqCst);
        self.clear();
    }

    pub(crate) fn is_on(&self) -> bool {
        self.on.load(Ordering::SeqCst)
    }

    /// Notes that `len` bytes from `address` on have been written.
    pub(crate) fn mark(&self, address: u64, len: u64) {
        if len == 0 || !self.is_on() {
            return;
        }
        let first = address / PAGE_SIZE;
        let last = address.saturating_add(len - 1) / PAGE_SIZE;
        let mut page = first;
        while page <= last {
            let chunk = page / PAGES_PER_CHUNK;
            let end = ((chunk + 1) * PAGES_PER_CHUNK - 1).min(last);
            self.mark_in_chunk(chunk, page % PAGES_PER_CHUNK, end % PAGES_PER_CHUNK);
            page = end + 1;
        }
    }

    /// Marks pages from `first` to `last` of a chunk.
    fn mark_in_chunk(&self, number: u64, first: u64, last: u64) {
        let chunks = self.chunks.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(chunk) = chunks.get(&number) {
            return set(chunk, first, last);
        }
        drop(chunks);
        let mut chunks = self.chunks.write().unwrap_or_else(PoisonError::into_inner);
        if chunks.len() >= MAX_CHUNKS && !chunks.contains_key(&number) {
            self.overflown.store(true, Ordering::SeqCst);
            return;
        }
        let new = || Box::new([const { AtomicU64::new(0) }; WORDS]);
        set(chunks.entry(number).or_insert_with(new), first, last);
    }

    /// Reads and clears the log of `length` bytes from `iova` on into `bitmap`, which has room for a bit for each
    /// `page_size` bytes. Of pages of which only a part is asked for, the log is not cleared.
    pub(crate) fn report(&self, iova: u64, length: u64, page_size: u64, bitmap: &mut [u64]) {
        if self.overflown.load(Ordering::SeqCst) {
            return set_bits(bitmap, 0, (length - 1) / page_size);
        }
        let end = iova + length;
        // The pages of which all is asked for.
        let whole = iova.div_ceil(PAGE_SIZE)..end / PAGE_SIZE;
        let first_chunk = iova / PAGE_SIZE / PAGES_PER_CHUNK;
        let last_chunk = (end - 1) / PAGE_SIZE / PAGES_PER_CHUNK;
        let chunks = self.chunks.read().unwrap_or_else(PoisonError::into_inner);
        for (number, chunk) in chunks.range(first_chunk..=last_chunk) {
            for (first, word) in (number * PAGES_PER_CHUNK..).step_by(64).zip(chunk.iter()) {
                if word.load(Ordering::SeqCst) == 0 {
                    continue;
                }
                let clear = mask(
                    whole.start.clamp(first, first + PAGES_PER_WORD) - first,
                    whole.end.clamp(first, first + PAGES_PER_WORD) - first,
                );
                let mut dirty = word.fetch_and(!clear, Ordering::SeqCst);
                while dirty != 0 {
                    let page = first + u64::from(dirty.trailing_zeros());
                    dirty &= dirty - 1;
                    let start = (page * PAGE_SIZE).max(iova);
                    let last = (page * PAGE_SIZE + (PAGE_SIZE - 1)).min(end - 1);
                    if start <= last {
                        let [start, last] = [start, last].map(|at| (at - iova) / page_size);
                        set_bits(bitmap, start, last);
                    }
                }
            }
        }
    }

    fn clear(&self) {
        let mut chunks = self.chunks.write().unwrap_or_else(PoisonError::into_inner);
        chunks.clear();
        self.overflown.store(false, Ordering::SeqCst);
    }
}

/// Sets the bits from `first` to `last` of a chunk.
fn set(chunk: &[AtomicU64; WORDS], first: u64, last: u64) {
    for (start, word) in (0..).step_by(64).zip(chunk) {
        let bits = mask(
            first.clamp(start, start + PAGES_PER_WORD) - start,
            (last + 1).clamp(start, start + PAGES_PER_WORD) - start,
        );
        if bits != 0 {
            word.fetch_or(bits, Ordering::SeqCst);
        }
    }
}

/// Sets the bits from `first` to `last` of a bitmap.
fn set_bits(bitmap: &mut [u64], first: u64, last: u64) {
    let words = usize::try_from(first / 64).unwrap_or(usize::MAX);
    for (start, word) in (first / 64 * 64..=last)
        .step_by(64)
        .zip(bitmap.iter_mut().skip(words))
    {
        *word |= mask(
            first.clamp(start, start + 64) - start,
            (last + 1).clamp(start, start + 64) - start,
        );
    }
}

/// The bits from `start` to before `end`, of which neither is more than 64.
fn mask(start: u64, end: u64) -> u64 {
    let below = |bit: u64| match bit {
        64.. => u64::MAX,
        bit => (1 << bit) - 1,
    };
    below(end) & !below(start)
}

/// The part of the log that a mapping is logged in. `vm-memory` marks in it what is written through it.
#[derive(Clone, Debug)]
pub struct PageLog {
    log: Arc<DirtyLog>,
    /// The address of the mapping, as the device sees it.
    address: u64,
}

impl PageLog {
    pub(crate) fn new(log: Arc<DirtyLog>, address: u64) -> Self {
        Self { log, address }
    }
}

impl<'a> WithBitmapSlice<'a> for PageLog {
    type S = RefSlice<'a, Self>;
}

impl Bitmap for PageLog {
    fn mark_dirty(&self, offset: usize, len: usize) {
        let address = self.address.saturating_add(offset as u64);
        self.log.mark(address, len as u64);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        let page = self.address.saturating_add(offset as u64) / PAGE_SIZE;
        let chunks = self
            .log
            .chunks
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        let chunk = chunks.get(&(page / PAGES_PER_CHUNK));
        let [word, bit] = [page / 64 % WORDS as u64, page % 64];
        let word = usize::try_from(word)
            .ok()
            .zip(chunk)
            .and_then(|(at, chunk)| chunk.get(at));
        word.is_some_and(|word| word.load(Ordering::SeqCst) & 1 << bit != 0)
    }

    fn slice_at(&self, offset: usize) -> RefSlice<'_, Self> {
        RefSlice::new(self, offset)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn report(log: &DirtyLog, iova: u64, length: u64, page_size: u64) -> Vec<u64> {
        let bits = length.div_ceil(page_size);
        let mut bitmap = vec![0; usize::try_from(bits.div_ceil(64)).unwrap()];
        log.report(iova, length, page_size, &mut bitmap);
        (0..)
            .zip(bitmap)
            .flat_map(|(at, word)| (0..64).map(move |bit| (at * 64 + bit, word >> bit & 1)))
            .filter_map(|(bit, set)| (set != 0).then_some(bit))
            .collect()
    }

    /// What can happen to a log, in a small part of the address space so that things meet.
    #[derive(Clone, Debug)]
    enum Step {
        Mark(u64, u64),
        Report(u64, u64, u64),
        Stop,
    }

    /// Around the border of two chunks.
    const START: u64 = 4090 * PAGE_SIZE;

    fn step() -> impl Strategy<Value = Step> {
        let place = START..START + 80 * PAGE_SIZE;
        prop_oneof![
            8 => (place.clone(), 0..70 * PAGE_SIZE).prop_map(|(at, len)| Step::Mark(at, len)),
            4 => (place, 1..100 * PAGE_SIZE, 9_u32..20)
                .prop_map(|(at, len, page)| Step::Report(at, len, 1 << page)),
            1 => Just(Step::Stop),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        /// The naive model: a set of pages.
        #[test]
        fn the_log_is_exact(steps in prop::collection::vec(step(), 1..60)) {
            let log = DirtyLog::default();
            log.start();
            let mut model = BTreeSet::new();
            for step in steps {
                match step {
                    Step::Mark(_, 0) => log.mark(START, 0),
                    Step::Mark(at, len) => {
                        log.mark(at, len);
                        model.extend(at / PAGE_SIZE..=(at + len - 1) / PAGE_SIZE);
                    }
                    Step::Report(at, len, page_size) => {
                        let mut expected = BTreeSet::new();
                        for page in &model {
                            let start = (page * PAGE_SIZE).max(at);
                            let end = ((page + 1) * PAGE_SIZE).min(at + len);
                            if start < end {
                                expected.extend((start - at) / page_size..=(end - 1 - at) / page_size);
                            }
                        }
                        model.retain(|page| page * PAGE_SIZE < at || (page + 1) * PAGE_SIZE > at + len);
                        let bits = report(&log, at, len, page_size);
                        prop_assert_eq!(bits, expected.into_iter().collect::<Vec<_>>());
                    }
                    Step::Stop => {
                        log.stop();
                        log.mark(START, 1 << 20);
                        log.start();
                        model.clear();
                    }
                }
            }
        }
    }

    #[test]
    fn the_ends_of_the_address_space_are_logged() {
        let log = DirtyLog::default();
        log.start();
        log.mark(u64::MAX - 5, 100);
        log.mark(0, 1);
        assert_eq!(report(&log, 0, 1 << 20, 4096), [0]);
        assert_eq!(report(&log, u64::MAX - 0x1fff, 0x1fff, 4096), [1]);
    }

    #[test]
    fn too_many_pages_count_as_all() {
        let log = DirtyLog::default();
        log.start();
        for chunk in 0..=MAX_CHUNKS as u64 {
            log.mark(chunk * PAGES_PER_CHUNK * PAGE_SIZE, 1);
        }
        assert_eq!(report(&log, 0, 3 * PAGE_SIZE, PAGE_SIZE), [0, 1, 2]);
        log.stop();
        log.start();
        assert_eq!(report(&log, 0, 3 * PAGE_SIZE, PAGE_SIZE), [0; 0]);
    }
}
