//! A client that keeps to no rule of the conversation: the device lives on, and serves the next one.

#![expect(clippy::unwrap_used, reason = "a test panics when it fails")]

mod support;

use std::fs::File;
use std::os::fd::AsFd;
use std::time::Duration;

use support::raw::{Raw, access, longs, message, version, words};
use support::served::Served;
use support::{Everything, memfd, register, serve};
use vfio_user_protocol::{Command, DmaAccess, Header, MessageFlags, take};
use vfio_user_server::{Ended, Options};
use zerocopy::IntoBytes;

const E2BIG: u32 = 7;
const EEXIST: u32 = 17;
const EINVAL: u32 = 22;
const ENOSPC: u32 = 28;

#[test]
fn unknown_commands_are_refused() {
    let served = Served::new(Options::default());
    let mut raw = served.agreed();
    for command in [0, 14, 19, 255, u16::MAX] {
        let answer = raw.call(command, &[1; 100], &[]);
        assert_eq!((answer.errno(), answer.header.command), (EINVAL, command));
    }
    raw.check_alive();
}

#[test]
fn nothing_is_done_before_a_version_is_agreed_on() {
    let served = Served::new(Options::default());
    let mut raw = served.connect();
    for command in (0..20).filter(|command| *command != 1) {
        assert_eq!(raw.call(command, &[0; 64], &[]).errno(), EINVAL);
    }
    raw.agree("");
    raw.check_alive();
}

#[test]
fn versions_that_cannot_be_spoken_end_the_connection() {
    let served = Served::new(Options::default());
    for payload in [
        vec![0; 3],
        version(1, 0, ""),
        version(u16::MAX, 2, ""),
        b"\0\0\0\0{}".to_vec(),
        b"\0\0\0\0{\0".to_vec(),
        b"\0\0\0\0[[[[\0".to_vec(),
        version(0, 2, "\"max_msg_fds\":-1"),
        version(0, 2, "\"max_msg_fds\":\"1\""),
        version(0, 2, "\"max_data_xfer_size\":7"),
        version(0, 2, "\"pgsizes\":65536"),
        version(0, 2, &"\"x\":1,".repeat(10_000)),
    ] {
        let mut raw = served.connect();
        let answer = raw.call(Command::Version as u16, &payload, &[]);
        assert_eq!(answer.errno(), EINVAL, "{}", payload.escape_ascii());
        assert!(raw.receive().is_none());
    }
    served.agreed().check_alive();
}

#[test]
fn the_answer_to_a_version_is_short_and_names_what_was_proposed() {
    let served = Served::new(Options::default());
    // What QEMU 11.1 proposes, and a twin socket.
    let everything = "\"pgsizes\": 4096, \"max_msg_fds\": 16, \"max_dma_maps\": 65535, \
        \"max_data_xfer_size\": 1048576, \"migration\": {\"max_bitmap_size\": 268435456, \"pgsize\": 4096}, \
        \"write_multiple\": true, \"twin_socket\": {\"supported\": true}";
    let answer = served.connect().agree(everything);
    assert!(
        Header::SIZE + answer.payload.len() <= 190,
        "{}",
        answer.payload.len()
    );
    assert_eq!(answer.fds.len(), 1);
    let expected = version(
        0,
        2,
        "\"max_msg_fds\":16,\"max_data_xfer_size\":1048576,\"max_dma_maps\":1024,\"pgsizes\":4096,\
        \"write_multiple\":true,\"twin_socket\":{\"supported\":true,\"fd_index\":0}",
    );
    assert_eq!(
        answer.payload.escape_ascii().to_string(),
        expected.escape_ascii().to_string()
    );

    let nothing = served.connect().agree("");
    assert_eq!(nothing.payload, version(0, 2, ""));
    let some = served
        .connect()
        .agree("\"max_msg_fds\":0,\"write_multiple\":false,\"twin_socket\":{\"supported\":true}");
    assert_eq!(some.payload, version(0, 2, "\"max_msg_fds\":16"));
    // No capabilities at all, and another minor version.
    for (minor, answered) in [(0, 0), (1, 1), (9, 2)] {
        let mut raw = served.connect();
        let payload = words(&[minor << 16]);
        let answer = raw.call(Command::Version as u16, &payload, &[]);
        assert_eq!(answer.payload, version(0, answered, ""));
        raw.check_alive();
    }
}

#[test]
fn what_is_no_message_ends_the_connection() {
    let served = Served::new(Options::default());
    let good = Header::command(1, Command::DeviceReset, 0);
    for header in [
        Header { size: 15, ..good },
        Header { size: 0, ..good },
        Header { flags: 2, ..good },
        Header { flags: 0xf, ..good },
    ] {
        let mut raw = served.agreed();
        raw.send(header.as_bytes(), &[]);
        assert!(raw.receive().is_none());
    }
    served.agreed().check_alive();
}

#[test]
fn messages_that_are_too_long_are_skipped() {
    let served = Served::new(Options::default());
    let mut raw = served.agreed();
    let answer = raw.call(Command::RegionWrite as u16, &vec![1; 5 << 20], &[]);
    assert_eq!(answer.errno(), E2BIG);
    raw.check_alive();
}

#[test]
fn messages_may_come_byte_by_byte() {
    let served = Served::new(Options::default());
    let mut raw = served.agreed();
    let commands = [
        message(
            Command::RegionWrite as u16,
            &[access(0, 0, 4), vec![1, 2, 3, 4]].concat(),
        ),
        message(Command::RegionRead as u16, &access(0, 0, 4)),
    ];
    for byte in commands.concat() {
        raw.send(&[byte], &[]);
    }
    assert_eq!(raw.receive().unwrap().errno(), 0);
    assert_eq!(raw.receive().unwrap().payload[16..], [1, 2, 3, 4]);
}

#[test]
fn descriptors_may_come_with_any_byte_of_their_message() {
    let served = Served::new(Options::default());
    let mut raw = served.agreed();
    let map = [words(&[32, 3]), longs(&[0, 0x1000, 0x1000])].concat();
    let map = message(Command::DmaMap as u16, &map);
    let unmap = message(
        Command::DmaUnmap as u16,
        &[words(&[24, 0]), longs(&[0x1000, 0x1000])].concat(),
    );
    let file = memfd(0x1000);
    for cut in 0..map.len() {
        raw.send(&map[..cut], &[]);
        raw.send(&map[cut..], &[file.as_fd()]);
        raw.send(&unmap, &[]);
        let answers = [
            raw.receive().unwrap().errno(),
            raw.receive().unwrap().errno(),
        ];
        assert_eq!(answers, [0, 0], "{cut}");
    }
}

#[test]
fn posted_commands_have_no_answer_whatever_they_are() {
    let served = Served::new(Options::default());
    let mut raw = served.agreed();
    for command in (0..20).chain([99]) {
        let mut bytes = message(command, &[0; 40]);
        bytes[8] = u8::try_from(MessageFlags::NO_REPLY.bits()).unwrap();
        raw.send(&bytes, &[]);
    }
    raw.check_alive();
}

#[test]
fn replies_that_nobody_waits_for_are_dropped() {
    let served = Served::new(Options::default());
    let mut raw = served.agreed();
    for id in 0..1000 {
        let command = Header::command(id, Command::DmaRead, 0);
        raw.send(&[command.reply(8).as_bytes(), &[0; 8]].concat(), &[]);
    }
    raw.check_alive();
}

#[test]
fn more_mappings_than_agreed_on_are_refused() {
    let served = Served::new(Options {
        max_mappings: 3,
        ..Options::default()
    });
    let mut raw = served.agreed();
    let map = |at: u64| [words(&[32, 3]), longs(&[0, at << 12, 0x1000])].concat();
    let errnos = [1, 2, 3, 4].map(|at| raw.call(Command::DmaMap as u16, &map(at), &[]).errno());
    assert_eq!(errnos, [0, 0, 0, ENOSPC]);
    let again = raw.call(Command::DmaMap as u16, &map(2), &[]).errno();
    assert!([EEXIST, ENOSPC].contains(&again));
}

#[test]
fn a_client_that_does_not_read_is_dropped() {
    let (stream, thread) = serve(Everything::server(Options {
        send_deadline: Duration::from_millis(100),
        ..Options::default()
    }));
    let mut raw = Raw::new(stream);
    raw.agree("");
    raw.0.set_write_timeout(Some(support::LONG)).unwrap();
    let read = message(Command::RegionRead as u16, &access(2, 0, 0x4000));
    // Until the server closes the connection.
    while rustix::io::write(&raw.0, &read).is_ok() {}
    assert_eq!(thread.join().unwrap().1, Ended::Stuck);
}

#[test]
fn a_client_that_goes_in_the_middle_of_anything_leaves_the_server_alive() {
    let served = Served::new(Options::default());
    let file: File = memfd(0x1000);
    let map = [words(&[32, 3]), longs(&[0, 0x1000, 0x1000])].concat();
    let map = message(Command::DmaMap as u16, &map);
    for cut in 0..map.len() {
        let mut raw = served.agreed();
        raw.send(&map[..cut.max(1)], &[file.as_fd()]);
    }
    served.agreed().check_alive();
}

#[test]
fn a_client_that_takes_no_descriptors_is_sent_none() {
    let served = Served::new(Options::default());
    let mut raw = served.connect();
    raw.agree("\"max_msg_fds\":0,\"twin_socket\":{\"supported\":true}");
    let info = words(&[4096, 0, 2, 0, 0, 0, 0, 0]);
    let info = raw.call(Command::DeviceGetRegionInfo as u16, &info, &[]);
    assert_eq!(info.payload, words(&[32, 3, 2, 0, 0x4000, 0, 0, 0]));
    let bells = raw.call(
        Command::DeviceGetRegionIoFds as u16,
        &words(&[4096, 0, 0, 0]),
        &[],
    );
    assert_eq!(bells.payload, words(&[16, 0, 0, 0]));
    // The device works by messages alone.
    let ring = [access(0, register::DOORBELLS, 4), vec![0; 4]].concat();
    assert_eq!(raw.call(Command::RegionWrite as u16, &ring, &[]).errno(), 0);
    let rung = raw.call(
        Command::RegionRead as u16,
        &access(0, register::BELLS, 4),
        &[],
    );
    assert_eq!(rung.payload[16..], [1, 0, 0, 0]);
}

#[test]
fn as_many_doorbells_are_offered_as_the_client_takes_descriptors() {
    let served = Served::new(Options::default());
    let mut raw = served.connect();
    // The default is one.
    raw.agree("");
    let bells = raw.call(
        Command::DeviceGetRegionIoFds as u16,
        &words(&[4096, 0, 0, 0]),
        &[],
    );
    assert_eq!((bells.fds.len(), bells.payload.len()), (1, 16 + 40));
}

#[test]
fn the_clients_limit_is_kept_where_it_does_not_ask() {
    let served = Served::new(Options::default());
    let mut raw = served.connect();
    raw.agree("\"max_data_xfer_size\":64");
    let mut read = |count| {
        raw.call(Command::RegionRead as u16, &access(2, 0, count), &[])
            .errno()
    };
    // What it asks for itself is limited by what is offered.
    assert_eq!([read(0x4000), read((1 << 20) + 1)], [0, EINVAL]);
    let write = [access(2, 0, 0x4000), vec![1; 0x4000]].concat();
    let write = raw.call(Command::RegionWrite as u16, &write, &[]);
    assert_eq!(write.errno(), 0);
    let map = [words(&[32, 3]), longs(&[0, 0x1000, 0x1000])].concat();
    assert_eq!(raw.call(Command::DmaMap as u16, &map, &[]).errno(), 0);
    for (region, offset, value) in [
        (7, 0, 6 << 32),
        (0, register::ADDRESS, 0x1000),
        (0, register::LENGTH, 100),
        (0, register::FILL, 5),
    ] {
        let payload = [access(region, offset, 8), longs(&[value])].concat();
        raw.send(&message(Command::RegionWrite as u16, &payload), &[]);
        if offset != register::FILL {
            assert_eq!(raw.receive().unwrap().errno(), 0);
        }
    }
    for (address, count) in [(0x1000, 64), (0x1040, 36)] {
        let asked = raw.receive().unwrap();
        let (access, data) = take::<DmaAccess>(&asked.payload).unwrap();
        assert_eq!((access.address, access.count), (address, count));
        assert_eq!(data.len() as u64, count);
        // By the letter of the specification, this reply has 12 bytes.
        let reply = &access.as_bytes()[..12];
        raw.send(
            &[asked.header.reply(reply.len()).as_bytes(), reply].concat(),
            &[],
        );
    }
    assert_eq!(raw.receive().unwrap().errno(), 0);
}
