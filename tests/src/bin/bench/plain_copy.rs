//! A plain copy of memory to other memory: what a migration cannot be faster than.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use rustix::fs::{MemfdFlags, memfd_create};
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, ReadVolatile, WriteVolatile,
};

/// Memory that is in use, in a memfd as guest memory is.
pub(crate) struct Copy {
    memory: GuestMemoryMmap,
    size: u64,
}

/// Bytes that go over in one go.
const PIECE: usize = 1 << 20;

impl Copy {
    /// Memory of this size, a multiple of the largest number of connections and of [`PIECE`].
    pub(crate) fn new(size: u64) -> anyhow::Result<Self> {
        let memory = fresh(size)?;
        let mut all = memory.get_slice(GuestAddress(0), usize::try_from(size)?)?;
        let piece = vec![0x5a; PIECE];
        while !all.is_empty() {
            let (now, later) = (all.subslice(0, PIECE)?, all.offset(PIECE)?);
            now.copy_from(&piece);
            all = later;
        }
        Ok(Self { memory, size })
    }

    /// How long it takes over so many pairs of Unix sockets.
    pub(crate) fn over_unix(&self, connections: u32) -> anyhow::Result<Duration> {
        let pairs = (0..connections).map(|_| Ok(UnixStream::pair()?));
        self.over(pairs.collect::<anyhow::Result<_>>()?)
    }

    /// How long it takes over so many TCP connections.
    pub(crate) fn over_tcp(&self, connections: u32) -> anyhow::Result<Duration> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let pairs = (0..connections).map(|_| {
            let sender = TcpStream::connect(address)?;
            Ok((sender, listener.accept()?.0))
        });
        self.over(pairs.collect::<anyhow::Result<_>>()?)
    }

    fn over<S>(&self, pairs: Vec<(S, S)>) -> anyhow::Result<Duration>
    where
        S: Read + Write + ReadVolatile + WriteVolatile + Send,
    {
        let began = Instant::now();
        let target = fresh(self.size)?;
        let share = self.size / u64::try_from(pairs.len())?;
        thread::scope(|scope| {
            let mut threads = Vec::new();
            for (number, (mut sender, mut receiver)) in (0u64..).zip(pairs) {
                let start = GuestAddress(number * share);
                let size = usize::try_from(share)?;
                let (from, to) = (&self.memory, &target);
                threads.push(scope.spawn(move || -> anyhow::Result<()> {
                    let from = from.get_slice(start, size)?;
                    for offset in (0..size).step_by(PIECE) {
                        sender.write_all_volatile(&from.subslice(offset, PIECE)?)?;
                    }
                    Ok(())
                }));
                threads.push(scope.spawn(move || -> anyhow::Result<()> {
                    let to = to.get_slice(start, size)?;
                    for offset in (0..size).step_by(PIECE) {
                        receiver.read_exact_volatile(&mut to.subslice(offset, PIECE)?)?;
                    }
                    Ok(())
                }));
            }
            for thread in threads {
                thread.join().map_err(|_| anyhow!("a thread panicked"))??;
            }
            Ok(began.elapsed())
        })
    }
}

/// Memory that nobody has touched.
pub(crate) fn fresh(size: u64) -> anyhow::Result<GuestMemoryMmap> {
    let file = File::from(memfd_create("copy", MemfdFlags::CLOEXEC)?);
    file.set_len(size)?;
    let part = FileOffset::new(file, 0);
    let range = (GuestAddress(0), usize::try_from(size)?, Some(part));
    GuestMemoryMmap::from_ranges_with_files([range]).context("mapping memory")
}
