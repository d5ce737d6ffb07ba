//! Many calls on one connection: who gets which reply, and what happens to those that come late.

#![expect(clippy::unwrap_used, reason = "a test panics when it fails")]

mod support;

use std::process;
use std::sync::Barrier;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use support::{
    LONG, Memory, Message, Peer, check_alive, connect, dma, good_payload, is_readable, kind,
    options, reply,
};
use vfio_user_client::{Client, Command, ConnError, Loss, Options, State};
use vfio_user_protocol::{Header, MessageFlags};
use zerocopy::IntoBytes;

const SHORT: Duration = Duration::from_millis(80);

/// Reads the register at `offset`, whose value is its offset.
fn read(client: &Client, offset: u8) -> Result<u8, ConnError> {
    let mut data = [0];
    client
        .region_read(0, u64::from(offset), &mut data)
        .map(|()| data[0])
}

#[test]
fn replies_in_any_order_reach_their_callers() {
    let (client, server) = connect("", &options(LONG), Memory::new(0), |mut peer| {
        let mut messages: Vec<_> = (0..8).map(|_| peer.receive()).collect();
        messages.reverse();
        for message in &messages {
            peer.reply(message, &good_payload(message));
        }
    });
    thread::scope(|scope| {
        for offset in 0..8 {
            let client = &client;
            scope.spawn(move || assert_eq!(read(client, offset).unwrap(), offset));
        }
    });
    server.join().unwrap();
}

#[test]
fn a_late_reply_is_not_taken_for_that_of_a_later_call() {
    let options = Options {
        max_outstanding: 1,
        ..options(SHORT)
    };
    let (go, gone) = mpsc::channel();
    let (client, server) = connect("", &options, Memory::new(0), move |mut peer| {
        let late = peer.receive();
        gone.recv().unwrap();
        peer.reply(&late, &good_payload(&late));
        peer.serve();
    });
    assert!(matches!(
        read(&client, 1),
        Err(ConnError::TimedOut {
            command: Command::RegionRead,
            ..
        })
    ));
    // The server still has the first command, so it gets no second one.
    assert!(matches!(read(&client, 2), Err(ConnError::TimedOut { .. })));
    go.send(()).unwrap();
    assert_eq!(read(&client, 3).unwrap(), 3);
    let counters = client.counters();
    assert_eq!((counters.timeouts, counters.strays), (2, 1));
    // The two that were answered: the agreement on a version, and the last.
    assert_eq!(counters.latency.buckets.iter().sum::<u64>(), 2);
    drop(client);
    server.join().unwrap();
}

#[test]
fn a_command_that_is_never_answered_does_not_keep_its_place_for_ever() {
    let options = Options {
        max_outstanding: 2,
        ..options(SHORT)
    };
    let (client, server) = connect("", &options, Memory::new(0), |mut peer| {
        for _ in 0..10 {
            peer.receive();
            let answered = peer.receive();
            peer.reply(&answered, &good_payload(&answered));
        }
    });
    for round in 0..10 {
        assert!(read(&client, 100).is_err());
        assert_eq!(read(&client, round).unwrap(), round);
    }
    server.join().unwrap();
}

#[test]
fn a_reader_may_leave_in_the_middle_of_a_message() {
    for cut in [1, 2, 15, 16, 17, 31, 32] {
        let (go, gone) = mpsc::channel();
        let (client, server) = connect("", &options(SHORT), Memory::new(0), move |mut peer| {
            let late = peer.receive();
            let bytes = reply(&late, &good_payload(&late));
            peer.send(&bytes[..cut]);
            gone.recv().unwrap();
            peer.send(&bytes[cut..]);
            peer.serve();
        });
        assert!(read(&client, 1).is_err());
        go.send(()).unwrap();
        assert_eq!(read(&client, 2).unwrap(), 2);
        drop(client);
        server.join().unwrap();
    }
}

#[test]
fn a_deadline_is_kept_whoever_reads() {
    // One thread with a long deadline reads; another with a short one must not wait for it, nor the other way round.
    for slow_first in [true, false] {
        let mut options = options(LONG);
        options.deadlines.region_io = SHORT;
        let (client, server) = connect("", &options, Memory::new(0), |mut peer| {
            let messages = [peer.receive(), peer.receive()];
            thread::sleep(3 * SHORT);
            for message in &messages {
                peer.reply(message, &good_payload(message));
            }
            peer.serve();
        });
        thread::scope(|scope| {
            let slow = || scope.spawn(|| client.reset().unwrap());
            if slow_first {
                slow();
                thread::sleep(SHORT / 4);
            }
            let began = Instant::now();
            let quick = scope.spawn(|| read(&client, 0).unwrap_err());
            if !slow_first {
                thread::sleep(SHORT / 4);
                slow();
            }
            assert!(matches!(quick.join().unwrap(), ConnError::TimedOut { .. }));
            assert!(began.elapsed() >= SHORT);
        });
        check_alive(&client);
        drop(client);
        server.join().unwrap();
    }
}

#[test]
fn the_server_has_no_more_commands_than_allowed() {
    let options = Options {
        max_outstanding: 3,
        ..options(LONG)
    };
    let (client, server) = connect("", &options, Memory::new(0), |mut peer| {
        for _ in 0..4 {
            let messages = [peer.receive(), peer.receive(), peer.receive()];
            peer.stream.set_read_timeout(Some(SHORT)).unwrap();
            assert!(peer.try_receive().is_none(), "a fourth command");
            peer.stream.set_read_timeout(None).unwrap();
            for message in &messages {
                peer.reply(message, &good_payload(message));
            }
        }
    });
    thread::scope(|scope| {
        for offset in 0..12 {
            let client = &client;
            scope.spawn(move || assert_eq!(read(client, offset).unwrap(), offset));
        }
    });
    server.join().unwrap();
}

#[test]
fn threads_that_read_write_and_post_at_once_see_their_own_writes() {
    const THREADS: u8 = 6;
    let (client, server) = connect("", &options(LONG), Memory::new(0), |mut peer| {
        let mut registers = [0; THREADS as usize];
        while let Some(message) = peer.try_receive() {
            let register = usize::from(message.payload[0]);
            match message.command() {
                Command::RegionWrite => registers[register] = message.payload[16],
                _ => {
                    let data = [&message.payload[..], &[registers[register]]].concat();
                    peer.reply(&message, &data);
                    continue;
                }
            }
            if !message.header.is_posted() {
                peer.reply(&message, &message.payload[..16]);
            }
        }
    });
    thread::scope(|scope| {
        for thread in 0..THREADS {
            let client = &client;
            scope.spawn(move || {
                let offset = thread;
                for value in 0..=255 {
                    client.region_post(0, u64::from(offset), &[value]).unwrap();
                    assert_eq!(read(client, offset).unwrap(), value);
                    client
                        .region_write(0, u64::from(offset), &[!value])
                        .unwrap();
                    assert_eq!(read(client, offset).unwrap(), !value);
                }
            });
        }
    });
    let counters = client.counters();
    assert_eq!(counters.calls, 1 + u64::from(THREADS) * 256 * 3);
    assert_eq!(counters.posts, u64::from(THREADS) * 256);
    drop(client);
    server.join().unwrap();
}

#[test]
fn signals_do_not_end_a_call() {
    let (client, server) = connect("", &options(LONG), Memory::new(0), |mut peer| {
        let message = peer.receive();
        thread::sleep(Duration::from_secs(1));
        peer.reply(&message, &good_payload(&message));
    });
    // To be stopped and continued interrupts a receive that has a timeout, like a signal that is handled.
    let script = format!(
        "for i in 1 2 3 4 5; do kill -STOP {0}; sleep 0.02; kill -CONT {0}; sleep 0.02; done",
        process::id()
    );
    thread::scope(|scope| {
        let call = scope.spawn(|| read(&client, 9));
        let status = process::Command::new("sh").arg("-c").arg(script).status();
        assert!(status.unwrap().success());
        assert_eq!(call.join().unwrap().unwrap(), 9);
    });
    server.join().unwrap();
}

#[test]
fn draining_lets_calls_end_and_takes_no_more() {
    let (go, gone) = mpsc::channel();
    let (client, server) = connect("", &options(LONG), Memory::new(0), move |mut peer| {
        let message = peer.receive();
        go.send(()).unwrap();
        thread::sleep(SHORT);
        peer.reply(&message, &good_payload(&message));
        assert!(peer.try_receive().is_none());
    });
    thread::scope(|scope| {
        let call = scope.spawn(|| read(&client, 5));
        gone.recv().unwrap();
        assert!(matches!(
            client.drain(Duration::ZERO),
            Err(ConnError::Draining)
        ));
        assert_eq!(client.state(), State::Draining);
        assert!(matches!(read(&client, 6), Err(ConnError::Draining)));
        client.drain(LONG).unwrap();
        assert_eq!(call.join().unwrap().unwrap(), 5);
    });
    drop(client);
    server.join().unwrap();
}

#[test]
fn calls_do_not_wake_the_event_loop() {
    for twin in [false, true] {
        let options = Options {
            twin_socket: twin,
            ..options(LONG)
        };
        let (client, server) = connect("", &options, Memory::new(0), |mut peer| peer.serve());
        for _ in 0..10 {
            check_alive(&client);
            assert!(!is_readable(&client, Duration::ZERO));
        }
        drop(client);
        server.join().unwrap();
    }
}

/// What a server does before it replies to one of the calls on their way.
#[derive(Clone, Debug)]
enum Meanwhile {
    Nothing,
    /// A reply to nobody.
    Stray(u16, usize),
    /// A command of its own, to read so much memory.
    Dma(u64),
    /// A command of its own that nobody knows.
    Unknown(usize),
}

fn meanwhile() -> impl Strategy<Value = Meanwhile> {
    prop_oneof![
        Just(Meanwhile::Nothing),
        (any::<u16>(), 0usize..200).prop_map(|(id, size)| Meanwhile::Stray(id & 0x3f, size)),
        (0u64..0x800).prop_map(Meanwhile::Dma),
        (0usize..40_000).prop_map(Meanwhile::Unknown),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn replies_and_commands_of_the_server_may_come_in_any_order_and_in_any_pieces(
        order in Just((0..6usize).collect::<Vec<_>>()).prop_shuffle(),
        meanwhile in prop::collection::vec(meanwhile(), 6),
        pieces in prop::collection::vec(1usize..400, 1..40),
    ) {
        let expected = meanwhile.clone();
        let (client, server) = connect("", &options(LONG), Memory::new(0x1000), move |mut peer| {
            let calls: Vec<_> = (0..6).map(|_| peer.receive()).collect();
            let mut bytes = Vec::new();
            for (call, meanwhile) in order.iter().zip(&meanwhile) {
                bytes.extend(meanwhile.bytes());
                bytes.extend(reply(&calls[*call], &good_payload(&calls[*call])));
            }
            let mut rest = &bytes[..];
            for size in pieces.iter().cycle() {
                let (piece, next) = rest.split_at((*size).min(rest.len()));
                peer.send(piece);
                rest = next;
                if rest.is_empty() {
                    break;
                }
            }
            meanwhile.iter().for_each(|meanwhile| meanwhile.check(&mut peer));
        });
        let start = Barrier::new(6);
        thread::scope(|scope| {
            for offset in 0..6 {
                let (client, start) = (&client, &start);
                scope.spawn(move || {
                    start.wait();
                    let mut data = [0; 200];
                    client.region_read(0, u64::from(offset), &mut data).unwrap();
                    assert!(data.iter().zip(0..).all(|(byte, i)| *byte == offset + i));
                });
            }
        });
        server.join().unwrap();
        let strays = expected.iter().filter(|meanwhile| matches!(meanwhile, Meanwhile::Stray(..)));
        prop_assert_eq!(client.counters().strays, strays.count() as u64);
    }
}

impl Meanwhile {
    fn bytes(&self) -> Vec<u8> {
        let header = |id, flags, size| Header {
            id,
            command: 99,
            size,
            flags,
            error: 0,
        };
        match *self {
            Self::Nothing => Vec::new(),
            Self::Stray(id, size) => {
                let flags = MessageFlags::REPLY.bits();
                let header = header(id, flags, 16 + u32::try_from(size).unwrap());
                [header.as_bytes(), &vec![0x55; size]].concat()
            }
            Self::Dma(count) => dma(7, Command::DmaRead, 0x1000, count, &[]),
            Self::Unknown(size) => [
                header(8, 0, 16 + u32::try_from(size).unwrap()).as_bytes(),
                &vec![0xaa; size],
            ]
            .concat(),
        }
    }

    /// Checks what the client answered.
    fn check(&self, peer: &mut Peer) {
        match *self {
            Self::Nothing | Self::Stray(..) => {}
            Self::Dma(count) => {
                let answer: Message = peer.receive();
                assert_eq!(answer.header.id, 7);
                assert!(!answer.header.is_error());
                assert_eq!(answer.payload.len() as u64, 16 + count);
                let data = answer.payload[16..].iter().zip((0..=255u8).cycle());
                assert!(data.into_iter().all(|(byte, expected)| *byte == expected));
            }
            Self::Unknown(_) => {
                let answer = peer.receive();
                assert_eq!((answer.header.id, answer.header.error), (8, 38));
            }
        }
    }
}

#[test]
fn a_lost_connection_ends_the_wait_for_a_turn() {
    let options = Options {
        max_outstanding: 1,
        ..options(LONG)
    };
    let (client, server) = connect("", &options, Memory::new(0), |mut peer| {
        peer.receive();
        thread::sleep(SHORT);
    });
    thread::scope(|scope| {
        for offset in 0..4 {
            let client = &client;
            scope.spawn(move || {
                let result = read(client, offset).map(drop);
                assert_eq!(kind(&result), "lost");
            });
        }
    });
    assert_eq!(client.state(), State::Lost(Loss::Closed));
    server.join().unwrap();
}
