//! Every command as it is on the wire, what is made of its answer, and how the server's limits are honoured.

#![expect(clippy::unwrap_used, reason = "a test panics when it fails")]

mod support;

use std::fs::File;
use std::io::{Seek, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;

use support::{
    LONG, Memory, Message, Peer, check_alive, connect, good_payload, kind, options, reply,
};
use vfio_user_client::{
    Client, Command, ConnError, DeviceInfo, DeviceState, DmaAccess, IrqAction, IrqInfo, Irqs,
    LoggingRange, MappedArea, MigrationFlags, RegionWrite,
};

/// What the client sends: commands, with the words of their payloads and how many descriptors came along.
type Sent = Vec<(Command, Vec<u32>, usize)>;

/// Lets a server with these capabilities answer properly while `calls` runs, and returns what it was sent.
fn sent(capabilities: &'static str, calls: impl FnOnce(&Client)) -> Sent {
    let (client, server) = connect(capabilities, &options(LONG), Memory::new(0), |mut peer| {
        let mut sent = Vec::new();
        while let Some(message) = peer.try_receive() {
            peer.reply(&message, &good_payload(&message));
            sent.push((
                message.command(),
                words(&message.payload),
                message.fds.len(),
            ));
        }
        sent
    });
    calls(&client);
    drop(client);
    server.join().unwrap()
}

/// Lets a server answer one command with a payload and so many descriptors while `call` runs.
fn answered<T>(payload: Vec<u8>, fds: usize, call: impl FnOnce(&Client) -> T) -> T {
    let (client, server) = connect("", &options(LONG), Memory::new(0), move |mut peer| {
        let message = peer.receive();
        answer(&mut peer, &message, &payload, fds);
        peer.serve();
    });
    let result = call(&client);
    check_alive(&client);
    drop(client);
    server.join().unwrap();
    result
}

/// Answers with a payload and so many descriptors, of files that are as long as their number in the message.
fn answer(peer: &mut Peer, message: &Message, payload: &[u8], fds: usize) {
    let files: Vec<_> = (0..fds as u64).map(file).collect();
    let fds: Vec<_> = files.iter().map(AsFd::as_fd).collect();
    peer.send_with(&reply(message, payload), &fds);
}

fn file(len: u64) -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(len).unwrap();
    file
}

fn length<T>(list: &[T]) -> u32 {
    u32::try_from(list.len()).unwrap()
}

/// Payload bytes as 32-bit words.
fn words(payload: &[u8]) -> Vec<u32> {
    let words = payload.chunks(4).map(|chunk| {
        let mut word = [0; 4];
        word[..chunk.len()].copy_from_slice(chunk);
        u32::from_ne_bytes(word)
    });
    words.collect()
}

/// 32-bit words as payload bytes.
fn bytes(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

#[test]
fn the_proposal_names_every_capability() {
    let (stream, server) = support::start(|mut peer| {
        let proposal = peer.expect(Command::Version);
        assert_eq!(proposal.payload[..4], [0, 0, 2, 0]);
        assert_eq!(proposal.payload.last(), Some(&0));
        String::from_utf8(proposal.payload[4..proposal.payload.len() - 1].to_vec()).unwrap()
    });
    let result = Client::handshake(stream, Memory::new(0), &options(LONG));
    assert_eq!(kind(&result.map(drop)), "lost");
    assert_eq!(
        server.join().unwrap(),
        "{\"capabilities\":{\"max_msg_fds\":253,\"max_data_xfer_size\":28672,\"max_dma_maps\":65535,\
         \"pgsizes\":1075843072,\"write_multiple\":true,\"twin_socket\":{\"supported\":true}}}"
    );
}

#[test]
fn memory_is_mapped_and_unmapped() {
    let file = file(0x4000);
    let sent = sent("\"max_msg_fds\":1", |client| {
        let fd = Some((file.as_fd(), 0x1000));
        client
            .dma_map(0x1_0000_2000, 0x3000, fd, DmaAccess::ReadWrite)
            .unwrap();
        client
            .dma_map(0x2000, 0x1000, None, DmaAccess::ReadOnly)
            .unwrap();
        client.dma_unmap(0x2000, 0x1000).unwrap();
        client.dma_unmap_all().unwrap();
    });
    let expected = [
        (
            Command::DmaMap,
            vec![32, 3, 0x1000, 0, 0x2000, 1, 0x3000, 0],
            1,
        ),
        (Command::DmaMap, vec![32, 1, 0, 0, 0x2000, 0, 0x1000, 0], 0),
        (Command::DmaUnmap, vec![24, 0, 0x2000, 0, 0x1000, 0], 0),
        (Command::DmaUnmap, vec![24, 2, 0, 0, 0, 0], 0),
    ];
    assert_eq!(sent, expected);
}

#[test]
fn a_server_that_takes_no_descriptors_gets_none() {
    let file = file(0x1000);
    let sent = sent("\"max_msg_fds\":0", |client| {
        let fd = Some((file.as_fd(), 0x1000));
        client
            .dma_map(0x1000, 0x1000, fd, DmaAccess::ReadWrite)
            .unwrap();
        let events = client.set_irq_events(2, 0, &[file.as_fd()]);
        assert!(matches!(events, Err(ConnError::Limit(_))));
        client
            .set_irqs(2, 0, IrqAction::Trigger, Irqs::Chosen(&[1]))
            .unwrap();
    });
    let expected = [
        (Command::DmaMap, vec![32, 3, 0, 0, 0x1000, 0, 0x1000, 0], 0),
        (Command::DeviceSetIrqs, vec![21, 0x22, 2, 0, 1, 1], 0),
    ];
    assert_eq!(sent, expected);
}

#[test]
fn mappings_are_counted_and_aligned_as_the_server_says() {
    let sent = sent("\"max_dma_maps\":2,\"pgsizes\":2097152", |client| {
        let map = |iova, size| kind(&client.dma_map(iova, size, None, DmaAccess::ReadWrite));
        assert_eq!(map(0x1000, 0x20_0000), "other");
        assert_eq!(map(0x20_0000, 0x1000), "other");
        assert_eq!(map(0x20_0000, 0x20_0000), "ok");
        assert_eq!(map(0x40_0000, 0x20_0000), "ok");
        assert_eq!(map(0x60_0000, 0x20_0000), "other");
        client.dma_unmap(0x20_0000, 0x20_0000).unwrap();
        assert_eq!(map(0x60_0000, 0x20_0000), "ok");
    });
    assert_eq!(sent.len(), 4);
}

#[test]
fn the_device_describes_itself() {
    let info = answered(bytes(&[16, 1, 9, 5]), 0, |client| {
        client.device_info().unwrap()
    });
    let expected = DeviceInfo {
        resettable: true,
        pci: false,
        regions: 9,
        irqs: 5,
    };
    assert_eq!(info, expected);
    let info = answered(bytes(&[16, 0xb, 2, 64]), 0, |client| {
        client.irq_info(2).unwrap()
    });
    let expected = IrqInfo {
        count: 64,
        eventfd: true,
        maskable: true,
        automasked: false,
        noresize: true,
    };
    assert_eq!(info, expected);
}

/// The words of region information: flags, where capabilities begin, size, offset in the file, and capabilities.
fn region(flags: u32, caps: u32, size: u32, offset: u32, rest: &[u32]) -> Vec<u8> {
    let head = [32, flags, 0, caps, size, 0, offset, 0];
    bytes(&[&head, rest].concat())
}

/// The words of a list of areas in a capability.
fn areas(areas: &[(u32, u32)]) -> Vec<u32> {
    let mut words = vec![1 | 1 << 16, 0, length(areas), 0];
    for (offset, size) in areas {
        words.extend([*offset, 0, *size, 0]);
    }
    words
}

#[test]
fn mappable_areas_are_those_that_can_be_mapped() {
    let info = |payload, fds| answered(payload, fds, |client| client.region_info(0));
    let area = |offset, size, file_offset| MappedArea {
        offset,
        size,
        file_offset,
    };

    let whole = info(region(7, 0, 0x3000, 0x10000, &[]), 1).unwrap();
    assert_eq!(whole.areas, [area(0, 0x3000, 0x10000)]);
    assert!(whole.readable && whole.writable && whole.file.is_some());

    let no_file = info(region(7, 0, 0x3000, 0, &[]), 0).unwrap();
    assert!(no_file.areas.is_empty() && no_file.file.is_none());
    let not_mappable = info(region(3, 0, 0x3000, 0, &[]), 1).unwrap();
    assert!(not_mappable.areas.is_empty() && not_mappable.file.is_none());
    let none = info(region(15, 32, 0x3000, 0, &areas(&[])), 1).unwrap();
    assert!(none.areas.is_empty() && none.file.is_none());

    // In the order of offsets, and without what is no whole page.
    let list = areas(&[
        (0x4000, 0x1000),
        (0x1000, 0x2000),
        (0x8000, 0x800),
        (0x9800, 0x1000),
        (0x7000, 0),
    ]);
    let sparse = info(region(15, 32, 0x10000, 0x1000, &list), 1).unwrap();
    let expected = [area(0x1000, 0x2000, 0x2000), area(0x4000, 0x1000, 0x5000)];
    assert_eq!(sparse.areas, expected);

    let bad = [
        ("past the end", areas(&[(0xf000, 0x2000)])),
        ("far past the end", areas(&[(u32::MAX, u32::MAX)])),
        (
            "around the end",
            vec![1 | 1 << 16, 0, 1, 0, 0x1000, 0, 0xffff_f000, u32::MAX],
        ),
        ("twice", areas(&[(0x1000, 0x1000), (0x1000, 0x1000)])),
        ("overlapping", areas(&[(0x1000, 0x2000), (0x2000, 0x2000)])),
        ("enclosing", areas(&[(0x1000, 0x4000), (0x2000, 0x1000)])),
    ];
    for (what, list) in bad {
        let result = info(region(15, 32, 0x10000, 0, &list), 1).map(drop);
        assert_eq!(kind(&result), "layout", "{what}");
    }
    let loops = [2 | 1 << 16, 32, 0, 0];
    let result = info(region(15, 32, 0x10000, 0, &loops), 1).map(drop);
    assert_eq!(kind(&result), "bad answer");
}

#[test]
fn a_long_list_of_areas_is_asked_for_again() {
    let list: Vec<_> = (0..1000).map(|i| (0x1000 * 2 * i, 0x1000)).collect();
    let mut long = region(15, 32, 0x1000_0000, 0, &areas(&list));
    let needed = length(&long);
    long[..4].copy_from_slice(&needed.to_ne_bytes());
    let (client, server) = connect("", &options(LONG), Memory::new(0), move |mut peer| {
        let first = peer.expect(Command::DeviceGetRegionInfo);
        assert!(words(&first.payload)[0] < needed);
        let short = [
            &needed.to_ne_bytes()[..],
            &region(7, 0, 0x1000_0000, 0, &[])[4..],
        ]
        .concat();
        peer.reply(&first, &short);
        let second = peer.expect(Command::DeviceGetRegionInfo);
        assert_eq!(words(&second.payload)[0], needed);
        answer(&mut peer, &second, &long, 1);
        // Who needs more each time is not asked a third time.
        for needed in [5000u32, 6000] {
            let message = peer.receive();
            let short = [
                &needed.to_ne_bytes()[..],
                &region(7, 0, 0x1000_0000, 0, &[])[4..],
            ]
            .concat();
            peer.reply(&message, &short);
        }
        let message = peer.receive();
        peer.reply(&message, &[0xff; 32]);
    });
    assert_eq!(client.region_info(0).unwrap().areas.len(), 1000);
    assert_eq!(kind(&client.region_info(0).map(drop)), "too long");
    assert_eq!(kind(&client.region_info(0).map(drop)), "too long");
    server.join().unwrap();
}

#[test]
fn doorbells_of_both_layouts_are_read() {
    for shadow in [&[][..], &[9, 9]] {
        let entry = |offset, size, fd, kind, flags, value| {
            [
                &[offset, 0, size, 0, fd, kind, flags, 0],
                shadow,
                &[value, 0],
            ]
            .concat()
        };
        let entries = [
            entry(0x1000, 4, 2, 0, 1, 7),
            entry(0x1004, 0, 1, 0, 2, 0),
            entry(0x1008, 4, 0, 1, 0, 0),
            entry(0x100c, 4, 0, 2, 0, 0),
        ]
        .concat();
        let argsz = 16 + 4 * length(&entries);
        let payload = bytes(&[&[argsz, 0, 2, 4], &entries[..]].concat());
        let events = answered(payload, 3, |client| client.region_io_fds(2).unwrap());
        assert_eq!(events.len(), 2);
        let len = |event: usize| {
            let file = File::from(events[event].fd.try_clone().unwrap());
            file.metadata().unwrap().size()
        };
        assert_eq!((events[0].offset, events[0].size, len(0)), (0x1000, 4, 2));
        assert_eq!((events[0].datamatch, events[0].pio), (Some(7), false));
        assert_eq!((events[1].offset, events[1].size, len(1)), (0x1004, 0, 1));
        assert_eq!((events[1].datamatch, events[1].pio), (None, true));
    }
}

#[test]
fn doorbells_without_their_descriptor_are_refused() {
    let payload = bytes(&[56, 0, 0, 1, 0, 0, 4, 0, 1, 0, 0, 0, 0, 0]);
    let result = answered(payload, 1, |client| client.region_io_fds(0).map(drop));
    assert_eq!(kind(&result), "descriptors");
}

#[test]
fn interrupts_go_out_in_as_many_messages_as_the_server_needs() {
    let event = file(0);
    let events = [event.as_fd(); 5];
    let sent = sent("\"max_msg_fds\":2", |client| {
        client.set_irq_events(2, 10, &events).unwrap();
        client.set_irq_events(2, 0, &[]).unwrap();
        client.disable_irqs(2).unwrap();
        client.unmask_irq(0, 0, 1).unwrap();
        client.unmask_irq_by_event(0, event.as_fd()).unwrap();
        client
            .set_irqs(1, 4, IrqAction::Mask, Irqs::Chosen(&[1, 0, 1, 1]))
            .unwrap();
    });
    let expected = [
        (Command::DeviceSetIrqs, vec![20, 0x24, 2, 10, 2], 2),
        (Command::DeviceSetIrqs, vec![20, 0x24, 2, 12, 2], 2),
        (Command::DeviceSetIrqs, vec![20, 0x24, 2, 14, 1], 1),
        (Command::DeviceSetIrqs, vec![20, 0x21, 2, 0, 0], 0),
        (Command::DeviceSetIrqs, vec![20, 0x11, 0, 0, 1], 0),
        (Command::DeviceSetIrqs, vec![20, 0x14, 0, 0, 1], 1),
        (
            Command::DeviceSetIrqs,
            vec![24, 0x0a, 1, 4, 4, 0x0101_0001],
            0,
        ),
    ];
    assert_eq!(sent, expected);
}

#[test]
fn region_accesses_are_split_as_the_server_needs() {
    let sent = sent("\"max_data_xfer_size\":8", |client| {
        let mut data = [0; 20];
        client.region_read(1, 0x100, &mut data).unwrap();
        assert_eq!(
            data,
            [
                0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19
            ]
        );
        client.region_write(1, 0x100, &[5; 9]).unwrap();
        client.region_read(1, 0, &mut []).unwrap();
        client.reset().unwrap();
    });
    let access = |offset, count| vec![offset, 0, 1, count];
    let expected = [
        (Command::RegionRead, access(0x100, 8), 0),
        (Command::RegionRead, access(0x108, 8), 0),
        (Command::RegionRead, access(0x110, 4), 0),
        (
            Command::RegionWrite,
            [access(0x100, 8), vec![0x0505_0505; 2]].concat(),
            0,
        ),
        (
            Command::RegionWrite,
            [access(0x108, 1), vec![5]].concat(),
            0,
        ),
        (Command::DeviceReset, vec![], 0),
    ];
    assert_eq!(sent, expected);
}

#[test]
fn no_message_is_longer_than_32_kib() {
    let (client, server) = connect(
        "\"max_data_xfer_size\":1048576,\"write_multiple\":true",
        &options(LONG),
        Memory::new(0),
        |mut peer| {
            let mut total = 0;
            while let Some(message) = peer.try_receive() {
                assert!(message.header.size <= 32 << 10);
                total += message.payload.len();
                if !message.header.is_posted() {
                    peer.reply(&message, &good_payload(&message));
                }
            }
            total
        },
    );
    let data = vec![1; 100_000];
    client.region_write(0, 0, &data).unwrap();
    client.region_post(0, 0, &data).unwrap();
    client.migration_write(&data).unwrap();
    let write = RegionWrite {
        region: 0,
        offset: 0,
        data: &[1; 8],
    };
    client.region_write_multi(&vec![write; 10_000]).unwrap();
    let ranges = vec![LoggingRange { iova: 0, length: 0 }; 3000];
    let result = client.start_dma_logging(4096, &ranges).map(drop);
    assert_eq!(kind(&result), "other");
    drop(client);
    assert!(server.join().unwrap() > 540_000);
}

#[test]
fn small_writes_go_together_where_the_server_knows_how() {
    let writes = [
        RegionWrite {
            region: 1,
            offset: 0x10,
            data: &[1, 2],
        },
        RegionWrite {
            region: 2,
            offset: 0x20,
            data: &[3; 8],
        },
    ];
    let together = sent("\"write_multiple\":true", |client| {
        client.region_write_multi(&writes).unwrap();
        let long = RegionWrite {
            region: 0,
            offset: 0,
            data: &[0; 9],
        };
        assert_eq!(kind(&client.region_write_multi(&[long])), "other");
    });
    let words = vec![
        2,
        0,
        0x10,
        0,
        1,
        2,
        0x0201,
        0,
        0x20,
        0,
        2,
        8,
        0x0303_0303,
        0x0303_0303,
    ];
    assert_eq!(together, [(Command::RegionWriteMulti, words, 0)]);
    let apart = sent("", |client| client.region_write_multi(&writes).unwrap());
    assert_eq!(apart.len(), 2);
    assert_eq!(apart[1].0, Command::RegionWrite);
    // Fewer than asked for is not success.
    let (client, server) = connect(
        "\"write_multiple\":true",
        &options(LONG),
        Memory::new(0),
        |mut peer| {
            let message = peer.receive();
            peer.reply(&message, &1u64.to_ne_bytes());
        },
    );
    assert_eq!(kind(&client.region_write_multi(&writes)), "bad answer");
    server.join().unwrap();
}

#[test]
fn the_device_migrates() {
    let sent = sent("", |client| {
        client.set_device_state(DeviceState::PreCopy).unwrap();
        client.migration_write(&[9; 5]).unwrap();
        let range = LoggingRange {
            iova: 0x1000,
            length: 0x2000,
        };
        assert_eq!(client.start_dma_logging(4096, &[range]).unwrap(), 4096);
        client.stop_dma_logging().unwrap();
        assert_eq!(kind(&client.dma_log(0, 4096, 0).map(drop)), "other");
        assert_eq!(kind(&client.dma_log(0, u64::MAX, 1).map(drop)), "other");
    });
    let expected = [
        (Command::DeviceFeature, vec![16, 2 | 1 << 17, 6, 0], 0),
        (Command::MigDataWrite, vec![13, 5, 0x0909_0909, 9], 0),
        (
            Command::DeviceFeature,
            vec![40, 6 | 1 << 17, 4096, 0, 1, 0, 0x1000, 0, 0x2000, 0],
            0,
        ),
        (Command::DeviceFeature, vec![8, 7 | 1 << 17], 0),
    ];
    assert_eq!(sent, expected);

    let flags = answered(bytes(&[16, 1 | 1 << 16, 5, 0]), 0, |client| {
        client.migration_flags().unwrap()
    });
    assert_eq!(flags, MigrationFlags::STOP_COPY | MigrationFlags::PRE_COPY);
    let state = answered(bytes(&[16, 2 | 1 << 16, 3, 0]), 0, |client| {
        client.device_state().unwrap()
    });
    assert_eq!(state, DeviceState::StopCopy);
    let state = answered(bytes(&[16, 2 | 1 << 16, 8, 0]), 0, |client| {
        client.device_state().map(drop)
    });
    assert_eq!(kind(&state), "bad answer");
}

#[test]
fn migration_data_ends_where_the_device_says() {
    // Padded to the size that was asked for, as libvfio-user does.
    let read = answered(bytes(&[24, 5, 0x0403_0201, 5, 0, 0]), 0, |client| {
        let mut data = [0xff; 16];
        let count = client.migration_read(&mut data).unwrap();
        data[..count].to_vec()
    });
    assert_eq!(read, [1, 2, 3, 4, 5]);
    let read = |words: &[u32]| {
        answered(bytes(words), 0, |client| {
            client.migration_read(&mut [0; 8]).map(drop)
        })
    };
    assert_eq!(kind(&read(&[8, 0])), "ok");
    assert_eq!(kind(&read(&[16, 9, 0, 0])), "bad answer");
    assert_eq!(kind(&read(&[16, 8, 0])), "bad answer");
    assert_eq!(kind(&read(&[16, u32::MAX, 0, 0])), "bad answer");
}

#[test]
fn the_log_of_writes_is_complete_or_an_error() {
    let log = |words: &[u32]| {
        answered(bytes(words), 0, |client| {
            client.dma_log(0x1000, 65 * 4096, 4096)
        })
    };
    let head = [48, 8 | 1 << 16, 0x1000, 0, 65 * 4096, 0, 4096, 0];
    let full = log(&[&head[..], &[1, 2, 1, 0]].concat()).unwrap();
    assert_eq!(full, [1 | 2 << 32, 1]);
    assert_eq!(
        kind(&log(&[&head[..], &[1, 2]].concat()).map(drop)),
        "bad answer"
    );
    assert_eq!(kind(&log(&head).map(drop)), "bad answer");
    assert_eq!(kind(&log(&[]).map(drop)), "bad answer");
}

#[test]
fn descriptors_that_nobody_asked_for_are_closed() {
    let mut file = file(0);
    file.write_all(b"x").unwrap();
    file.rewind().unwrap();
    let result = answered(bytes(&[16, 0, 1, 1]), 3, |client| {
        client.device_info().map(drop)
    });
    assert_eq!(kind(&result), "descriptors");
}
