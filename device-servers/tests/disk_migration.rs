//! The disk, and what becomes of it when it moves.

#![expect(clippy::unwrap_used, reason = "a test panics when it fails")]

#[path = "support/drive.rs"]
mod drive;
mod support;

use std::thread;
use std::time::Duration;

use device_servers::disk::Options;
use drive::{CONFIG_WCE, Disk, IN, Image, Load, OK, OUT, USUAL, attach};
use support::{BASE, BUFFERS, EVENT_IDX, Machine, Ram};
use vfio_user_client::{ConnError, DeviceState};

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
        disk.machine.set_state(DeviceState::StopCopy).unwrap();
        // Nothing moves any more; what rings now is for the target to find.
        loads[0].fill(&mut disk.queues[0], &ram);
        let used = [0, 1].map(|queue: usize| ram.read16(disk.queues[queue].used() + 2));
        thread::sleep(Duration::from_millis(2));
        let later = [0, 1].map(|queue: usize| ram.read16(disk.queues[queue].used() + 2));
        assert_eq!(used, later);
        let stream = disk.machine.saved();
        target.set_state(DeviceState::Resuming).unwrap();
        target.client.migration_write(&stream).unwrap();
        if round % 3 == 1 {
            // Cancelled: it goes on where it was, and then goes all the same.
            disk.machine.set_state(DeviceState::Running).unwrap();
            assert_eq!(disk.queues[0].index, 0);
            for (load, queue) in loads.iter_mut().zip(&mut disk.queues) {
                load.run(queue, &ram, 100);
            }
            // The target cannot run meanwhile.
            let refused = target.set_state(DeviceState::Running);
            assert!(matches!(refused, Err(ConnError::Refused { errno: 16, .. })));
            disk.machine.set_state(DeviceState::StopCopy).unwrap();
            let stream = disk.machine.saved();
            target = incoming(&image, &ram, 2);
            target.set_state(DeviceState::Resuming).unwrap();
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
        target.set_state(DeviceState::Running).unwrap();
        // The source cannot run any more.
        let refused = disk.machine.set_state(DeviceState::Running);
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
    let dirty = |disk: &Disk| disk.machine.dirty_pages();
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
    disk.machine.set_state(DeviceState::StopCopy).unwrap();
    let stream = disk.machine.saved();
    let load = |options: &Options, stream: &[u8]| {
        let machine = attach(options, Ram::new());
        machine.set_state(DeviceState::Resuming).unwrap();
        let written = machine.client.migration_write(stream);
        written.and_then(|()| machine.set_state(DeviceState::Stop))
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
