//! The disk, by a driver as a guest has it.

#![expect(clippy::unwrap_used, reason = "a test panics when it fails")]

#[path = "support/drive.rs"]
mod drive;
mod support;

use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::thread;
use std::time::{Duration, Instant};

use device_servers::disk::{self, Options};
use drive::{
    CONFIG_WCE, DATA, DISCARD, DROP, Disk, FAILED, FLUSH, GET_ID, IMAGE_SIZE, IN, Image, Load,
    MULTI_QUEUE, OK, OUT, READONLY, SYNC, UNSUPPORTED, USUAL, ZERO, attach, pattern, patterns,
    put_request,
};
use support::{BASE, BUFFERS, EVENT_IDX, INDIRECT, Machine, Ram, SIZE, VERSION_1, event, wait_for};
use vfio_user_client::DmaAccess;

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

/// The register through which firmware accesses what it cannot map, on a place in a BAR.
fn window(machine: &Machine, bar: u8, offset: u64, length: u32) -> u64 {
    let at = machine.places.window;
    let write = |offset: u64, data: &[u8]| machine.client.region_write(7, offset, data).unwrap();
    write(at + 4, &[bar]);
    write(at + 8, &u32::try_from(offset).unwrap().to_le_bytes());
    write(at + 12, &length.to_le_bytes());
    at + 16
}

#[test]
fn everything_can_be_reached_by_configuration_space() {
    let image = Image::new();
    let mut disk = Disk::new(&image.options(), USUAL);
    let places = disk.machine.places;
    let read = |machine: &Machine, offset: u64, length: u32| {
        let at = window(machine, 0, offset, length);
        let mut data = [0; 4];
        let bytes = &mut data[..length as usize];
        machine.client.region_read(7, at, bytes).unwrap();
        u32::from_le_bytes(data)
    };
    let sectors = u32::try_from(IMAGE_SIZE / 512).unwrap();
    assert_eq!(read(&disk.machine, places.config, 4), sectors);
    assert_eq!(read(&disk.machine, places.config + 2, 2), sectors >> 16);
    assert_eq!(read(&disk.machine, places.common + 0x14, 1), 0xf);
    // A notification, and a table of interrupts that the library has.
    let buffers = disk.request(BUFFERS, IN, 3, &[(DATA, 512)]);
    disk.queues[0].add(&buffers);
    let client = &disk.machine.client;
    let at = window(&disk.machine, 0, places.notify, 2);
    client.region_write(7, at, &[0, 0]).unwrap();
    disk.queues[0].wait();
    assert_eq!(disk.ram().read(DATA, 512), pattern(3, 0));
    let at = window(&disk.machine, 0, 0x4000, 4);
    client.region_write(7, at, &[1, 2, 3, 4]).unwrap();
    assert_eq!(disk.machine.read(0x4000), [1, 2, 3, 4]);
    // A reset of the device, as firmware does it.
    let at = window(&disk.machine, 0, places.common + 0x14, 1);
    client.region_write(7, at, &[0]).unwrap();
    assert_eq!(disk.machine.status(), 0);
    // What is no place keeps what is written to it, and a place at which nothing is reads as nothing does.
    for (bar, offset, length, expected) in [
        (6, 0, 4, [9; 4]),
        (7, 0, 4, [9; 4]),
        (0, 0, 0, [9; 4]),
        (0, 0, 3, [9; 4]),
        (0, 0, u32::MAX, [9; 4]),
        (0, 1, 2, [9; 4]),
        (1, 0, 4, [0xff; 4]),
        (0, 0x8000, 4, [0xff; 4]),
        (0, 0xffff_fffc, 4, [0xff; 4]),
    ] {
        let at = window(&disk.machine, bar, offset, length);
        client.region_write(7, at, &[9; 4]).unwrap();
        let mut data = [0; 4];
        client.region_read(7, at, &mut data).unwrap();
        assert_eq!(data, expected, "{bar} {offset:#x} {length}");
    }
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
