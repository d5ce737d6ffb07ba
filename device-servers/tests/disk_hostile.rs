//! The disk, with drivers that do it wrong, by mistake or on purpose.

#![expect(clippy::unwrap_used, reason = "a test panics when it fails")]

#[path = "support/drive.rs"]
mod drive;
mod support;

use drive::{DATA, Disk, IN, Image, OK, USUAL, pattern, patterns, put_request};
use support::queue::{INDIRECT_TABLE, NEXT, Queue, RawDescriptor, WRITE};
use support::{BASE, BUFFERS, INDIRECT, NEEDS_RESET, Ram, SIZE, VERSION_1};

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
    type Chains = (&'static str, Vec<RawDescriptor>, Vec<RawDescriptor>);
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
