//! A disk with an image, its driver, and load for it.

#![allow(dead_code, reason = "not every test needs everything")]

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use device_servers::disk::{self, Options};
use tempfile::TempDir;

use crate::support::queue::Queue;
use crate::support::{BUFFERS, Machine, Ram};

pub(crate) const READONLY: u64 = 1 << 5;
pub(crate) const FLUSH: u64 = 1 << 9;
pub(crate) const CONFIG_WCE: u64 = 1 << 11;
pub(crate) const MULTI_QUEUE: u64 = 1 << 12;
pub(crate) const DISCARD: u64 = 1 << 13;
pub(crate) const WRITE_ZEROES: u64 = 1 << 14;
pub(crate) const USUAL: u64 = FLUSH | DISCARD | WRITE_ZEROES;

// Kinds of requests.
pub(crate) const IN: u32 = 0;
pub(crate) const OUT: u32 = 1;
pub(crate) const SYNC: u32 = 4;
pub(crate) const GET_ID: u32 = 8;
pub(crate) const DROP: u32 = 11;
pub(crate) const ZERO: u32 = 13;

// What the status says.
pub(crate) const OK: u8 = 0;
pub(crate) const FAILED: u8 = 1;
pub(crate) const UNSUPPORTED: u8 = 2;

pub(crate) const IMAGE_SIZE: u64 = 16 << 20;

/// An image in a folder of its own.
pub(crate) struct Image {
    pub(crate) folder: TempDir,
    pub(crate) path: PathBuf,
}

impl Image {
    /// An image in which each byte says where it is.
    pub(crate) fn new() -> Self {
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let path = folder.path().join("image");
        let sectors = (0..IMAGE_SIZE / 512).flat_map(|sector| pattern(sector, 0));
        std::fs::write(&path, sectors.collect::<Vec<_>>()).unwrap();
        Self { folder, path }
    }

    pub(crate) fn options(&self) -> Options {
        Options::new(&self.path)
    }

    pub(crate) fn read(&self, sector: u64, length: usize) -> Vec<u8> {
        let mut data = vec![0; length];
        let file = File::open(&self.path).unwrap();
        file.read_exact_at(&mut data, sector * 512).unwrap();
        data
    }
}

/// What a sector holds after it has been written for the `round`th time.
pub(crate) fn pattern(sector: u64, round: u64) -> Vec<u8> {
    let words = (0..64_u64).map(|word| {
        let seed = sector << 32 | round << 8 | word;
        seed.wrapping_mul(0x9e37_79b9_7f4a_7c15)
    });
    words.flat_map(u64::to_le_bytes).collect()
}

pub(crate) fn patterns(sector: u64, count: u64, round: u64) -> Vec<u8> {
    let sectors = (sector..sector + count).flat_map(|sector| pattern(sector, round));
    sectors.collect()
}

/// A disk that is ready, with its queues.
pub(crate) struct Disk {
    pub(crate) machine: Machine,
    pub(crate) queues: Vec<Queue>,
}

impl Disk {
    pub(crate) fn new(options: &Options, features: u64) -> Self {
        Self::with_ram(options, features, Ram::new())
    }

    pub(crate) fn with_ram(options: &Options, features: u64, ram: Ram) -> Self {
        let mut machine = attach(options, ram);
        machine.enable_msix();
        let queues = machine.start(features, options.num_queues, options.queue_size);
        Self { machine, queues }
    }

    pub(crate) fn ram(&self) -> &Ram {
        &self.machine.ram
    }

    /// Puts a request into memory at a place of its own, and returns the buffers of its chain.
    pub(crate) fn request(
        &self,
        place: u64,
        kind: u32,
        sector: u64,
        data: &[(u64, u32)],
    ) -> Vec<(u64, u32, bool)> {
        put_request(self.ram(), place, kind, sector, data)
    }

    /// Does one request, and returns its status and how much was written.
    pub(crate) fn run(&mut self, kind: u32, sector: u64, data: &[(u64, u32)]) -> (u8, u32) {
        let buffers = self.request(BUFFERS, kind, sector, data);
        let head = self.queues[0].add(&buffers);
        self.queues[0].kick();
        let (used, written) = self.queues[0].wait();
        assert_eq!(used, head);
        (self.ram().read(BUFFERS + 16, 1)[0], written)
    }

    pub(crate) fn read(&mut self, sector: u64, length: u32) -> (u8, Vec<u8>) {
        let (status, written) = self.run(IN, sector, &[(DATA, length)]);
        if status == OK {
            assert_eq!(written, length + 1);
        }
        let length = usize::try_from(length).unwrap();
        (status, self.ram().read(DATA, length))
    }

    pub(crate) fn write(&mut self, sector: u64, data: &[u8]) -> u8 {
        self.ram().write(DATA, data);
        let length = data.len().try_into().unwrap();
        let (status, written) = self.run(OUT, sector, &[(DATA, length)]);
        assert_eq!(written, 1);
        status
    }

    /// Discards extents or makes them zeroes: sector, number and flags of each.
    pub(crate) fn extents(&mut self, kind: u32, extents: &[(u64, u32, u32)]) -> u8 {
        let bytes = extents.iter().flat_map(|(sector, sectors, flags)| {
            let mut bytes = sector.to_le_bytes().to_vec();
            bytes.extend(sectors.to_le_bytes());
            bytes.extend(flags.to_le_bytes());
            bytes
        });
        let bytes: Vec<_> = bytes.collect();
        self.ram().write(DATA, &bytes);
        let length = bytes.len().try_into().unwrap();
        self.run(kind, 0, &[(DATA, length)]).0
    }
}

/// Where data is, unless a test has several.
pub(crate) const DATA: u64 = BUFFERS + 0x1000;

pub(crate) fn attach(options: &Options, ram: Ram) -> Machine {
    let options = options.clone();
    Machine::with_ram(move || disk::server(&options).unwrap(), ram)
}

pub(crate) fn put_request(
    ram: &Ram,
    place: u64,
    kind: u32,
    sector: u64,
    data: &[(u64, u32)],
) -> Vec<(u64, u32, bool)> {
    let mut header = kind.to_le_bytes().to_vec();
    header.extend([0; 4]);
    header.extend(sector.to_le_bytes());
    header.push(0xff);
    ram.write(place, &header);
    let is_read = matches!(kind, IN | GET_ID);
    let data = data.iter().map(|(at, length)| (*at, *length, is_read));
    let mut buffers = vec![(place, 16, false)];
    buffers.extend(data);
    buffers.push((place + 16, 1, true));
    buffers
}

/// Does random I/O over one queue at a depth, and checks what is read. Each request has sectors of its own kind: those
/// of different queues are apart.
pub(crate) struct Load {
    seed: u64,
    /// The sectors that are used, in units of 8.
    blocks: std::ops::Range<u64>,
    /// How often each block has been written, and whether it is in use.
    pub(crate) rounds: BTreeMap<u64, u64>,
    pub(crate) busy: BTreeMap<u16, (u64, u32, u64)>,
    pub(crate) places: Vec<u64>,
    pub(crate) writes: u64,
}

impl Load {
    pub(crate) fn new(seed: u64, blocks: std::ops::Range<u64>, place: u64, depth: u64) -> Self {
        Self {
            seed,
            blocks,
            rounds: BTreeMap::new(),
            busy: BTreeMap::new(),
            places: (0..depth).map(|slot| place + slot * 0x2000).collect(),
            writes: 0,
        }
    }

    fn random(&mut self) -> u64 {
        self.seed ^= self.seed << 13;
        self.seed ^= self.seed >> 7;
        self.seed ^= self.seed << 17;
        self.seed
    }

    /// Adds requests until the depth is reached.
    pub(crate) fn fill(&mut self, queue: &mut Queue, ram: &Ram) {
        while let Some(place) = self.places.pop() {
            let count = self.blocks.end - self.blocks.start;
            let block = self.blocks.start + self.random() % count;
            let is_busy = |(other, _, _): &(u64, u32, u64)| *other == block;
            let kind = if self.busy.values().any(is_busy) {
                SYNC
            } else if self.random().is_multiple_of(2) {
                IN
            } else {
                OUT
            };
            let data = [(place + 0x1000, 4096)];
            let data = if kind == SYNC { &[][..] } else { &data };
            if kind == OUT {
                let round = self.rounds.entry(block).or_default();
                *round += 1;
                self.writes += 1;
                ram.write(place + 0x1000, &patterns(8 * block, 8, *round));
            }
            let buffers = put_request(ram, place, kind, 8 * block, data);
            let head = queue.add(&buffers);
            self.busy.insert(head, (block, kind, place));
        }
        queue.kick();
    }

    /// Waits for one request, and checks it.
    pub(crate) fn complete(&mut self, queue: &mut Queue, ram: &Ram) {
        let (head, written) = queue.wait();
        // A head that is not there has been used twice.
        let (block, kind, place) = self.busy.remove(&head).unwrap();
        assert_eq!(ram.read(place + 16, 1), [OK]);
        assert_eq!(written, if kind == IN { 4097 } else { 1 });
        if kind == IN {
            let round = self.rounds.get(&block).copied().unwrap_or(0);
            let data = ram.read(place + 0x1000, 4096);
            assert!(data == patterns(8 * block, 8, round), "block {block}");
        }
        self.places.push(place);
    }

    /// Checks all that was written.
    pub(crate) fn check(&self, image: &Image) {
        for (block, round) in &self.rounds {
            let data = image.read(8 * block, 4096);
            assert!(data == patterns(8 * block, 8, *round), "block {block}");
        }
    }

    pub(crate) fn run(&mut self, queue: &mut Queue, ram: &Ram, requests: u64) {
        let mut done = 0;
        while done < requests {
            self.fill(queue, ram);
            self.complete(queue, ram);
            done += 1;
        }
    }

    pub(crate) fn finish(&mut self, queue: &mut Queue, ram: &Ram) {
        while !self.busy.is_empty() {
            self.complete(queue, ram);
        }
    }
}
