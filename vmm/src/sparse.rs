//! Copies of sparse files, by several threads: what is a hole is not read, and zeroes are not written.
//!
//! Guest RAM goes into a snapshot and comes back this way. Both sides are plain reads and writes, so nothing else ever
//! sees the memory of one through the other.

use std::fs::File;
use std::io;
use std::num::NonZero;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

use crate::layout::PAGE_SIZE;

/// How much a thread takes on at a time.
const SHARE: u64 = 4 << 20;
/// How much is read at once: what the CPU's cache still holds when it is looked at and written.
const BLOCK: usize = 256 << 10;
#[expect(clippy::cast_possible_truncation, reason = "it is small")]
const PAGE: usize = PAGE_SIZE as usize;
/// More threads than this only wait for each other in the kernel.
const MAX_THREADS: usize = 8;

/// Where the data goes, by its offset in the source. What is not written there reads as zeroes.
pub(crate) trait Sink: Sync {
    /// Writes all of `data`.
    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()>;
}

/// A part of a file, which begins at this offset.
#[derive(Debug)]
pub(crate) struct FilePart<'a> {
    pub(crate) file: &'a File,
    pub(crate) start: u64,
}

impl Sink for FilePart<'_> {
    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.file.write_all_at(data, self.start + offset)
    }
}

/// Copies `length` bytes of `from`, which are there, to `to`. `progress` hears how many bytes have been dealt with, and
/// says by an error that enough is enough.
pub(crate) fn copy(
    from: &FilePart<'_>,
    length: u64,
    to: &impl Sink,
    progress: &(impl Fn(u64) -> io::Result<()> + Sync),
) -> io::Result<()> {
    let next = AtomicU64::new(0);
    let work = || -> io::Result<()> {
        let mut block = vec![0; BLOCK];
        let mut extents = Extents::default();
        loop {
            let start = next.fetch_add(SHARE, Ordering::Relaxed);
            if start >= length {
                return Ok(());
            }
            let share = start..length.min(start + SHARE);
            let size = share.end - share.start;
            copy_share(from, share, to, &mut extents, &mut block)
                .and_then(|()| progress(size))
                // Nobody need begin another.
                .inspect_err(|_| next.store(length, Ordering::Relaxed))?;
        }
    };
    let shares = usize::try_from(length.div_ceil(SHARE)).unwrap_or(usize::MAX);
    let cpus = thread::available_parallelism().map_or(1, NonZero::get);
    let helpers = cpus.min(MAX_THREADS).min(shares).saturating_sub(1);
    thread::scope(|scope| {
        let spawn = |_| thread::Builder::new().spawn_scoped(scope, work);
        // Without threads it takes longer.
        let helpers: Vec<_> = (0..helpers).map_while(|index| spawn(index).ok()).collect();
        let mine = work();
        let theirs = helpers.into_iter().map(|helper| {
            let failed = |_| Err(io::Error::other("a thread that copies has failed"));
            helper.join().unwrap_or_else(failed)
        });
        // Each is waited for, whatever the others say.
        theirs.fold(mine, Result::and)
    })
}

fn copy_share(
    from: &FilePart<'_>,
    share: Range<u64>,
    to: &impl Sink,
    extents: &mut Extents,
    block: &mut [u8],
) -> io::Result<()> {
    let mut position = share.start;
    let at = |range: Range<u64>| from.start + range.start..from.start + range.end;
    while let Some(extent) = extents.next(from.file, at(position..share.end))? {
        let extent = extent.start - from.start..extent.end - from.start;
        position = extent.start;
        while position < extent.end {
            let left = usize::try_from(extent.end - position).unwrap_or(usize::MAX);
            let length = left.min(block.len());
            let Some(data) = block.get_mut(..length) else {
                break;
            };
            from.file.read_exact_at(data, from.start + position)?;
            write_data(to, position, data)?;
            position += length as u64;
        }
    }
    Ok(())
}

/// Where a file has data. Files that have had data somewhere have it for good: none of them is punched.
#[derive(Debug, Default)]
pub(crate) struct Extents {
    /// The data that was found last. To find its end is the more work the longer it is, and is done once.
    last: Range<u64>,
}

impl Extents {
    /// Where the next data is within `range` of the file, the same each time, in whole pages; none if the rest is a hole.
    pub(crate) fn next(
        &mut self,
        file: &File,
        range: Range<u64>,
    ) -> io::Result<Option<Range<u64>>> {
        if range.is_empty() {
            return Ok(None);
        }
        if !self.last.contains(&range.start) {
            let data = match seek(file, SeekFrom::Data(range.start)) {
                Ok(data) if data < range.end => data,
                Ok(_) | Err(Errno::NXIO) => return Ok(None),
                Err(error) => return Err(error.into()),
            };
            let hole = seek(file, SeekFrom::Hole(data))?;
            self.last = data - data % PAGE_SIZE..hole.next_multiple_of(PAGE_SIZE);
        }
        let Range { start, end } = self.last;
        Ok(Some(start.max(range.start)..end.min(range.end)))
    }
}

/// Writes the pages that are not all zeroes, neighbours together.
fn write_data(to: &impl Sink, offset: u64, data: &[u8]) -> io::Result<()> {
    let write = |run: Range<usize>| match data.get(run.clone()) {
        Some(data) if !data.is_empty() => to.write(offset + run.start as u64, data),
        _ => Ok(()),
    };
    let mut run = 0..0;
    for (page, start) in data.chunks(PAGE).zip((0..).step_by(PAGE)) {
        if is_zero(page) {
            continue;
        }
        if run.end != start {
            write(run)?;
            run = start..start;
        }
        run.end = start + page.len();
    }
    write(run)
}

/// Whether all bytes are zero. Looks at a cache line at a time, without a branch for each byte.
fn is_zero(page: &[u8]) -> bool {
    let line_is_zero = |line: &[u8]| line.iter().fold(0, |any, byte| any | byte) == 0;
    page.chunks(64).all(line_is_zero)
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::os::unix::fs::MetadataExt;
    use std::sync::Mutex;

    use proptest::prelude::*;

    /// Remembers what is written.
    #[derive(Default)]
    struct Writes(Mutex<Vec<(u64, usize)>>);

    impl Sink for Writes {
        fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
            self.0.lock().unwrap().push((offset, data.len()));
            Ok(())
        }
    }

    fn ignore(_: u64) -> io::Result<()> {
        Ok(())
    }

    #[test]
    fn neighbours_are_written_together_and_zeroes_not_at_all() {
        let mut data = vec![0; 6 * PAGE];
        data[PAGE] = 1;
        data[3 * PAGE - 1] = 1;
        data[5 * PAGE] = 1;
        let writes = Writes::default();
        write_data(&writes, 0x10000, &data).unwrap();
        let expected = [(0x11000, 2 * PAGE), (0x15000, PAGE)];
        assert_eq!(writes.0.into_inner().unwrap(), expected);
    }

    #[test]
    fn holes_stay_holes() {
        let folder = tempfile::tempdir().unwrap();
        let [from, to] = ["from", "to"].map(|name| {
            let options = &mut File::options();
            let path = folder.path().join(name);
            options
                .read(true)
                .write(true)
                .create_new(true)
                .open(path)
                .unwrap()
        });
        let length = 64 << 20;
        from.set_len(length + 0x3000).unwrap();
        to.set_len(length).unwrap();
        from.write_all_at(&[1; PAGE], 0x3000 + (40 << 20)).unwrap();
        let part = |file, start| FilePart { file, start };
        copy(&part(&from, 0x3000), length, &part(&to, 0), &ignore).unwrap();
        assert!(to.metadata().unwrap().blocks() * 512 < 1 << 20);
        let mut page = [0; PAGE];
        to.read_exact_at(&mut page, 40 << 20).unwrap();
        assert_eq!(page, [1; PAGE]);
    }

    #[test]
    fn a_source_that_is_too_short_is_an_error() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[1; 100], 0).unwrap();
        let from = FilePart {
            file: &file,
            start: 0,
        };
        assert!(copy(&from, 2 << 20, &Writes::default(), &ignore).is_err());
    }

    #[test]
    fn whoever_watches_can_end_it() {
        let file = tempfile::tempfile().unwrap();
        let length = 1 << 30;
        file.set_len(length).unwrap();
        let from = FilePart {
            file: &file,
            start: 0,
        };
        let seen = AtomicU64::new(0);
        let enough = |bytes| match seen.fetch_add(bytes, Ordering::Relaxed) {
            0 => Ok(()),
            _ => Err(io::ErrorKind::Interrupted.into()),
        };
        let error = copy(&from, length, &Writes::default(), &enough).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::Interrupted);
        assert!(seen.into_inner() < length / 2);
    }

    proptest! {
        #[test]
        fn copies_are_the_same(
            pages in proptest::collection::vec((0..3000_usize, any::<u8>()), 0..60),
            length in 1..3000_usize,
        ) {
            let length = length * PAGE;
            let mut content = vec![0; length];
            let [from, to] = [(); 2].map(|()| tempfile::tempfile().unwrap());
            for (page, value) in pages {
                if let Some(bytes) = content.get_mut(page * PAGE..(page + 1) * PAGE) {
                    bytes.fill(value);
                    from.write_all_at(bytes, (page * PAGE) as u64).unwrap();
                }
            }
            from.set_len(length as u64).unwrap();
            to.set_len(length as u64).unwrap();
            let part = |file| FilePart { file, start: 0 };
            copy(&part(&from), length as u64, &part(&to), &ignore).unwrap();
            let mut copied = vec![0xff; length];
            to.read_exact_at(&mut copied, 0).unwrap();
            prop_assert!(copied == content);
        }
    }
}
