//! What a hostile client says while the device waits for its answer.

#![expect(clippy::unwrap_used, reason = "a test panics when it fails")]

mod support;

use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use support::raw::{Raw, access, longs, message, words};
use support::{Everything, register, serve};
use vfio_user_protocol::{Command, DmaAccess, Header, take};
use vfio_user_server::{Ended, Options};
use zerocopy::IntoBytes;

const EIO: u32 = 5;

/// Lets the device read guest memory by a message, and answers as `script` says.
fn asked(
    options: Options,
    script: impl FnOnce(&mut Raw, Header, DmaAccess),
) -> (
    u32,
    Raw,
    JoinHandle<(vfio_user_server::Server<Everything>, Ended)>,
) {
    let (stream, thread) = serve(Everything::server(options));
    let mut raw = Raw::new(stream);
    raw.agree("");
    let write = |raw: &mut Raw, region, offset, value: u64| {
        let payload = [access(region, offset, 8), longs(&[value])].concat();
        raw.send(&message(Command::RegionWrite as u16, &payload), &[]);
    };
    let map = [words(&[32, 3]), longs(&[0, 0x1000, 0x1000])].concat();
    assert_eq!(raw.call(Command::DmaMap as u16, &map, &[]).errno(), 0);
    for (region, offset, value) in [
        (7, 0, 6 << 32),
        (0, register::ADDRESS, 0x1010),
        (0, register::LENGTH, 4),
    ] {
        write(&mut raw, region, offset, value);
        assert_eq!(raw.receive().unwrap().errno(), 0);
    }
    write(&mut raw, 0, register::SUM, 0);
    let asked = raw.receive().unwrap();
    assert_eq!(asked.header.command, Command::DmaRead as u16);
    let (access, _) = take::<DmaAccess>(&asked.payload).unwrap();
    assert_eq!((access.address, access.count), (0x1010, 4));
    script(&mut raw, asked.header, access);
    let answer = raw.receive().map_or(u32::MAX, |answer| answer.errno());
    (answer, raw, thread)
}

#[test]
fn wrong_answers_to_the_devices_commands_are_its_errors() {
    let options = Options {
        memory_deadline: Duration::from_millis(200),
        ..Options::default()
    };
    let reply =
        |header: Header, payload: &[u8]| [header.reply(payload.len()).as_bytes(), payload].concat();
    let good = |access: DmaAccess| [access.as_bytes(), &[1, 2, 3, 4]].concat();
    type Script = Box<dyn Fn(Header, DmaAccess) -> Vec<u8>>;
    let scripts: [(&str, u32, Script); 9] = [
        (
            "a good one",
            0,
            Box::new(move |header, access| reply(header, &good(access))),
        ),
        ("none", EIO, Box::new(|_, _| Vec::new())),
        (
            "an error",
            EIO,
            Box::new(|header, _| header.refusal(14).as_bytes().to_vec()),
        ),
        (
            "nothing",
            EIO,
            Box::new(move |header, _| reply(header, &[])),
        ),
        (
            "too little",
            EIO,
            Box::new(move |header, access| reply(header, &good(access)[..19])),
        ),
        (
            "too much",
            EIO,
            Box::new(move |header, access| reply(header, &[good(access), vec![0]].concat())),
        ),
        (
            "another count",
            EIO,
            Box::new(move |header, access| reply(header, &good(DmaAccess { count: 5, ..access }))),
        ),
        (
            "another address",
            EIO,
            Box::new(move |header, access| {
                reply(
                    header,
                    &good(DmaAccess {
                        address: 0,
                        ..access
                    }),
                )
            }),
        ),
        (
            "another id",
            EIO,
            Box::new(move |header, access| {
                reply(
                    Header {
                        id: header.id ^ 1,
                        ..header
                    },
                    &good(access),
                )
            }),
        ),
    ];
    for (name, errno, script) in scripts {
        let (answer, mut raw, _) = asked(options, |raw, header, access| {
            let bytes = script(header, access);
            if !bytes.is_empty() {
                raw.send(&bytes, &[]);
            }
        });
        assert_eq!(answer, errno, "{name}");
        raw.check_alive();
    }
}

#[test]
fn commands_that_come_while_the_device_waits_are_done_later() {
    let (answer, mut raw, _) = asked(Options::default(), |raw, header, access| {
        raw.send(&message(Command::RegionRead as u16, &read_ids()), &[]);
        let payload = [access.as_bytes(), &[1, 2, 3, 4]].concat();
        raw.send(
            &[header.reply(payload.len()).as_bytes(), &payload[..]].concat(),
            &[],
        );
    });
    assert_eq!(answer, 0);
    assert_eq!(raw.receive().unwrap().payload[16..], [0x52, 0x4f]);
    raw.check_alive();
}

fn read_ids() -> Vec<u8> {
    access(7, 0, 2)
}

#[test]
fn a_flood_of_commands_while_the_device_waits_ends_the_connection() {
    let start = Instant::now();
    let (_, _, thread) = asked(Options::default(), |raw, _, _| {
        let read = message(
            Command::RegionWrite as u16,
            &[access(2, 0, 0x1000), vec![0; 0x1000]].concat(),
        );
        while rustix::io::write(&raw.0, &read).is_ok() {}
    });
    let (server, ended) = thread.join().unwrap();
    assert_eq!(ended, Ended::Flood);
    assert!(start.elapsed() < support::LONG);
    drop(server);
}
