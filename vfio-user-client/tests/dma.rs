//! The device's own accesses to memory, over the twin socket and over the main one.

#![expect(clippy::unwrap_used, reason = "a test panics when it fails")]

mod support;

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use support::{
    LONG, Memory, Peer, check_alive, connect, dma, good_payload, is_readable, options, start,
};
use vfio_user_client::{Client, Command, Loss, State};
use vfio_user_protocol::{Header, MessageFlags};
use zerocopy::IntoBytes;

const TWIN: &str = "\"twin_socket\":{\"supported\":true,\"fd_index\":0}";

/// A client and a server with a twin socket, of which the script gets both ends.
fn connect_twin<T: Send + 'static>(
    memory: std::sync::Arc<Memory>,
    script: impl FnOnce(Peer, Peer) -> T + Send + 'static,
) -> (Client, JoinHandle<T>) {
    let (stream, server) = start(move |mut peer| {
        let (here, there) = UnixStream::pair().unwrap();
        peer.agree(TWIN, &[there.as_fd()]);
        drop(there);
        script(peer, Peer { stream: here })
    });
    (
        Client::handshake(stream, memory, &options(LONG)).unwrap(),
        server,
    )
}

/// Asks for memory in every way, right and wrong.
fn ask_for_everything(peer: &mut Peer) {
    // A read is answered with the request's address and count, and the data.
    peer.send(&dma(3, Command::DmaRead, 0x1010, 4, &[]));
    let answer = peer.expect(Command::DmaRead);
    assert!(answer.header.is_reply() && !answer.header.is_error());
    assert_eq!(answer.header.id, 3);
    let expected = [
        0x10, 0x10, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0x10, 0x11, 0x12, 0x13,
    ];
    assert_eq!(answer.payload, expected);

    // A write is answered with 16 bytes.
    peer.send(&dma(4, Command::DmaWrite, 0x1020, 2, &[0xaa, 0xbb]));
    let answer = peer.expect(Command::DmaWrite);
    assert!(!answer.header.is_error());
    let expected = [0x20, 0x10, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0];
    assert_eq!(answer.payload, expected);

    // A posted write is not answered.
    let mut posted = dma(5, Command::DmaWrite, 0x1022, 1, &[0xcc]);
    posted[8] |= MessageFlags::NO_REPLY.bits().to_ne_bytes()[0];
    peer.send(&posted);

    let header = Header::command(6, Command::DmaRead, 8);
    let refused: [(&str, u32, Vec<u8>); 9] = [
        ("before memory", 14, dma(6, Command::DmaRead, 0xfff, 2, &[])),
        ("past memory", 14, dma(6, Command::DmaRead, 0x1fff, 2, &[])),
        (
            "around the end",
            14,
            dma(6, Command::DmaRead, u64::MAX, 2, &[]),
        ),
        (
            "past memory",
            14,
            dma(6, Command::DmaWrite, 0x1fff, 2, &[1, 2]),
        ),
        (
            "more than agreed",
            22,
            dma(6, Command::DmaRead, 0x1000, (28 << 10) + 1, &[]),
        ),
        (
            "four exabytes",
            22,
            dma(6, Command::DmaRead, 0x1000, u64::MAX, &[]),
        ),
        (
            "not what it counts",
            22,
            dma(6, Command::DmaWrite, 0x1000, 3, &[1, 2]),
        ),
        (
            "too much",
            22,
            dma(6, Command::DmaWrite, 0x1000, 100_000, &[7; 100_000]),
        ),
        ("no access", 22, [header.as_bytes(), &[0; 8]].concat()),
    ];
    for (what, errno, message) in refused {
        peer.send(&message);
        let answer = peer.receive();
        assert_eq!(
            (answer.header.id, answer.header.error),
            (6, errno),
            "{what}"
        );
        assert!(answer.header.is_error() && answer.payload.is_empty());
    }
    let unknown = Header {
        command: 9,
        ..Header::command(6, Command::DmaRead, 0)
    };
    peer.send(unknown.as_bytes());
    assert_eq!(peer.receive().header.error, 38);
}

fn check_written(memory: &Memory) {
    let bytes = memory.bytes.lock().unwrap();
    assert_eq!(bytes[0x20..0x24], [0xaa, 0xbb, 0xcc, 0x23]);
}

#[test]
fn the_twin_socket_is_served_whatever_the_main_one_does() {
    let memory = Memory::new(0x1000);
    let (client, server) = connect_twin(memory.clone(), |mut peer, mut twin| {
        // Within a command, as a device does that copies when its doorbell rings.
        let command = peer.receive();
        ask_for_everything(&mut twin);
        peer.reply(&command, &good_payload(&command));
        // And when nobody asks.
        ask_for_everything(&mut twin);
        peer.serve();
    });
    assert_eq!(client.limits().twin_socket, Some(0));
    check_alive(&client);
    client.region_post(0, 0, &[1]).unwrap();
    check_alive(&client);
    drop(client);
    server.join().unwrap();
    check_written(&memory);
}

#[test]
fn the_main_socket_is_served_by_whoever_waits_there() {
    let memory = Memory::new(0x1000);
    let (client, server) = connect("", &options(LONG), memory.clone(), |mut peer| {
        let command = peer.receive();
        ask_for_everything(&mut peer);
        peer.reply(&command, &good_payload(&command));
        peer.serve();
    });
    check_alive(&client);
    assert_eq!(client.counters().served, 13);
    drop(client);
    server.join().unwrap();
    check_written(&memory);
}

#[test]
fn the_main_socket_is_served_by_the_event_loop_when_nobody_waits() {
    let memory = Memory::new(0x1000);
    let (client, server) = connect("", &options(LONG), memory.clone(), |mut peer| {
        ask_for_everything(&mut peer);
    });
    while !server.is_finished() {
        if is_readable(&client, Duration::from_millis(10)) {
            client.serve();
        }
    }
    server.join().unwrap();
    check_written(&memory);
}

#[test]
fn after_memory_was_asked_for_on_the_main_socket_commands_come_one_at_a_time() {
    let (client, server) = connect("", &options(LONG), Memory::new(0x1000), |mut peer| {
        // Posted writes go without an answer at first.
        assert!(peer.expect(Command::RegionWrite).header.is_posted());
        let command = peer.expect(Command::RegionRead);
        peer.send(&dma(1, Command::DmaRead, 0x1000, 16, &[]));
        peer.expect(Command::DmaRead);
        peer.reply(&command, &good_payload(&command));
        // From now on not, and nothing follows a command before it is answered, although many threads call.
        for _ in 0..40 {
            let command = peer.receive();
            assert!(!command.header.is_posted());
            let silence = Some(Duration::from_millis(2));
            peer.stream.set_read_timeout(silence).unwrap();
            assert!(peer.try_receive().is_none());
            peer.stream.set_read_timeout(None).unwrap();
            // What comes next is what libvfio-user would take for the answer.
            peer.send(&dma(2, Command::DmaRead, 0x1000, 16, &[]));
            assert!(peer.receive().header.is_reply());
            peer.reply(&command, &good_payload(&command));
        }
    });
    client.region_post(0, 0, &[1]).unwrap();
    check_alive(&client);
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..5 {
                    client.region_post(0, 0, &[1]).unwrap();
                    check_alive(&client);
                }
            });
        }
    });
    server.join().unwrap();
}

#[test]
fn a_server_that_asks_for_memory_and_does_not_read_is_no_deadlock() {
    // Both directions fill up: the server asks for 4 MiB before it reads anything, and commands come in meanwhile.
    const ASKED: usize = 256;
    let (client, server) = connect("", &options(LONG), Memory::new(0x5000), |mut peer| {
        let mut writer = peer.stream.try_clone().unwrap();
        let asks = thread::spawn(move || {
            use std::io::Write;
            for _ in 0..ASKED {
                writer
                    .write_all(&dma(1, Command::DmaRead, 0x1000, 0x4000, &[]))
                    .unwrap();
            }
        });
        thread::sleep(Duration::from_millis(300));
        let (mut answers, mut calls) = (0, 0);
        while answers < ASKED || calls < 20 {
            let message = peer.receive();
            if message.header.is_reply() {
                assert_eq!(message.payload.len(), 16 + 0x4000);
                answers += 1;
            } else {
                peer.reply(&message, &good_payload(&message));
                calls += 1;
            }
        }
        asks.join().unwrap();
    });
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..5 {
                    check_alive(&client);
                }
            });
        }
    });
    while !server.is_finished() {
        if is_readable(&client, Duration::from_millis(10)) {
            client.serve();
        }
    }
    server.join().unwrap();
}

#[test]
fn the_end_of_the_twin_socket_is_the_end_of_the_connection() {
    let (client, server) = connect_twin(Memory::new(0), |mut peer, twin| {
        drop(twin);
        assert!(peer.try_receive().is_none());
    });
    assert!(is_readable(&client, LONG));
    assert_eq!(client.serve(), State::Lost(Loss::Closed));
    server.join().unwrap();
}

#[test]
fn garbage_on_the_twin_socket_is_the_end_of_the_connection() {
    let (client, server) = connect_twin(Memory::new(0), |mut peer, mut twin| {
        twin.send(&[0xff; 64]);
        assert!(peer.try_receive().is_none());
    });
    assert!(is_readable(&client, LONG));
    assert_eq!(client.serve(), State::Lost(Loss::Garbage));
    server.join().unwrap();
}

#[test]
fn dropping_the_client_ends_a_twin_thread_that_cannot_send() {
    let (client, server) = connect_twin(Memory::new(0x5000), |mut peer, mut twin| {
        for _ in 0..64 {
            twin.send(&dma(1, Command::DmaRead, 0x1000, 0x4000, &[]));
        }
        let command = peer.receive();
        peer.reply(&command, &good_payload(&command));
        assert!(peer.try_receive().is_none());
    });
    check_alive(&client);
    thread::sleep(Duration::from_millis(50));
    drop(client);
    server.join().unwrap();
}
