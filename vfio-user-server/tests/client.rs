//! Every command that `vfio-user-client` has, against a device with everything.

#![expect(clippy::unwrap_used, reason = "a test panics when it fails")]

mod support;

use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use support::{AREAS, BASE, Everything, Pair, count, errno, event, memfd, register, wait_for};
use vfio_user_client::{DeviceInfo, DmaAccess, IrqAction, Irqs, RegionWrite};
use vfio_user_server::Options;

const EIO: u32 = 5;
const EEXIST: u32 = 17;
const EINVAL: u32 = 22;
const ENOENT: u32 = 2;
const ENOTTY: u32 = 25;

#[test]
fn the_limits_are_those_of_both() {
    let pair = Pair::new(true);
    let limits = *pair.client.limits();
    assert_eq!(limits.max_msg_fds, 16);
    assert_eq!(limits.page_sizes, 4096);
    assert!(limits.write_multiple);
    assert_eq!(limits.twin_socket, Some(0));
    let pair = Pair::new(false);
    assert_eq!(pair.client.limits().twin_socket, None);
}

#[test]
fn the_device_is_as_it_was_described() {
    let pair = Pair::new(true);
    let expected = DeviceInfo {
        resettable: true,
        pci: true,
        regions: 9,
        irqs: 5,
    };
    assert_eq!(pair.client.device_info().unwrap(), expected);
    let sizes = [0x1000, 0x2000, 0x4000, 0, 0x20, 0, 0, 0x1000, 0];
    for (region, size) in (0..).zip(sizes) {
        let info = pair.client.region_info(region).unwrap();
        assert_eq!(info.size, size, "{region}");
        assert_eq!((info.readable, info.writable), (size > 0, size > 0));
        let areas: Vec<_> = info
            .areas
            .iter()
            .map(|area| area.offset..area.offset + area.size)
            .collect();
        assert_eq!(areas, if region == 2 { &AREAS[..] } else { &[] });
        assert_eq!(info.file.is_some(), region == 2);
    }
    assert!(pair.client.region_info(9).is_err());
    let counts = [0, 1, 2, 3, 4].map(|index| pair.client.irq_info(index).unwrap().count);
    assert_eq!(counts, [1, 4, 100, 0, 0]);
    assert!(pair.client.irq_info(0).unwrap().automasked);
    assert!(pair.client.irq_info(5).is_err());
}

#[test]
fn mapped_areas_are_the_devices_own_memory() {
    let pair = Pair::new(true);
    let info = pair.client.region_info(2).unwrap();
    let file = std::fs::File::from(info.file.unwrap().as_fd().try_clone_to_owned().unwrap());
    file.write_all_at(b"mapped", info.areas[1].file_offset)
        .unwrap();
    let mut data = [0; 6];
    pair.client
        .region_read(2, info.areas[1].offset, &mut data)
        .unwrap();
    assert_eq!(&data, b"mapped");
}

#[test]
fn registers_are_read_and_written_at_every_width() {
    let pair = Pair::new(true);
    pair.write(register::SCRATCH, 0x8877_6655_4433_2211);
    for width in [1, 2, 4, 8] {
        for offset in (0..8).step_by(width) {
            let mut data = vec![0; width];
            pair.client
                .region_read(0, offset as u64, &mut data)
                .unwrap();
            let expected: Vec<_> = (1..=8)
                .map(|byte| byte * 0x11)
                .skip(offset)
                .take(width)
                .collect();
            assert_eq!(data, expected);
        }
    }
    let large: Vec<u8> = (0..=255).cycle().take(0x4000).collect();
    pair.client.region_write(2, 0, &large).unwrap();
    let mut data = vec![0; 0x4000];
    pair.client.region_read(2, 0, &mut data).unwrap();
    assert_eq!(data, large);
}

#[test]
fn accesses_outside_of_a_region_are_refused() {
    let pair = Pair::new(true);
    for (region, offset) in [
        (0, 0xffd),
        (0, u64::MAX - 1),
        (3, 0),
        (4, 0x1d),
        (7, 0xffd),
        (9, 0),
    ] {
        let result = pair.client.region_read(region, offset, &mut [0; 4]);
        assert_eq!(errno(result), EINVAL, "{region} {offset:#x}");
        let result = pair.client.region_write(region, offset, &[0; 4]);
        assert_eq!(errno(result), EINVAL, "{region} {offset:#x}");
    }
}

#[test]
fn the_devices_errors_are_the_clients() {
    let pair = Pair::new(true);
    assert_eq!(errno(pair.try_write(register::FAIL, 28)), 28);
    assert_eq!(errno(pair.client.region_read(0, 6, &mut [0; 4])), EINVAL);
}

#[test]
fn posted_writes_are_done_before_what_comes_later() {
    let pair = Pair::new(true);
    for value in 0..1000_u64 {
        let data = value.to_le_bytes();
        pair.client
            .region_post(0, register::SCRATCH, &data)
            .unwrap();
    }
    assert_eq!(pair.read(register::SCRATCH), 999);
}

#[test]
fn several_writes_go_in_one_message() {
    let pair = Pair::new(true);
    let write = |offset, data| RegionWrite {
        region: 0,
        offset,
        data,
    };
    let writes = [write(0, &[1][..]), write(4, &[2, 3]), write(0x100, &[9; 8])];
    pair.client.region_write_multi(&writes).unwrap();
    assert_eq!(pair.read(0), 0x0302_0000_0001);
    assert_eq!(pair.read(0x100), 0x0909_0909_0909_0909);
    let writes = [write(0x1000, &[1][..])];
    assert_eq!(errno(pair.client.region_write_multi(&writes)), EINVAL);
}

#[test]
fn config_space_can_be_written_where_it_should() {
    let pair = Pair::new(true);
    assert_eq!(pair.config16(0), 0x4f52);
    pair.set_config16(0, 0xffff);
    assert_eq!(pair.config16(0), 0x4f52);
    pair.set_config16(4, 0xffff);
    assert_eq!(pair.config16(4), 0x0547);
    let capabilities: Vec<_> = [0x40, 0x50, 0x70, 0xb0]
        .into_iter()
        .map(|offset| pair.config16(offset))
        .collect();
    assert_eq!(capabilities, [0x5001, 0x7005, 0xb010, 0x0011]);
    assert_eq!(
        [pair.config16(0x100), pair.config16(0x102)],
        [0x0003, 0x1101]
    );
    assert_eq!(
        [pair.config16(0x110), pair.config16(0x112)],
        [0x000b, 0x0001]
    );
    for (bar, mask) in [
        (0, 0xffff_f000),
        (1, 0xffff_e000),
        (2, 0xffff_c00c),
        (3, u32::MAX),
        (4, 0xffff_ffe1),
        (5, 0),
    ] {
        let mut data = [0xff; 4];
        pair.client.region_write(7, 0x10 + 4 * bar, &data).unwrap();
        pair.client
            .region_read(7, 0x10 + 4 * bar, &mut data)
            .unwrap();
        assert_eq!(u32::from_le_bytes(data), mask, "{bar}");
    }
}

#[test]
fn a_reset_resets_device_and_function() {
    let pair = Pair::new(true);
    pair.write(register::SCRATCH, 1);
    pair.enable();
    pair.client.reset().unwrap();
    assert_eq!(pair.read(register::SCRATCH), 0);
    assert_eq!(pair.read(register::RESETS), 1);
    assert_eq!(pair.config16(4), 0);
    // By function-level reset.
    pair.set_config16(0x78, 0xa810);
    assert_eq!(pair.read(register::RESETS), 2);
}

#[test]
fn vectors_signal_their_eventfds() {
    let pair = Pair::new(true);
    for (index, vectors, control) in [(1, 4, (0x52, 1)), (2, 100, (0xb2, 1 << 15))] {
        let events: Vec<_> = (0..vectors).map(|_| event()).collect();
        let fds: Vec<_> = events.iter().map(AsFd::as_fd).collect();
        pair.client.set_irq_events(index, 0, &fds).unwrap();
        pair.set_config16(control.0, control.1);
        for (vector, event) in (0..).zip(&events) {
            pair.write(register::TRIGGER, vector);
            pair.write(register::TRIGGER, vector);
            assert_eq!(count(event), 2);
        }
        pair.client
            .set_irqs(index, 1, IrqAction::Trigger, Irqs::Chosen(&[0, 1, 1]))
            .unwrap();
        let counts: Vec<_> = events.iter().map(count).collect();
        assert_eq!(counts[..4], [0, 0, 1, 1]);

        pair.client
            .set_irqs(index, 0, IrqAction::Mask, Irqs::All(2))
            .unwrap();
        pair.write(register::TRIGGER, 1);
        pair.write(register::TRIGGER, 1);
        assert_eq!(count(&events[1]), 0);
        pair.client.unmask_irq(index, 0, 2).unwrap();
        assert_eq!([count(&events[0]), count(&events[1])], [0, 1]);

        pair.client.disable_irqs(index).unwrap();
        pair.set_config16(control.0, 0);
        pair.write(register::TRIGGER, 1);
        assert_eq!(count(&events[1]), 0);
    }
}

#[test]
fn a_vector_that_is_triggered_too_early_waits_for_its_eventfd() {
    let pair = Pair::new(true);
    pair.set_config16(0xb2, 1 << 15);
    pair.write(register::TRIGGER, 70);
    let mut pending = [0; 16];
    pair.client.region_read(1, 0x1000, &mut pending).unwrap();
    assert_eq!(u128::from_le_bytes(pending), 1 << 70);
    let event = event();
    pair.client.set_irq_events(2, 70, &[event.as_fd()]).unwrap();
    assert_eq!(count(&event), 1);
    pair.client.region_read(1, 0x1000, &mut pending).unwrap();
    assert_eq!(pending, [0; 16]);
}

#[test]
fn the_msix_table_keeps_what_is_written() {
    let pair = Pair::new(true);
    let mut entry = [0; 16];
    pair.client.region_read(1, 99 * 16, &mut entry).unwrap();
    assert_eq!(entry, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0]);
    pair.client.region_write(1, 99 * 16, &[7; 16]).unwrap();
    pair.client.region_write(1, 0x1000, &[0xff; 8]).unwrap();
    pair.client.region_read(1, 99 * 16, &mut entry).unwrap();
    assert_eq!(entry, [7; 16]);
    // What comes after the table is the device's; what is in both is nobody's.
    pair.client.region_read(1, 100 * 16, &mut entry).unwrap();
    assert_eq!(entry, [0x5a; 16]);
    let both = pair.client.region_read(1, 100 * 16 - 4, &mut [0; 8]);
    assert_eq!(errno(both), EINVAL);
}

#[test]
fn intx_comes_again_while_its_line_is_high() {
    let pair = Pair::new(true);
    let (trigger, resample) = (event(), event());
    pair.client
        .set_irq_events(0, 0, &[trigger.as_fd()])
        .unwrap();
    pair.write(register::LEVEL, 1);
    pair.write(register::LEVEL, 1);
    assert_eq!(count(&trigger), 1);
    assert_eq!(pair.config16(6) & 8, 8);
    pair.client.unmask_irq(0, 0, 1).unwrap();
    assert_eq!(count(&trigger), 1);

    pair.client
        .unmask_irq_by_event(0, resample.as_fd())
        .unwrap();
    for _ in 0..3 {
        rustix::io::write(&resample, &1_u64.to_ne_bytes()).unwrap();
        assert_eq!(wait_for(&trigger), 1);
    }
    pair.write(register::LEVEL, 0);
    rustix::io::write(&resample, &1_u64.to_ne_bytes()).unwrap();
    assert_eq!(pair.config16(6) & 8, 0);
    assert_eq!(count(&trigger), 0);

    // Disabled by the Command register, and enabled again.
    pair.set_config16(4, 1 << 10);
    pair.write(register::LEVEL, 1);
    assert_eq!((count(&trigger), pair.config16(6) & 8), (0, 8));
    pair.set_config16(4, 0);
    assert_eq!(count(&trigger), 1);

    pair.client.disable_irqs(0).unwrap();
    pair.write(register::LEVEL, 0);
    pair.write(register::LEVEL, 1);
    assert_eq!(count(&trigger), 0);
    pair.client
        .set_irq_events(0, 0, &[trigger.as_fd()])
        .unwrap();
    assert_eq!(count(&trigger), 1);
}

#[test]
fn interrupts_are_refused_that_are_none() {
    let pair = Pair::new(true);
    let events = [event(), event()];
    let fds: Vec<_> = events.iter().map(AsFd::as_fd).collect();
    let set = |index, start, action, irqs| pair.client.set_irqs(index, start, action, irqs);
    let (pipe, _writer) = std::io::pipe().unwrap();
    for (result, expected) in [
        (set(0, 0, IrqAction::Trigger, Irqs::Events(&fds)), EINVAL),
        (set(2, 99, IrqAction::Trigger, Irqs::Events(&fds)), EINVAL),
        (
            set(2, u32::MAX, IrqAction::Trigger, Irqs::Events(&fds)),
            EINVAL,
        ),
        (set(5, 0, IrqAction::Trigger, Irqs::All(0)), EINVAL),
        (set(3, 0, IrqAction::Trigger, Irqs::Events(&fds)), EINVAL),
        (
            set(2, 0, IrqAction::Trigger, Irqs::Events(&[pipe.as_fd()])),
            EINVAL,
        ),
        (set(2, 0, IrqAction::Unmask, Irqs::Events(&fds)), ENOTTY),
        (set(0, 0, IrqAction::Mask, Irqs::Events(&fds[..1])), ENOTTY),
        (set(0, 0, IrqAction::Mask, Irqs::All(0)), EINVAL),
    ] {
        assert_eq!(errno(result), expected);
    }
}

#[test]
fn the_device_reaches_memory_that_is_mapped() {
    let pair = Pair::new(true);
    let file = memfd(0x10_0000);
    let map = |at, size, offset, access| {
        pair.client
            .dma_map(at, size, Some((file.as_fd(), offset)), access)
    };
    map(0x1000, 0x2000, 0, DmaAccess::ReadWrite).unwrap();
    map(0x3000, 0x1000, 0x8000, DmaAccess::ReadWrite).unwrap();
    map(0x8000, 0x1000, 0x9000, DmaAccess::ReadOnly).unwrap();
    assert_eq!(errno(pair.fill(0x1000, 1, 1)), EIO, "not bus master");
    pair.enable();
    // Across two mappings that are beside each other.
    pair.fill(0x2ffe, 4, 0x11).unwrap();
    let mut data = [0; 4];
    file.read_exact_at(&mut data, 0x1ffc).unwrap();
    assert_eq!(data, [0, 0, 0x11, 0x11]);
    file.read_exact_at(&mut data, 0x8000).unwrap();
    assert_eq!(data, [0x11, 0x11, 0, 0]);
    assert_eq!(pair.sum(0x2f00, 0x200), 4 * 0x11);

    file.write_all_at(&[1; 0x1000], 0x9000).unwrap();
    assert_eq!(pair.sum(0x8000, 0x1000), 0x1000);
    for (address, length) in [
        (0x8000, 1),
        (0x3fff, 2),
        (0xfff, 2),
        (0x7000, 0x1000),
        (u64::MAX, 2),
    ] {
        assert_eq!(errno(pair.fill(address, length, 1)), EIO, "{address:#x}");
    }

    let overlap = map(0x2000, 0x1000, 0, DmaAccess::ReadWrite);
    assert_eq!(errno(overlap), EEXIST);
    assert_eq!(errno(pair.client.dma_unmap(0x1000, 0x1000)), ENOENT);
    pair.client.dma_unmap(0x1000, 0x2000).unwrap();
    assert_eq!(errno(pair.fill(0x1000, 1, 1)), EIO);
    pair.fill(0x3000, 1, 1).unwrap();
    pair.client.dma_unmap_all().unwrap();
    assert_eq!(errno(pair.fill(0x3000, 1, 1)), EIO);
    map(0x1000, 0x2000, 0, DmaAccess::ReadWrite).unwrap();
    pair.fill(0x1000, 1, 1).unwrap();
}

#[test]
fn the_device_reaches_memory_by_messages() {
    for twin in [true, false] {
        let pair = Pair::new(twin);
        pair.client
            .dma_map(BASE, 0x10_0000, None, DmaAccess::ReadWrite)
            .unwrap();
        pair.enable();
        pair.fill(BASE + 3, 100_000, 0x22).unwrap();
        let bytes = pair.guest.0.lock().unwrap().clone();
        assert!(bytes[3..100_003].iter().all(|byte| *byte == 0x22));
        assert_eq!((bytes[2], bytes[100_003]), (0, 0));
        assert_eq!(pair.sum(BASE, 200_000), 100_000 * 0x22);
        // The client says no to what it does not have.
        pair.client
            .dma_map(BASE + 0x10_0000, 0x1000, None, DmaAccess::ReadWrite)
            .unwrap();
        assert_eq!(errno(pair.fill(BASE + 0x10_0000, 1, 1)), EIO);
        assert_eq!(pair.sum(BASE, 4), 0x22);
    }
}

#[test]
fn memory_that_may_shrink_is_refused_on_request() {
    let options = Options {
        sealed_memory: true,
        ..Options::default()
    };
    let pair = Pair::with(Everything::server(options), true);
    let file = tempfile::tempfile().unwrap();
    file.set_len(0x1000).unwrap();
    let map = |file: &std::fs::File| {
        pair.client.dma_map(
            0x1000,
            0x1000,
            Some((file.as_fd(), 0)),
            DmaAccess::ReadWrite,
        )
    };
    assert_eq!(errno(map(&file)), 1);
    map(&memfd(0x1000)).unwrap();
}

#[test]
fn files_that_are_too_short_or_none_are_refused() {
    let pair = Pair::new(true);
    let (pipe, _writer) = std::io::pipe().unwrap();
    let short = memfd(0x2000);
    for (fd, offset) in [
        (short.as_fd(), 0x1000),
        (short.as_fd(), u64::MAX - 0xfff),
        (pipe.as_fd(), 0),
    ] {
        let result = pair
            .client
            .dma_map(0x1000, 0x2000, Some((fd, offset)), DmaAccess::ReadWrite);
        assert_eq!(errno(result), EINVAL);
    }
}

#[test]
fn doorbells_ring_with_and_without_messages() {
    let pair = Pair::new(true);
    let bells = pair.client.region_io_fds(0).unwrap();
    let places: Vec<_> = bells
        .iter()
        .map(|bell| (bell.offset, bell.size, bell.datamatch, bell.pio))
        .collect();
    let expected = [
        (register::DOORBELLS, 4, None, false),
        (register::DOORBELLS + 4, 4, Some(7), false),
    ];
    assert_eq!(places, expected);
    assert!(pair.client.region_io_fds(4).unwrap().is_empty());
    for (bell, rung) in [(0, 1), (1, 1 << 32 | 1)] {
        rustix::io::write(&bells[bell].fd, &1_u64.to_ne_bytes()).unwrap();
        // It is served before a message that was sent later.
        assert_eq!(pair.read(register::BELLS), rung);
    }
    let ring = |offset, value: u32| {
        let data = value.to_le_bytes();
        pair.client
            .region_write(0, register::DOORBELLS + offset, &data)
            .unwrap();
    };
    ring(0, 5);
    ring(4, 7);
    assert_eq!(pair.read(register::BELLS), 2 << 32 | 2);
    // Another value is a write like any other.
    ring(4, 8);
    assert_eq!(pair.read(register::BELLS), 2 << 32 | 2);
    assert_eq!(pair.read(register::DOORBELLS), 8 << 32);
}

#[test]
fn the_device_keeps_its_state_when_a_client_goes() {
    let pair = Pair::new(true);
    let event = event();
    let file = memfd(0x1000);
    pair.enable();
    pair.write(register::SCRATCH, 77);
    pair.client.set_irq_events(2, 0, &[event.as_fd()]).unwrap();
    pair.client
        .dma_map(
            0x1000,
            0x1000,
            Some((file.as_fd(), 0)),
            DmaAccess::ReadWrite,
        )
        .unwrap();
    let pair = Pair::with(pair.end(), false);
    assert_eq!(pair.read(register::SCRATCH), 77);
    pair.write(register::TRIGGER, 0);
    assert_eq!(count(&event), 0);
    assert_eq!(errno(pair.fill(0x1000, 1, 1)), EIO);
}
