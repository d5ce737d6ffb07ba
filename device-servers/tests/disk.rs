//! The disk, by a driver as a guest has it.

#![expect(clippy::unwrap_used, reason = "a test panics when it fails")]

mod support;

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use device_servers::disk::{self, Options};
use support::{
    BASE, BUFFERS, EVENT_IDX, INDIRECT, INDIRECT_TABLE, Machine, NEEDS_RESET, NEXT, Queue, Ram,
    SIZE, VERSION_1, WRITE, event, wait_for,
};
use tempfile::TempDir;
use vfio_user_client::{ConnError, DeviceState, DmaAccess};

const READONLY: u64 = 1 << 5;
const FLUSH: u64 = 1 << 9;
const CONFIG_WCE: u64 = 1 << 11;
const MULTI_QUEUE: u64 = 1 << 12;
const DISCARD: u64 = 1 << 13;
const WRITE_ZEROES: u64 = 1 << 14;
const USUAL: u64 = FLUSH | DISCARD | WRITE_ZEROES;

// Kinds of requests.
const IN: u32 = 0;
const OUT: u32 = 1;
const SYNC: u32 = 4;
const GET_ID: u32 = 8;
const DROP: u32 = 11;
const ZERO: u32 = 13;

// What the status says.
const OK: u8 = 0;
const FAILED: u8 = 1;
const UNSUPPORTED: u8 = 2;

const IMAGE_SIZE: u64 = 16 << 20;

/// An image in a folder of its own.
struct Image {
    folder: TempDir,
    path: PathBuf,
}

impl Image {
    /// An image in which each byte says where it is.
    fn new() -> Self {
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let path = folder.path().join("image");
        let sectors = (0..IMAGE_SIZE / 512).flat_map(|sector| pattern(sector, 0));
        std::fs::write(&path, sectors.collect::<Vec<_>>()).unwrap();
        Self { folder, path }
    }

    fn options(&self) -> Options {
        Options::new(&self.path)
    }

    fn read(&self, sector: u64, length: usize) -> Vec<u8> {
        let mut data = vec![0; length];
        let file = File::open(&self.path).unwrap();
        file.read_exact_at(&mut data, sector * 512).unwrap();
        data
    }
}

/// What a sector holds after it has been written for the `round`th time.
fn pattern(sector: u64, round: u64) -> Vec<u8> {
    let words = (0..64_u64).map(|word| {
        let seed = sector << 32 | round << 8 | word;
        seed.wrapping_mul(0x9e37_79b9_7f4a_7c15)
    });
    words.flat_map(u64::to_le_bytes).collect()
}

fn patterns(sector: u64, count: u64, round: u64) -> Vec<u8> {
    let sectors = (sector..sector + count).flat_map(|sector| pattern(sector, round));
    sectors.collect()
}

/// A disk that is ready, with its queues.
struct Disk {
    machine: Machine,
    queues: Vec<Queue>,
}

impl Disk {
    fn new(options: &Options, features: u64) -> Self {
        Self::with_ram(options, features, Ram::new())
    }

    fn with_ram(options: &Options, features: u64, ram: Ram) -> Self {
        let mut machine = attach(options, ram);
        machine.enable_msix();
        let queues = machine.start(features, options.num_queues, options.queue_size);
        Self { machine, queues }
    }

    fn ram(&self) -> &Ram {
        &self.machine.ram
    }

    /// Puts a request into memory at a place of its own, and returns the buffers of its chain.
    fn request(
        &self,
        place: u64,
        kind: u32,
        sector: u64,
        data: &[(u64, u32)],
    ) -> Vec<(u64, u32, bool)> {
        put_request(self.ram(), place, kind, sector, data)
    }

    /// Does one request, and returns its status and how much was written.
    fn run(&mut self, kind: u32, sector: u64, data: &[(u64, u32)]) -> (u8, u32) {
        let buffers = self.request(BUFFERS, kind, sector, data);
        let head = self.queues[0].add(&buffers);
        self.queues[0].kick();
        let (used, written) = self.queues[0].wait();
        assert_eq!(used, head);
        (self.ram().read(BUFFERS + 16, 1)[0], written)
    }

    fn read(&mut self, sector: u64, length: u32) -> (u8, Vec<u8>) {
        let (status, written) = self.run(IN, sector, &[(DATA, length)]);
        if status == OK {
            assert_eq!(written, length + 1);
        }
        let length = usize::try_from(length).unwrap();
        (status, self.ram().read(DATA, length))
    }

    fn write(&mut self, sector: u64, data: &[u8]) -> u8 {
        self.ram().write(DATA, data);
        let length = data.len().try_into().unwrap();
        let (status, written) = self.run(OUT, sector, &[(DATA, length)]);
        assert_eq!(written, 1);
        status
    }

    /// Discards extents or makes them zeroes: sector, number and flags of each.
    fn extents(&mut self, kind: u32, extents: &[(u64, u32, u32)]) -> u8 {
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
const DATA: u64 = BUFFERS + 0x1000;

fn attach(options: &Options, ram: Ram) -> Machine {
    let options = options.clone();
    Machine::with_ram(move || disk::server(&options).unwrap(), ram)
}

fn put_request(
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

#[test]
fn the_disk_says_what_it_is() {
    let image = Image::new();
    let options = Options {
        num_queues: 3,
        queue_size: 64,
        ..image.options()
    };
    let machine = attach(&options, Ram::new());
    let mut config = [0; 256];
    machine.client.region_read(7, 0, &mut config).unwrap();
    assert_eq!(config[..4], [0xf4, 0x1a, 0x42, 0x10]);
    assert_eq!(config[8..12], [1, 0, 0, 1]);
    assert_eq!(machine.client.irq_info(2).unwrap().count, 4);
    let offered = machine.offered();
    for feature in [
        VERSION_1,
        INDIRECT,
        EVENT_IDX,
        USUAL,
        CONFIG_WCE,
        MULTI_QUEUE,
    ] {
        assert_eq!(offered & feature, feature, "{feature:#x}");
    }
    assert_eq!(offered & READONLY, 0);
    let config: [u8; 60] = machine.read(machine.places.config);
    let dword = |at: usize| u32::from_le_bytes(*config[at..].first_chunk().unwrap());
    let sectors = u32::try_from(IMAGE_SIZE / 512).unwrap();
    assert_eq!((dword(0), dword(4)), (sectors, 0));
    assert_eq!((dword(12), dword(20)), (62, 512));
    assert_eq!((config[32], config[34]), (1, 3));
    // Nothing is accepted that was not offered, nor a driver of the days before.
    assert!(!machine.negotiate(VERSION_1 | 1 << 34));
    assert!(!machine.negotiate(FLUSH));
    assert!(machine.negotiate(VERSION_1 | FLUSH));
}

#[test]
fn data_is_read_and_written() {
    let image = Image::new();
    for features in [USUAL, USUAL | EVENT_IDX | INDIRECT, 0, USUAL | CONFIG_WCE] {
        let mut disk = Disk::new(&image.options(), features);
        assert_eq!(disk.read(3, 4096), (OK, image.read(3, 4096)));
        assert_eq!(disk.write(100, &patterns(100, 20, 7)), OK);
        assert_eq!(image.read(100, 20 * 512), patterns(100, 20, 7));
        assert_eq!(disk.read(99, 22 * 512), (OK, image.read(99, 22 * 512)));
        assert_eq!(disk.run(SYNC, 0, &[]).0, OK);
        // The first and the last sector.
        let last = IMAGE_SIZE / 512 - 1;
        assert_eq!(disk.write(0, &pattern(0, 9)), OK);
        assert_eq!(disk.write(last, &pattern(last, 9)), OK);
        assert_eq!(disk.read(last, 512), (OK, pattern(last, 9)));
        disk.machine.end();
    }
}

#[test]
fn data_may_be_in_any_pieces() {
    let image = Image::new();
    let direct = Options {
        direct: true,
        ..image.options()
    };
    for options in [image.options(), direct] {
        let mut disk = Disk::new(&options, USUAL);
        // 3 + 509 + 1 + 1023 + 1000 + 24 bytes: five sectors.
        let pieces = [
            (DATA + 1, 3),
            (DATA + 0x1003, 509),
            (DATA + 0x3000, 1),
            (DATA + 0x4101, 1023),
            (DATA + 0x5fff, 1000),
            (DATA + 0x8000, 24),
        ];
        let (status, written) = disk.run(IN, 40, &pieces);
        assert_eq!((status, written), (OK, 5 * 512 + 1));
        let gather = |disk: &Disk| {
            let read = |(at, length): &(u64, u32)| disk.ram().read(*at, *length as usize);
            pieces.iter().flat_map(read).collect::<Vec<_>>()
        };
        assert_eq!(gather(&disk), image.read(40, 5 * 512));
        let (status, _) = disk.run(OUT, 90, &pieces);
        assert_eq!(status, OK);
        assert_eq!(image.read(90, 5 * 512), image.read(40, 5 * 512));
        // A header in three pieces, of which the last has data too, and a status behind data.
        let buffers = put_request(disk.ram(), BUFFERS, IN, 7, &[]);
        let header = buffers[0].0;
        let chain = [
            (header, 5, false),
            (header + 5, 1, false),
            (header + 6, 10, false),
            (DATA, 513, true),
        ];
        disk.queues[0].add(&chain);
        disk.queues[0].kick();
        assert_eq!(disk.queues[0].wait().1, 513);
        let data = disk.ram().read(DATA, 513);
        assert_eq!((&data[..512], data[512]), (&image.read(7, 512)[..], OK));
        disk.machine.end();
    }
}

#[test]
fn large_requests_are_done_whole() {
    let image = Image::new();
    let mut disk = Disk::new(&image.options(), USUAL);
    let length = 8 << 20;
    let (status, data) = disk.read(0, length);
    assert!(status == OK && data == image.read(0, 8 << 20));
    // By buffers, for there is not all of it in mapped memory.
    let data = patterns(4096, 4096, 3);
    assert_eq!(disk.write(4096, &data), OK);
    assert!(image.read(4096, 2 << 20) == data);
    assert!(disk.read(4096, 2 << 20) == (OK, data));
}

#[test]
fn memory_that_is_not_mapped_is_reached_by_messages() {
    let image = Image::new();
    let mut disk = Disk::new(&image.options(), USUAL);
    let machine = &disk.machine;
    // The second half is taken away, and comes back without a file.
    machine.client.dma_unmap(BASE, SIZE).unwrap();
    let half = SIZE / 2;
    let file = Some((disk.ram().file().as_fd(), 0));
    let map = |address, file| {
        let access = DmaAccess::ReadWrite;
        machine.client.dma_map(address, half, file, access).unwrap();
    };
    map(BASE, file);
    map(BASE + half, None);
    let buffer = BASE + half - 1000;
    let (status, _) = disk.run(IN, 5, &[(buffer, 1 << 20)]);
    assert_eq!(status, OK);
    assert!(disk.ram().read(buffer, 1 << 20) == image.read(5, 1 << 20));
    disk.ram().write(buffer, &patterns(6, 1000, 2));
    assert_eq!(disk.run(OUT, 6, &[(buffer, 1000 * 512)]).0, OK);
    assert!(image.read(6, 1000 * 512) == patterns(6, 1000, 2));
    // Header and status too.
    let buffers = put_request(disk.ram(), BASE + half, IN, 9, &[(DATA, 512)]);
    disk.queues[0].add(&buffers);
    disk.queues[0].kick();
    disk.queues[0].wait();
    assert_eq!(disk.ram().read(BASE + half + 16, 1), [OK]);
    assert!(disk.machine.client.counters().served > 4);
}

#[test]
fn the_serial_number_is_told() {
    let image = Image::new();
    let options = Options {
        serial: "disk 0123456789".to_owned(),
        ..image.options()
    };
    let mut disk = Disk::new(&options, USUAL);
    assert_eq!(disk.run(GET_ID, 0, &[(DATA, 20)]), (OK, 21));
    assert_eq!(disk.ram().read(DATA, 20), b"disk 0123456789\0\0\0\0\0");
    assert_eq!(disk.run(GET_ID, 0, &[(DATA, 4)]), (OK, 5));
    assert_eq!(disk.run(GET_ID, 0, &[(DATA, 4096)]), (OK, 21));
    assert_eq!(disk.run(77, 0, &[]), (UNSUPPORTED, 1));
}

#[test]
fn sectors_are_discarded_and_become_zeroes() {
    let image = Image::new();
    let mut disk = Disk::new(&image.options(), USUAL);
    let blocks = || std::fs::metadata(&image.path).unwrap().blocks();
    let before = blocks();
    assert_eq!(disk.extents(DROP, &[(0, 8192, 0), (16384, 8192, 0)]), OK);
    assert!(blocks() < before);
    let kept = image.read(8192, 512);
    assert_eq!(kept, pattern(8192, 0));
    for flags in [0, 1] {
        assert_eq!(disk.write(24000, &patterns(24000, 100, 1)), OK);
        let extents = [(24001, 3, flags), (24010, 80, flags), (24099, 0, flags)];
        assert_eq!(disk.extents(ZERO, &extents), OK);
        let mut expected = patterns(24000, 100, 1);
        expected[512..4 * 512].fill(0);
        expected[10 * 512..90 * 512].fill(0);
        assert!(image.read(24000, 100 * 512) == expected);
    }
    let last = IMAGE_SIZE / 512;
    for (kind, extents, expected) in [
        (DROP, vec![(last - 1, 2, 0)], FAILED),
        (DROP, vec![(u64::MAX, 2, 0)], FAILED),
        (DROP, vec![(0, u32::MAX, 0)], FAILED),
        (DROP, vec![(0, 1, 1)], UNSUPPORTED),
        (DROP, vec![(0, 1, 2)], UNSUPPORTED),
        (ZERO, vec![(0, 1, 2)], UNSUPPORTED),
        (ZERO, vec![(0, 1, 0), (last, 1, 0)], FAILED),
        (ZERO, vec![], FAILED),
        (ZERO, vec![(0, 1, 0); 33], FAILED),
    ] {
        assert_eq!(disk.extents(kind, &extents), expected, "{extents:?}");
    }
    assert_eq!(disk.run(DROP, 0, &[(DATA, 15)]).0, FAILED);
    assert_eq!(image.read(0, 512), [0; 512]);
}

#[test]
fn nothing_is_written_through_a_read_only_disk() {
    let image = Image::new();
    let options = Options {
        readonly: true,
        ..image.options()
    };
    let mut disk = Disk::new(&options, FLUSH);
    assert_eq!(disk.machine.offered() & (READONLY | DISCARD), READONLY);
    assert_eq!(disk.read(8, 512), (OK, pattern(8, 0)));
    assert_eq!(disk.write(8, &pattern(8, 1)), FAILED);
    assert_eq!(disk.extents(DROP, &[(0, 1, 0)]), FAILED);
    assert_eq!(disk.extents(ZERO, &[(0, 1, 0)]), FAILED);
    assert_eq!(disk.run(SYNC, 0, &[]).0, OK);
    // Others may read it at the same time, and nobody may write it.
    let mut other = Disk::new(&options, FLUSH);
    assert_eq!(other.read(8, 512), (OK, pattern(8, 0)));
    let error = disk::server(&image.options()).unwrap_err().to_string();
    assert!(error.contains("another VM"), "{error}");
}

#[test]
fn what_is_not_in_the_image_is_refused() {
    let image = Image::new();
    let mut disk = Disk::new(&image.options(), USUAL);
    let last = IMAGE_SIZE / 512;
    for (sector, length) in [
        (last, 512),
        (last - 1, 1024),
        (u64::MAX, 512),
        (u64::MAX / 512, 512),
        (1 << 55, 512),
        (0, 511),
        (0, 1),
    ] {
        assert_eq!(disk.run(IN, sector, &[(DATA, length)]).0, FAILED);
        assert_eq!(disk.run(OUT, sector, &[(DATA, length)]).0, FAILED);
    }
    assert_eq!(disk.run(IN, 0, &[]), (OK, 1));
    // Memory that is not there.
    for address in [
        BASE - 512,
        BASE + SIZE - 100,
        1 << 60,
        u64::MAX - 511,
        u64::MAX - 3,
    ] {
        assert_eq!(disk.run(IN, 0, &[(address, 512)]).0, FAILED);
        assert_eq!(disk.run(OUT, 0, &[(address, 512)]).0, FAILED);
    }
    assert!(image.read(0, 1 << 20) == patterns(0, 2048, 0));
    assert_eq!(disk.read(8, 512), (OK, pattern(8, 0)));
}

#[test]
fn indirect_tables_are_followed() {
    let image = Image::new();
    let mut disk = Disk::new(&image.options(), USUAL | INDIRECT);
    let table = BUFFERS + 0x10_0000;
    let pieces: Vec<_> = (0..200).map(|piece| (DATA + piece * 1024, 512)).collect();
    let buffers = disk.request(BUFFERS, IN, 64, &pieces);
    disk.queues[0].add_indirect(table, &buffers);
    disk.queues[0].kick();
    assert_eq!(disk.queues[0].wait().1, 200 * 512 + 1);
    for (at, (address, _)) in (0..).zip(pieces) {
        assert_eq!(disk.ram().read(address, 512), pattern(64 + at, 0));
    }
}

/// Does random I/O over one queue at a depth, and checks what is read. Each request has sectors of its own kind: those
/// of different queues are apart.
struct Load {
    seed: u64,
    /// The sectors that are used, in units of 8.
    blocks: std::ops::Range<u64>,
    /// How often each block has been written, and whether it is in use.
    rounds: BTreeMap<u64, u64>,
    busy: BTreeMap<u16, (u64, u32, u64)>,
    places: Vec<u64>,
    writes: u64,
}

impl Load {
    fn new(seed: u64, blocks: std::ops::Range<u64>, place: u64, depth: u64) -> Self {
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
    fn fill(&mut self, queue: &mut Queue, ram: &Ram) {
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
    fn complete(&mut self, queue: &mut Queue, ram: &Ram) {
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
    fn check(&self, image: &Image) {
        for (block, round) in &self.rounds {
            let data = image.read(8 * block, 4096);
            assert!(data == patterns(8 * block, 8, *round), "block {block}");
        }
    }

    fn run(&mut self, queue: &mut Queue, ram: &Ram, requests: u64) {
        let mut done = 0;
        while done < requests {
            self.fill(queue, ram);
            self.complete(queue, ram);
            done += 1;
        }
    }

    fn finish(&mut self, queue: &mut Queue, ram: &Ram) {
        while !self.busy.is_empty() {
            self.complete(queue, ram);
        }
    }
}

#[test]
fn many_requests_in_many_queues_are_each_done_once() {
    let image = Image::new();
    for (features, direct) in [
        (USUAL, false),
        (USUAL | EVENT_IDX, false),
        (EVENT_IDX, true),
    ] {
        let image = Image {
            folder: tempfile::tempdir().unwrap(),
            path: image.path.clone(),
        };
        std::fs::write(&image.path, patterns(0, IMAGE_SIZE / 512, 0)).unwrap();
        let options = Options {
            num_queues: 4,
            queue_size: 128,
            direct,
            ..image.options()
        };
        let mut disk = Disk::new(&options, features);
        let calls = disk.machine.client.counters().calls;
        let ram = disk.ram().clone();
        let queues = std::mem::take(&mut disk.queues);
        let threads: Vec<_> = (0_u64..)
            .zip(queues)
            .map(|(number, mut queue)| {
                let ram = ram.clone();
                let blocks = 1000 * number..1000 * number + 1000;
                let place = BUFFERS + (number << 20);
                thread::spawn(move || {
                    let mut load = Load::new(number + 1, blocks, place, 40);
                    load.run(&mut queue, &ram, 1500);
                    load.finish(&mut queue, &ram);
                    load
                })
            })
            .collect();
        for thread in threads {
            thread.join().unwrap().check(&image);
        }
        // No vfio-user message was sent for all of that.
        let counters = disk.machine.client.counters();
        assert_eq!((counters.calls, counters.served), (calls, 0));
        disk.machine.end();
    }
}

#[test]
fn neither_side_notifies_more_than_it_has_to() {
    let image = Image::new();
    let mut disk = Disk::new(&image.options(), USUAL | EVENT_IDX);
    let ram = disk.ram().clone();
    let queue = &mut disk.queues[0];
    // 60 requests at once, with one interrupt wanted at the end.
    let mut load = Load::new(1, 0..1000, BUFFERS, 60);
    let at = queue.available() + 4 + 2 * u64::from(queue.size);
    ram.write(at, &59_u16.to_le_bytes());
    load.fill(queue, &ram);
    assert_eq!(queue.kicks, 1);
    let vector = queue.vector.clone().unwrap();
    assert_eq!(wait_for(&vector), 1);
    assert_eq!(ram.read16(queue.used() + 2), 60);
    load.finish(queue, &ram);
    assert_eq!(queue.interrupts, 0);
    // One request that was not notified of is seen all the same, before or with the next that is.
    load.run(queue, &ram, 500);
    load.finish(queue, &ram);
    assert!(queue.kicks <= 501);
    // Without the feature, the flag says whether to interrupt.
    let mut disk = {
        drop(load);
        disk.machine.end();
        Disk::new(&image.options(), USUAL)
    };
    let ram = disk.ram().clone();
    let queue = &mut disk.queues[0];
    ram.write(queue.available(), &[1, 0]);
    let buffers = put_request(&ram, BUFFERS, IN, 0, &[(DATA, 512)]);
    queue.add(&buffers);
    queue.kick();
    let start = Instant::now();
    while queue.pop().is_none() {
        assert!(start.elapsed() < support::LONG);
        thread::yield_now();
    }
    thread::sleep(Duration::from_millis(20));
    let vector = queue.vector.clone().unwrap();
    rustix::io::read(&*vector, &mut [0; 8]).unwrap_err();
}

#[test]
fn the_wired_interrupt_does_without_vectors() {
    let image = Image::new();
    let machine = attach(&image.options(), Ram::new());
    let line = event();
    let client = &machine.client;
    client.set_irq_events(0, 0, &[line.as_fd()]).unwrap();
    let mut queues = machine.start(USUAL, 1, 64);
    for sector in 0..3 {
        let buffers = put_request(&machine.ram, BUFFERS, IN, sector, &[(DATA, 512)]);
        queues[0].add(&buffers);
        queues[0].kick();
        assert_eq!(wait_for(&line), 1);
        assert_eq!(machine.read(machine.places.isr), [1]);
        assert_eq!(machine.read(machine.places.isr), [0]);
        assert!(queues[0].pop().is_some());
        assert_eq!(machine.ram.read(DATA, 512), pattern(sector, 0));
        client.unmask_irq(0, 0, 1).unwrap();
    }
    rustix::io::read(&line, &mut [0; 8]).unwrap_err();
}

#[test]
fn hostile_chains_are_survived() {
    let image = Image::new();
    let mut disk = Disk::new(&image.options(), USUAL | INDIRECT);
    let ram = disk.ram().clone();
    let buffers = put_request(&ram, BUFFERS, IN, 0, &[]);
    let (header, status) = (buffers[0].0, buffers[1].0);
    let table = BUFFERS + 0x8000;
    let area = disk.queues[0].area;
    let size = disk.queues[0].size;
    // What is at descriptors 0 and following, and in an indirect table.
    type Chains = (
        &'static str,
        Vec<support::RawDescriptor>,
        Vec<support::RawDescriptor>,
    );
    let cases: Vec<Chains> = vec![
        ("a loop of one", vec![(header, 16, NEXT, 0)], vec![]),
        (
            "a loop of what is written",
            vec![(header, 16, NEXT, 1), (DATA, 512, NEXT | WRITE, 1)],
            vec![],
        ),
        (
            "a loop of two",
            vec![(header, 16, NEXT, 1), (header, 16, NEXT, 0)],
            vec![],
        ),
        (
            "next beyond the table",
            vec![(header, 16, NEXT, size)],
            vec![],
        ),
        (
            "next far beyond the table",
            vec![(header, 16, NEXT, u16::MAX)],
            vec![],
        ),
        ("no status", vec![(header, 16, 0, 0)], vec![]),
        (
            "an empty status",
            vec![(header, 16, NEXT, 1), (status, 0, WRITE, 0)],
            vec![],
        ),
        (
            "a short header",
            vec![(header, 15, NEXT, 1), (status, 1, WRITE, 0)],
            vec![],
        ),
        ("no header", vec![(status, 1, WRITE, 0)], vec![]),
        (
            "a header behind the status",
            vec![(status, 1, WRITE | NEXT, 1), (header, 16, 0, 0)],
            vec![],
        ),
        (
            "a header nowhere",
            vec![(1 << 50, 16, NEXT, 1), (status, 1, WRITE, 0)],
            vec![],
        ),
        (
            "a header at the end",
            vec![(u64::MAX - 7, 16, NEXT, 1), (status, 1, WRITE, 0)],
            vec![],
        ),
        (
            "a status nowhere",
            vec![(header, 16, NEXT, 1), (1 << 50, 1, WRITE, 0)],
            vec![],
        ),
        (
            "a status at the end",
            vec![(header, 16, NEXT, 1), (u64::MAX, 1, WRITE, 0)],
            vec![],
        ),
        (
            "4 GiB",
            vec![
                (header, 16, NEXT, 1),
                (DATA, u32::MAX, NEXT | WRITE, 2),
                (status, 1, WRITE, 0),
            ],
            vec![],
        ),
        (
            "8 GiB",
            vec![
                (header, 16, NEXT, 1),
                (DATA, u32::MAX, NEXT | WRITE, 2),
                (DATA, u32::MAX, NEXT | WRITE, 3),
                (status, 1, WRITE, 0),
            ],
            vec![],
        ),
        (
            "a table nowhere",
            vec![(1 << 50, 64, INDIRECT_TABLE, 0)],
            vec![],
        ),
        (
            "a table at the end",
            vec![(u64::MAX - 15, 64, INDIRECT_TABLE, 0)],
            vec![],
        ),
        (
            "an empty table",
            vec![(table, 0, INDIRECT_TABLE, 0)],
            vec![],
        ),
        (
            "a table of a part",
            vec![(table, 17, INDIRECT_TABLE, 0)],
            vec![],
        ),
        (
            "a table too long",
            vec![(table, !15, INDIRECT_TABLE, 0)],
            vec![],
        ),
        (
            "a table in a table",
            vec![(table, 32, INDIRECT_TABLE, 0)],
            vec![(table, 32, INDIRECT_TABLE, 0)],
        ),
        (
            "a loop in a table",
            vec![(table, 65535 * 16, INDIRECT_TABLE, 0)],
            vec![(header, 16, NEXT, 0)],
        ),
        (
            "a written loop in a table",
            vec![(table, 65535 * 16, INDIRECT_TABLE, 0)],
            vec![(header, 16, NEXT, 1), (DATA, 1, NEXT | WRITE, 1)],
        ),
        (
            "next beyond a table",
            vec![(table, 32, INDIRECT_TABLE, 0)],
            vec![(header, 16, NEXT, 2)],
        ),
    ];
    for (name, direct, indirect) in cases {
        for (place, descriptors) in [(area, direct), (table, indirect)] {
            for (at, descriptor) in (0..).zip(descriptors) {
                disk.queues[0].set_descriptor(place + 16 * at, descriptor);
            }
        }
        // The driver's own books do not know of this chain.
        disk.queues[0].offer(0);
        disk.queues[0].kick();
        let (head, _) = disk.queues[0].wait();
        assert_eq!(head, 0, "{name}");
        assert_eq!(disk.machine.status() & NEEDS_RESET, 0, "{name}");
        // A good request right after it.
        let (status, _) = disk.run(IN, 5, &[(DATA + 0x10_0000, 512)]);
        assert_eq!(status, OK, "{name}");
    }
    assert!(image.read(0, 1 << 20) == patterns(0, 2048, 0));
}

#[test]
fn hostile_queues_need_a_reset_and_get_one() {
    let image = Image::new();
    let mut disk = Disk::new(&image.options(), USUAL);
    type Spoiler = fn(&mut Queue, &Ram);
    let cases: [(&str, Spoiler); 3] = [
        ("more than there is room for", |queue, ram| {
            ram.write(queue.available() + 2, &(queue.size + 1).to_le_bytes());
        }),
        ("a head beyond the table", |queue, _| {
            queue.offer(queue.size);
        }),
        ("a head far beyond the table", |queue, _| {
            queue.offer(u16::MAX);
        }),
    ];
    for (name, spoil) in cases {
        let ram = disk.ram().clone();
        spoil(&mut disk.queues[0], &ram);
        disk.queues[0].ring();
        disk.machine.await_needs_reset();
        disk.machine.set_status(0);
        assert_eq!(disk.machine.status(), 0, "{name}");
        disk.queues = disk.machine.start(USUAL, 1, 256);
        assert_eq!(disk.read(5, 512), (OK, pattern(5, 0)), "{name}");
    }
    // Queues where no memory is, or where none can be.
    for (area, size) in [
        (1 << 50, 64_u16),
        (BASE + SIZE - 64, 64),
        (BASE + 8, 64),
        (BASE, 63),
        (BASE, 0),
        (BASE, 512),
    ] {
        let machine = &disk.machine;
        assert!(machine.negotiate(VERSION_1));
        let common = machine.places.common;
        machine.write(common + 0x18, &size.to_le_bytes());
        for offset in [0x20, 0x28, 0x30] {
            machine.write(common + offset, &u64::to_le_bytes(area));
        }
        machine.write(common + 0x1c, &[1, 0]);
        machine.set_status(0xf);
        machine.await_needs_reset();
    }
    disk.queues = disk.machine.start(USUAL, 1, 256);
    assert_eq!(disk.read(5, 512), (OK, pattern(5, 0)));
}

#[test]
fn a_reset_waits_for_what_is_under_way_and_forgets_the_rest() {
    let image = Image::new();
    let mut disk = Disk::new(&image.options(), USUAL);
    let ram = disk.ram().clone();
    for round in 0..20 {
        let mut load = Load::new(round + 1, 0..1000, BUFFERS, 80);
        load.fill(&mut disk.queues[0], &ram);
        if round % 2 == 0 {
            disk.machine.set_status(0);
        } else {
            disk.machine.client.reset().unwrap();
            disk.machine.enable();
            disk.machine.enable_msix();
        }
        // Nothing of what went before comes afterwards.
        let used = disk.queues[0].used();
        let before = ram.read(BUFFERS, 80 * 0x2000);
        let index = ram.read16(used + 2);
        thread::sleep(Duration::from_millis(2));
        assert!(ram.read(BUFFERS, 80 * 0x2000) == before);
        assert_eq!(ram.read16(used + 2), index);
        disk.queues = disk.machine.start(USUAL, 1, 256);
        assert_eq!(disk.read(8 * 2000, 512), (OK, pattern(8 * 2000, 0)));
    }
}

#[test]
fn a_single_queue_is_reset() {
    const RING_RESET: u64 = 1 << 40;
    let image = Image::new();
    let options = Options {
        num_queues: 2,
        ..image.options()
    };
    let mut disk = Disk::new(&options, USUAL | RING_RESET);
    let ram = disk.ram().clone();
    let mut load = Load::new(5, 0..1000, BUFFERS + 0x10_0000, 40);
    load.run(&mut disk.queues[1], &ram, 50);
    assert_eq!(disk.read(5, 512), (OK, pattern(5, 0)));
    let common = disk.machine.places.common;
    disk.machine.write(common + 0x16, &[0, 0]);
    disk.machine.write(common + 0x3a, &[1, 0]);
    assert_eq!(disk.machine.read(common + 0x3a), [0, 0]);
    assert_eq!(disk.machine.read(common + 0x1c), [0, 0]);
    disk.queues[0] = disk.machine.queue(0, 64, USUAL);
    let size = disk.queues[0].size;
    assert_eq!(size, 64);
    disk.read(5, 512);
    load.run(&mut disk.queues[1], &ram, 50);
    load.finish(&mut disk.queues[1], &ram);
    load.check(&image);
}

#[test]
fn memory_can_be_taken_away_and_comes_back() {
    let image = Image::new();
    let mut disk = Disk::new(&image.options(), USUAL | EVENT_IDX);
    let ram = disk.ram().clone();
    let mut load = Load::new(3, 0..1000, BUFFERS, 60);
    for _ in 0..20 {
        load.run(&mut disk.queues[0], &ram, 50);
        load.finish(&mut disk.queues[0], &ram);
        disk.machine.client.dma_unmap(BASE, SIZE).unwrap();
        disk.machine.map();
    }
    load.check(&image);
}

#[test]
fn the_guest_goes_on_with_another_client() {
    let image = Image::new();
    let mut server = disk::server(&image.options()).unwrap();
    let (first, second) = (UnixStream::pair().unwrap(), UnixStream::pair().unwrap());
    let streams = [first.1, second.1];
    thread::spawn(move || streams.map(|stream| server.serve(stream).unwrap()));
    let mut machine = Machine::connect(first.0, Ram::new());
    machine.enable_msix();
    let ram = machine.ram.clone();
    let mut queue = machine.start(USUAL | EVENT_IDX, 1, 256).remove(0);
    let mut load = Load::new(8, 0..1000, BUFFERS, 60);
    load.run(&mut queue, &ram, 100);
    drop(machine);
    // The guest's doorbell has nowhere to go while there is no memory.
    queue.ring();
    load.fill(&mut queue, &ram);
    thread::sleep(Duration::from_millis(5));
    let mut machine = Machine::connect(second.0, ram.clone());
    machine.enable_msix();
    // Nor is there while its memory comes in pieces.
    machine.client.dma_unmap(BASE, SIZE).unwrap();
    let half = SIZE / 2;
    for at in [half, 0] {
        let file = Some((ram.file().as_fd(), at));
        let access = DmaAccess::ReadWrite;
        machine
            .client
            .dma_map(BASE + at, half, file, access)
            .unwrap();
        thread::sleep(Duration::from_millis(5));
    }
    queue.move_to(&machine);
    load.run(&mut queue, &ram, 100);
    load.finish(&mut queue, &ram);
    load.check(&image);
    assert_eq!(machine.status(), 0xf);
}

#[test]
fn an_image_in_use_is_not_served_to_a_second_machine() {
    let image = Image::new();
    let disk = Disk::new(&image.options(), USUAL);
    let error = disk::server(&image.options()).unwrap_err().to_string();
    assert!(error.contains(image.path.to_str().unwrap()), "{error}");
    disk.machine.end();
    disk::server(&image.options()).unwrap();
}

#[test]
fn impossible_options_are_refused() {
    let image = Image::new();
    let refused = |change: &dyn Fn(&mut Options)| {
        let mut options = image.options();
        change(&mut options);
        disk::server(&options).unwrap_err().to_string()
    };
    assert!(refused(&|options| options.num_queues = 0).contains("1 to 64"));
    assert!(refused(&|options| options.num_queues = 65).contains("65"));
    assert!(refused(&|options| options.queue_size = 100).contains("power of two"));
    assert!(refused(&|options| options.queue_size = 2048).contains("1024"));
    assert!(refused(&|options| options.serial = "x".repeat(21)).contains("20"));
    assert!(refused(&|options| options.serial = "\n".into()).contains("printable"));
    assert!(refused(&|options| options.path = "/nowhere".into()).contains("/nowhere"));
}

/// All of the device's migration data.
fn saved(machine: &Machine) -> Vec<u8> {
    let mut saved = Vec::new();
    loop {
        let mut piece = vec![0; 1000];
        let count = machine.client.migration_read(&mut piece).unwrap();
        saved.extend(&piece[..count]);
        if count < piece.len() {
            return saved;
        }
    }
}

fn set_state(machine: &Machine, state: DeviceState) -> Result<(), ConnError> {
    machine.client.set_device_state(state)
}

/// A disk that waits for another to migrate there.
fn incoming(image: &Image, ram: &Ram, queues: u16) -> Machine {
    let options = Options {
        incoming: true,
        num_queues: queues,
        ..image.options()
    };
    let mut machine = attach(&options, ram.clone());
    machine.enable_msix();
    machine
}

#[test]
fn the_disk_migrates_under_load_and_loses_nothing() {
    let image = Image::new();
    let options = Options {
        num_queues: 2,
        ..image.options()
    };
    let mut disk = Disk::new(&options, USUAL | EVENT_IDX | CONFIG_WCE);
    let ram = disk.ram().clone();
    let mut loads = [
        Load::new(1, 0..1000, BUFFERS, 60),
        Load::new(2, 1000..2000, BUFFERS + (1 << 20), 60),
    ];
    for round in 0..10 {
        for (load, queue) in loads.iter_mut().zip(&mut disk.queues) {
            load.run(queue, &ram, 40);
            load.fill(queue, &ram);
        }
        let mut target = incoming(&image, &ram, 2);
        set_state(&disk.machine, DeviceState::StopCopy).unwrap();
        // Nothing moves any more; what rings now is for the target to find.
        loads[0].fill(&mut disk.queues[0], &ram);
        let used = [0, 1].map(|queue: usize| ram.read16(disk.queues[queue].used() + 2));
        thread::sleep(Duration::from_millis(2));
        let later = [0, 1].map(|queue: usize| ram.read16(disk.queues[queue].used() + 2));
        assert_eq!(used, later);
        let stream = saved(&disk.machine);
        set_state(&target, DeviceState::Resuming).unwrap();
        target.client.migration_write(&stream).unwrap();
        if round % 3 == 1 {
            // Cancelled: it goes on where it was, and then goes all the same.
            set_state(&disk.machine, DeviceState::Running).unwrap();
            assert_eq!(disk.queues[0].index, 0);
            for (load, queue) in loads.iter_mut().zip(&mut disk.queues) {
                load.run(queue, &ram, 100);
            }
            // The target cannot run meanwhile.
            let refused = set_state(&target, DeviceState::Running);
            assert!(matches!(refused, Err(ConnError::Refused { errno: 16, .. })));
            set_state(&disk.machine, DeviceState::StopCopy).unwrap();
            let stream = saved(&disk.machine);
            target = incoming(&image, &ram, 2);
            set_state(&target, DeviceState::Resuming).unwrap();
            target.client.migration_write(&stream).unwrap();
        }
        // Interrupts that the source has sent count.
        for queue in &mut disk.queues {
            let vector = queue.vector.clone().unwrap();
            queue.move_to(&target);
            let mut count = [0; 8];
            if rustix::io::read(&*vector, &mut count).is_ok() {
                rustix::io::write(queue.vector.as_ref().unwrap(), &count).unwrap();
            }
        }
        set_state(&target, DeviceState::Running).unwrap();
        // The source cannot run any more.
        let refused = set_state(&disk.machine, DeviceState::Running);
        assert!(matches!(refused, Err(ConnError::Refused { errno: 16, .. })));
        let source = std::mem::replace(&mut disk.machine, target);
        source.end();
    }
    for (load, queue) in loads.iter_mut().zip(&mut disk.queues) {
        load.run(queue, &ram, 100);
        load.finish(queue, &ram);
        load.check(&image);
        assert!(load.writes > 100);
    }
}

#[test]
fn what_the_disk_writes_to_memory_is_logged() {
    let image = Image::new();
    let mut disk = Disk::new(&image.options(), USUAL);
    disk.read(0, 512);
    disk.machine.client.start_dma_logging(4096, &[]).unwrap();
    let dirty = |disk: &Disk| {
        let log = disk.machine.client.dma_log(BASE, SIZE, 4096).unwrap();
        let is_set = |page: &u64| {
            let word = log[usize::try_from(page / 64).unwrap()];
            word >> (page % 64) & 1 != 0
        };
        (0..SIZE / 4096).filter(is_set).collect::<Vec<_>>()
    };
    let page = |address: u64| (address - BASE) / 4096;
    dirty(&disk);
    // Two pages and a bit.
    let data = BUFFERS + 0x10_0800;
    assert_eq!(disk.run(IN, 0, &[(data, 8192)]).0, OK);
    let used = page(disk.queues[0].used());
    let expected = [
        used,
        page(BUFFERS),
        page(data),
        page(data) + 1,
        page(data) + 2,
    ];
    assert_eq!(dirty(&disk), expected);
    // A write writes nothing but its status.
    assert_eq!(disk.run(OUT, 0, &[(data, 8192)]).0, OK);
    assert_eq!(dirty(&disk), [used, page(BUFFERS)]);
}

#[test]
fn another_disk_or_a_damaged_state_is_not_taken_over() {
    let image = Image::new();
    let disk = Disk::new(&image.options(), USUAL);
    set_state(&disk.machine, DeviceState::StopCopy).unwrap();
    let stream = saved(&disk.machine);
    let load = |options: &Options, stream: &[u8]| {
        let machine = attach(options, Ram::new());
        set_state(&machine, DeviceState::Resuming).unwrap();
        let written = machine.client.migration_write(stream);
        written.and_then(|()| set_state(&machine, DeviceState::Stop))
    };
    let options = Options {
        incoming: true,
        ..image.options()
    };
    let changes: [fn(&mut Options); 4] = [
        |options| options.serial = "another".into(),
        |options| options.num_queues = 2,
        |options| options.queue_size = 128,
        |options| options.readonly = true,
    ];
    for change in changes {
        let mut options = options.clone();
        change(&mut options);
        load(&options, &stream).unwrap_err();
    }
    for cut in (0..stream.len()).step_by(7).skip(1) {
        load(&options, &stream[..cut]).unwrap_err();
    }
    load(&options, &stream).unwrap();
}

/// The server of [`what_was_flushed_survives_kill_9`], in a process of its own.
#[test]
fn child() {
    let Some(folder) = std::env::var_os("DISK_TEST_FOLDER") else {
        return;
    };
    let folder = Path::new(&folder);
    let options = Options::new(folder.join("image"));
    disk::serve(&options, &folder.join("socket"), || {}).unwrap();
}

#[test]
fn what_was_flushed_survives_kill_9() {
    let image = Image::new();
    let mut load = Load::new(11, 0..1000, BUFFERS, 60);
    for round in 0..6_u64 {
        let mut server = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child"])
            .env("DISK_TEST_FOLDER", image.folder.path())
            .spawn()
            .unwrap();
        let start = Instant::now();
        let stream = loop {
            match UnixStream::connect(image.folder.path().join("socket")) {
                Ok(stream) => break stream,
                Err(error) => assert!(start.elapsed() < support::LONG, "{error}"),
            }
            thread::sleep(Duration::from_millis(1));
        };
        let mut machine = Machine::connect(stream, Ram::new());
        machine.enable_msix();
        let mut queues = machine.start(USUAL | EVENT_IDX, 1, 256);
        let queue = &mut queues[0];
        load.run(queue, &machine.ram, 100 + 50 * round);
        load.fill(queue, &machine.ram);
        server.kill().unwrap();
        server.wait().unwrap();
        // All that was acknowledged is there; of the rest, each block is as it was or as it was to be.
        for (block, kind, place) in std::mem::take(&mut load.busy).into_values() {
            load.places.push(place);
            if kind == OUT {
                let written = load.rounds.get_mut(&block).unwrap();
                let data = image.read(8 * block, 4096);
                if data != patterns(8 * block, 8, *written) {
                    *written -= 1;
                    assert!(data == patterns(8 * block, 8, *written), "block {block}");
                }
            }
        }
        load.check(&image);
    }
}
