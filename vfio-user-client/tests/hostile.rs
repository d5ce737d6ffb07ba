//! A server that answers every command in every wrong way.
//!
//! The one test here goes through the table that [`BAD_REPLIES`] and [`CALLS`] span. It is alone in its process, so that
//! it can see whether any case left a descriptor open.

#![expect(clippy::unwrap_used, reason = "a test panics when it fails")]

mod support;

use std::fs;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use support::{LONG, Memory, Message, Peer, check_alive, connect, kind, options, reply, start};
use vfio_user_client::{
    Client, Command, ConnError, DeviceState, DmaAccess, IrqAction, Irqs, RegionWrite,
};
use vfio_user_protocol::{Header, MessageFlags};
use zerocopy::IntoBytes;

/// A wrong way to answer.
struct BadReply {
    name: &'static str,
    send: fn(&mut Peer, &Message),
    /// What the call ends in if a proper reply has a payload, and if it has none.
    outcome: [&'static str; 2],
}

/// Every kind of bad reply.
const BAD_REPLIES: [BadReply; 20] = [
    BadReply {
        name: "none",
        send: |_, _| {},
        outcome: ["timed out"; 2],
    },
    BadReply {
        name: "the end of the connection",
        send: |peer, _| peer.stream.shutdown(std::net::Shutdown::Both).unwrap(),
        outcome: ["lost"; 2],
    },
    BadReply {
        name: "the end of the connection within a header",
        send: |peer, command| {
            peer.send(&reply(command, &[])[..7]);
            peer.stream.shutdown(std::net::Shutdown::Both).unwrap();
        },
        outcome: ["lost"; 2],
    },
    BadReply {
        name: "a header without the payload that it promises",
        send: |peer, command| peer.send(command.header.reply(64).as_bytes()),
        outcome: ["timed out"; 2],
    },
    BadReply {
        name: "a refusal",
        send: |peer, command| peer.send(command.header.refusal(5).as_bytes()),
        outcome: ["refused"; 2],
    },
    BadReply {
        name: "a refusal without an errno",
        send: |peer, command| peer.send(command.header.refusal(0).as_bytes()),
        outcome: ["refused"; 2],
    },
    BadReply {
        name: "a refusal with a payload",
        send: |peer, command| {
            let mut header = command.header.reply(64);
            header.flags |= MessageFlags::ERROR.bits();
            header.error = 5;
            peer.send(&[header.as_bytes(), &[0xff; 64]].concat());
        },
        outcome: ["refused"; 2],
    },
    BadReply {
        name: "a refusal longer than any answer",
        send: |peer, command| {
            let mut header = command.header.reply(200_000);
            header.flags |= MessageFlags::ERROR.bits();
            header.error = 5;
            peer.send(&[header.as_bytes(), &vec![0xff; 200_000]].concat());
        },
        outcome: ["refused"; 2],
    },
    BadReply {
        name: "no payload",
        send: |peer, command| peer.reply(command, &[]),
        outcome: ["bad answer", "ok"],
    },
    BadReply {
        name: "half a payload",
        send: |peer, command| peer.reply(command, &[0; 3]),
        outcome: ["bad answer", "too long"],
    },
    BadReply {
        name: "a payload of ones",
        send: |peer, command| peer.reply(command, &[0xff; 16]),
        outcome: ["bad answer", "too long"],
    },
    BadReply {
        name: "a payload longer than any answer",
        send: |peer, command| peer.reply(command, &vec![0; 200_000]),
        outcome: ["too long"; 2],
    },
    BadReply {
        name: "another id",
        send: |peer, command| {
            let header = Header {
                id: command.header.id ^ 0x100,
                ..command.header.reply(0)
            };
            peer.send(header.as_bytes());
        },
        outcome: ["timed out"; 2],
    },
    BadReply {
        name: "another command",
        send: |peer, command| {
            let header = Header {
                command: 0,
                ..command.header.reply(0)
            };
            peer.send(header.as_bytes());
        },
        outcome: ["timed out"; 2],
    },
    BadReply {
        name: "a message smaller than a header",
        send: |peer, command| {
            let header = Header {
                size: 15,
                ..command.header.reply(0)
            };
            peer.send(header.as_bytes());
        },
        outcome: ["lost"; 2],
    },
    BadReply {
        name: "a message of four gigabytes",
        send: |peer, command| {
            let header = Header {
                size: u32::MAX,
                ..command.header.reply(0)
            };
            peer.send(header.as_bytes());
        },
        outcome: ["lost"; 2],
    },
    BadReply {
        name: "a message that is neither command nor reply",
        send: |peer, command| {
            let header = Header {
                flags: 2,
                ..command.header
            };
            peer.send(header.as_bytes());
        },
        outcome: ["lost"; 2],
    },
    BadReply {
        name: "the command itself",
        send: |peer, command| {
            peer.send(&[command.header.as_bytes(), &command.payload[..]].concat());
        },
        outcome: ["timed out"; 2],
    },
    BadReply {
        name: "more descriptors than any answer has",
        send: |peer, command| {
            let file = tempfile::tempfile().unwrap();
            let bytes = reply(command, &[]);
            peer.send_with(&bytes[..1], &[file.as_fd(); 253]);
            peer.send_with(&bytes[1..], &[file.as_fd(); 253]);
        },
        outcome: ["descriptors"; 2],
    },
    BadReply {
        name: "garbage",
        send: |peer, _| peer.send(&[0xa5; 100]),
        outcome: ["lost"; 2],
    },
];

/// A command, and how to give it.
struct Call {
    command: Command,
    /// Whether a proper reply has a payload.
    payload: bool,
    call: fn(&Client) -> Result<(), ConnError>,
}

/// Every command of the client but `VERSION`, which comes before.
const CALLS: [Call; 15] = [
    Call {
        command: Command::DmaMap,
        payload: false,
        call: |client| client.dma_map(0x1000, 0x1000, None, DmaAccess::ReadWrite),
    },
    Call {
        command: Command::DmaUnmap,
        payload: false,
        call: |client| client.dma_unmap(0x1000, 0x1000),
    },
    Call {
        command: Command::DeviceGetInfo,
        payload: true,
        call: |client| client.device_info().map(drop),
    },
    Call {
        command: Command::DeviceGetRegionInfo,
        payload: true,
        call: |client| client.region_info(0).map(drop),
    },
    Call {
        command: Command::DeviceGetRegionIoFds,
        payload: true,
        call: |client| client.region_io_fds(0).map(drop),
    },
    Call {
        command: Command::DeviceGetIrqInfo,
        payload: true,
        call: |client| client.irq_info(0).map(drop),
    },
    Call {
        command: Command::DeviceSetIrqs,
        payload: false,
        call: |client| client.set_irqs(0, 0, IrqAction::Mask, Irqs::Chosen(&[1, 0, 1])),
    },
    Call {
        command: Command::RegionRead,
        payload: true,
        call: |client| client.region_read(0, 0, &mut [0; 4]),
    },
    Call {
        command: Command::RegionWrite,
        payload: true,
        call: |client| client.region_write(0, 0, &[0; 4]),
    },
    Call {
        command: Command::RegionWriteMulti,
        payload: true,
        call: |client| {
            let write = RegionWrite {
                region: 0,
                offset: 0,
                data: &[1, 2],
            };
            client.region_write_multi(&[write, write])
        },
    },
    Call {
        command: Command::DeviceReset,
        payload: false,
        call: |client| client.reset(),
    },
    Call {
        command: Command::DeviceFeature,
        payload: true,
        call: |client| client.device_state().map(drop),
    },
    Call {
        command: Command::DeviceFeature,
        payload: false,
        call: |client| client.set_device_state(DeviceState::Running),
    },
    Call {
        command: Command::MigDataRead,
        payload: true,
        call: |client| client.migration_read(&mut [0; 64]).map(drop),
    },
    Call {
        command: Command::MigDataWrite,
        payload: false,
        call: |client| client.migration_write(&[0; 64]),
    },
];

/// Where a command takes for success, or not, what others don't.
fn exception(command: Command, payload: bool, name: &str) -> Option<&'static str> {
    Some(match (command, name) {
        // Libraries answer unmapping with or without an echo of the command.
        (Command::DmaUnmap, "half a payload" | "a payload of ones") => "ok",
        (Command::DmaUnmap, "a payload longer than any answer") => "too long",
        // Whether a server has doorbells is its own affair, and to refuse the question is to have none.
        (Command::DeviceGetRegionIoFds, "a refusal without an errno") => "ok",
        // As many descriptors as a message can hold are fine here, but there are twice as many.
        (Command::DeviceGetRegionIoFds, "more descriptors than any answer has") => "descriptors",
        // An answer that says that it is longer than any there is room for.
        (Command::DeviceGetRegionIoFds | Command::DeviceGetRegionInfo, "a payload of ones") => {
            "too long"
        }
        // A short list of features is as good as none.
        (Command::DeviceGetInfo | Command::DeviceGetIrqInfo, "a payload of ones") => "ok",
        // A write that says nothing has been done.
        (Command::RegionWrite, "no payload") => "ok",
        (Command::RegionWriteMulti, "a payload of ones") => "too long",
        // Setting a state needs no answer.
        (Command::DeviceFeature, "half a payload" | "a payload of ones") if !payload => "ok",
        _ => return None,
    })
}

#[test]
fn every_bad_reply_to_every_command_ends_in_an_error_by_its_deadline() {
    // What is opened once and stays is opened now.
    run(&CALLS[0], &BAD_REPLIES[0]);
    let before = open_fds();
    for bad in &BAD_REPLIES {
        run_version(bad);
        for call in &CALLS {
            run(call, bad);
        }
    }
    assert_eq!(open_fds(), before, "descriptors leaked");
}

/// Lets the server give one bad reply to one command.
fn run(call: &Call, bad: &BadReply) {
    let case = format!("{:?} is answered with {}", call.command, bad.name);
    let send = bad.send;
    let command = call.command;
    let limit = limit(bad.outcome);
    let (client, server) = connect(
        "\"write_multiple\":true,\"max_msg_fds\":8",
        &options(limit),
        Memory::new(0x1000),
        move |mut peer| {
            let message = peer.expect(command);
            send(&mut peer, &message);
            peer.serve();
        },
    );
    let began = Instant::now();
    let result = (call.call)(&client);
    let took = began.elapsed();
    let outcome = exception(call.command, call.payload, bad.name)
        .unwrap_or_else(|| bad.outcome[usize::from(!call.payload)]);
    assert_eq!(kind(&result), outcome, "{case}: {result:?}");
    assert!(took < limit + MARGIN, "{case}: took {took:?}");
    let half = bad.name == "a header without the payload that it promises";
    if outcome != "lost" && !half {
        check_alive(&client);
    }
    drop(client);
    server.join().unwrap();
}

/// Lets the server give one bad reply to the proposal of a version.
fn run_version(bad: &BadReply) {
    let send = bad.send;
    let (stream, server) = start(move |mut peer| {
        let message = peer.expect(Command::Version);
        send(&mut peer, &message);
        peer.serve();
    });
    let limit = limit(bad.outcome);
    let began = Instant::now();
    let result = Client::handshake(stream, Memory::new(0x1000), &options(limit)).map(drop);
    let took = began.elapsed();
    let case = format!("VERSION is answered with {}: {result:?}", bad.name);
    assert_eq!(kind(&result), bad.outcome[0], "{case}");
    assert!(took < limit + MARGIN, "{case}: took {took:?}");
    server.join().unwrap();
}

/// A short deadline where the case waits for it, and a long one where it must not.
fn limit(outcome: [&str; 2]) -> Duration {
    if outcome == ["timed out"; 2] {
        Duration::from_millis(60)
    } else {
        LONG
    }
}

/// How much later than its deadline a call may end on a busy machine.
const MARGIN: Duration = Duration::from_secs(5);

fn open_fds() -> usize {
    fs::read_dir("/proc/self/fd").unwrap().count()
}
