//! The disk, when it is reset, loses memory or its client, and when its server is killed.

#![expect(clippy::unwrap_used, reason = "a test panics when it fails")]

#[path = "support/drive.rs"]
mod drive;
mod support;

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use device_servers::disk::{self, Options};
use drive::{Disk, Image, Load, OK, OUT, USUAL, pattern, patterns};
use support::{BASE, BUFFERS, EVENT_IDX, Machine, Ram, SIZE};
use vfio_user_client::DmaAccess;

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
fn a_queue_is_stopped_whatever_its_thread_is_doing() {
    let image = Image::new();
    let mut disk = Disk::new(&image.options(), USUAL);
    let ram = disk.ram().clone();
    for round in 0..500_u32 {
        let mut load = Load::new(u64::from(round) + 1, 0..1000, BUFFERS, 1);
        match round % 3 {
            0 => disk.queues[0].kick(),
            1 => load.fill(&mut disk.queues[0], &ram),
            _ => {}
        }
        // From when it has not yet slept to when it has slept again.
        let moment = Instant::now() + Duration::from_micros(u64::from(round % 80));
        while Instant::now() < moment {
            std::hint::spin_loop();
        }
        // The answer comes when the thread has stopped. Without, this fails.
        disk.machine.set_status(0);
        disk.queues = disk.machine.start(USUAL, 1, 256);
    }
    assert_eq!(disk.read(8 * 2000, 512), (OK, pattern(8 * 2000, 0)));
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
