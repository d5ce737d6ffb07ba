//! The disk's own share of the time that I/O takes: a driver in this process, an image in the page cache.

#![allow(clippy::unwrap_used, reason = "a benchmark panics when it fails")]

#[path = "../tests/support/mod.rs"]
mod support;

use std::time::{Duration, Instant};

use device_servers::disk::{self, Options};
use support::queue::Queue;
use support::{BUFFERS, EVENT_IDX, Machine, Ram};

const FLUSH: u64 = 1 << 9;
const IN: u32 = 0;
const OUT: u32 = 1;
const IMAGE_SIZE: u64 = 64 << 20;

/// A disk with its driver, and requests that are in memory already.
struct Bench {
    _machine: Machine,
    queue: Queue,
    ram: Ram,
    /// Kind, number of requests at a time, and bytes of each.
    kind: u32,
    depth: u64,
    length: u32,
    position: u64,
}

impl Bench {
    fn new(options: &Options, kind: u32, depth: u64, length: u32) -> Self {
        let options = options.clone();
        let mut machine = Machine::new(move || disk::server(&options).unwrap());
        machine.enable_msix();
        let queue = machine.start(EVENT_IDX | FLUSH, 1, 256).remove(0);
        Self {
            ram: machine.ram.clone(),
            _machine: machine,
            queue,
            kind,
            depth,
            length,
            position: 0,
        }
    }

    /// Does as many requests as the depth is, all at once.
    fn run(&mut self) {
        for slot in 0..self.depth {
            let sectors = u64::from(self.length) / 512;
            // All over the image, for short requests.
            self.position = (self.position + 61 * sectors) % (IMAGE_SIZE / 512);
            let header = BUFFERS + slot * 32;
            let mut bytes = u64::from(self.kind).to_le_bytes().to_vec();
            bytes.extend(self.position.to_le_bytes());
            self.ram.write(header, &bytes);
            let data = BUFFERS + 0x1_0000 + slot * u64::from(self.length);
            self.queue.add(&[
                (header, 16, false),
                (data, self.length, self.kind == IN),
                (header + 16, 1, true),
            ]);
        }
        self.queue.kick();
        for _ in 0..self.depth {
            let (_, written) = self.queue.wait();
            assert!(self.kind == OUT || written == self.length + 1);
        }
    }
}

fn main() {
    // `cargo test --benches` only wants to know that it works.
    let is_test = !std::env::args().any(|argument| argument == "--bench");
    let rounds = if is_test { 1 } else { 50 };
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = folder.path().join("image");
    std::fs::write(&path, vec![0x5a; usize::try_from(IMAGE_SIZE).unwrap()]).unwrap();
    let options = Options::new(&path);
    for (name, kind) in [("read", IN), ("write", OUT)] {
        for (depth, length) in [(1, 4096), (32, 4096), (1, 1 << 20)] {
            let mut bench = Bench::new(&options, kind, depth, length);
            let mut times: Vec<_> = (0..rounds).map(|_| time(|| bench.run())).collect();
            times.sort_unstable();
            let [best, median] = [times[0], times[times.len() / 2]];
            println!(
                "{name:5} {length:7} bytes, {depth:2} at a time: {best:?} (median {median:?})"
            );
        }
    }
}

/// How long it takes, on the average of a few hundred times.
fn time(mut run: impl FnMut()) -> Duration {
    const TIMES: u32 = 300;
    let start = Instant::now();
    (0..TIMES).for_each(|_| run());
    start.elapsed() / TIMES
}
