//! What goes out in small pieces, in larger ones: pages that were written here and there take no system call each.

use std::io::{self, Write};

use vm_memory::bitmap::BitmapSlice;
use vm_memory::{VolatileMemoryError, VolatileSlice, WriteVolatile};

/// How much goes out at once, in bytes. Little of a large piece is copied to fill it up.
const ENOUGH: usize = 16 << 10;

/// A stream to which small pieces go together.
#[derive(Debug)]
pub(super) struct Gather<S> {
    stream: S,
    /// What has not gone out yet, less than [`ENOUGH`].
    pending: Vec<u8>,
}

impl<S: Write + WriteVolatile> Gather<S> {
    pub(super) fn new(stream: S) -> Self {
        Self {
            stream,
            pending: Vec::with_capacity(ENOUGH),
        }
    }

    /// Sends guest memory: what fits goes with the rest, and more than that straight from where it is.
    pub(super) fn write_memory<B: BitmapSlice>(
        &mut self,
        memory: &VolatileSlice<'_, B>,
    ) -> io::Result<()> {
        let before = self.pending.len();
        let copied = memory.len().min(ENOUGH - before);
        self.pending.resize(before + copied, 0);
        memory.copy_to(self.pending.get_mut(before..).unwrap_or_default());
        if self.pending.len() < ENOUGH {
            return Ok(());
        }
        self.send_pending()?;
        let rest = memory.offset(copied).map_err(into_io)?;
        self.stream.write_all_volatile(&rest).map_err(into_io)
    }

    /// The stream, to hear what comes the other way.
    pub(super) fn below(&mut self) -> &mut S {
        &mut self.stream
    }

    /// The stream, when everything has gone out.
    #[cfg(test)]
    pub(super) fn into_stream(mut self) -> io::Result<S> {
        self.flush()?;
        Ok(self.stream)
    }

    fn send_pending(&mut self) -> io::Result<()> {
        // What has failed is not tried again: nobody knows how much of it has gone out.
        let sent = self.stream.write_all(&self.pending);
        self.pending.clear();
        sent
    }
}

impl<S: Write + WriteVolatile> Write for Gather<S> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.pending.extend(bytes);
        if self.pending.len() >= ENOUGH {
            self.send_pending()?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.send_pending()?;
        self.stream.flush()
    }
}

/// The error below.
pub(super) fn into_io(error: VolatileMemoryError) -> io::Error {
    match error {
        VolatileMemoryError::IOError(error) => error,
        error => io::Error::other(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use proptest::prelude::*;

    /// Takes at most so much at a time, and counts how often.
    struct Slow {
        most: usize,
        taken: Vec<u8>,
        calls: usize,
    }

    impl Write for Slow {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let (now, _) = bytes.split_at(bytes.len().min(self.most));
            self.taken.extend(now);
            self.calls += 1;
            Ok(now.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl WriteVolatile for Slow {
        fn write_volatile<B: BitmapSlice>(
            &mut self,
            memory: &VolatileSlice<'_, B>,
        ) -> Result<usize, VolatileMemoryError> {
            let mut copy = vec![0; memory.len()];
            memory.copy_to(&mut copy);
            self.write(&copy).map_err(VolatileMemoryError::IOError)
        }
    }

    fn gather(most: usize) -> Gather<Slow> {
        Gather::new(Slow {
            most,
            taken: Vec::new(),
            calls: 0,
        })
    }

    proptest! {
        #[test]
        fn everything_goes_out_in_order(
            pieces in proptest::collection::vec((any::<bool>(), any::<u8>(), 0..3 * ENOUGH), 0..12),
            most in 1000..2 * ENOUGH,
        ) {
            let mut gather = gather(most);
            let mut expected: Vec<u8> = Vec::new();
            for (is_memory, value, length) in pieces {
                let mut piece = vec![value; length];
                expected.extend(&piece);
                if is_memory {
                    gather.write_memory(&VolatileSlice::from(&mut *piece)).unwrap();
                } else {
                    gather.write_all(&piece).unwrap();
                }
                prop_assert!(gather.pending.len() < ENOUGH);
            }
            gather.flush().unwrap();
            prop_assert!(gather.stream.taken == expected);
        }
    }

    #[test]
    fn single_pages_go_together() {
        let mut gather = gather(usize::MAX);
        let mut page = [1; 4096];
        for _ in 0..100 {
            gather.write_all(&[0; 32]).unwrap();
            gather
                .write_memory(&VolatileSlice::from(&mut page[..]))
                .unwrap();
        }
        gather.flush().unwrap();
        assert!(gather.stream.calls < 60, "{}", gather.stream.calls);
    }
}
