//! The network card, and what becomes of it when it moves.

#![expect(clippy::unwrap_used, reason = "a test panics when it fails")]

#[path = "support/card.rs"]
mod card;
mod support;

use std::os::fd::OwnedFd;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use card::{
    ANNOUNCE, CONTROL, CONTROL_MAC, Card, HEADER, MAC, MERGEABLE, MTU, MULTI_QUEUE, Peer, incoming,
    number, options, outgoing, packet, plug,
};
use device_servers::net::{self, Options};
use support::{BASE, EVENT_IDX, LONG, Machine, Ram, SIZE};
use vfio_user_client::{DeviceState, LoggingRange};

/// Long enough for what should not happen to happen.
const MOMENT: Duration = Duration::from_millis(100);

const OK: u8 = 0;

// Commands: class and number.
const SET_MAC: (u8, u8) = (1, 1);
const ACK_ANNOUNCE: (u8, u8) = (3, 0);
const SET_PAIRS: (u8, u8) = (4, 0);

#[test]
fn what_is_received_is_logged() {
    let (mut card, peers) = Card::new(1, MERGEABLE | EVENT_IDX);
    card.fill(0, 20, 4096);
    let ranges = [LoggingRange {
        iova: BASE,
        length: SIZE,
    }];
    card.machine
        .client
        .start_dma_logging(4096, &ranges)
        .unwrap();
    peers[0].send(&packet(1, 100));
    card.queues[0].wait();
    peers[0].send(&packet(2, 10_000));
    for _ in 0..3 {
        card.queues[0].wait();
    }
    let dirty = card.machine.dirty_pages();
    let is_dirty = |address: u64| dirty.contains(&((address - BASE) / 4096));
    let written: Vec<_> = (0..20)
        .filter(|page| is_dirty(incoming(0) + page * 4096))
        .collect();
    assert_eq!(written, [0, 1, 2, 3]);
    assert!(is_dirty(card.queues[0].used()));
    assert!(!is_dirty(outgoing(0)));
}

/// Moves a card to another machine with the same memory, and returns the machine that it was in.
fn migrate(card: &mut Card, pairs: usize) -> (Machine, Vec<Peer>) {
    let source = &card.machine;
    source.set_state(DeviceState::StopCopy).unwrap();
    let state = source.saved();
    let (target, peers) = plug(pairs, source.ram.clone());
    let resume = |state: &[u8]| {
        target.set_state(DeviceState::Resuming).unwrap();
        for piece in state.chunks(1000) {
            target.client.migration_write(piece).unwrap();
        }
        target.set_state(DeviceState::Stop)
    };
    resume(&state).unwrap();
    let source = card.move_to(target);
    card.machine.set_state(DeviceState::Running).unwrap();
    (source, peers)
}

#[test]
fn nothing_is_damaged_or_done_twice_by_a_migration() {
    const ROUNDS: u32 = 5;
    let features = MERGEABLE | EVENT_IDX | CONTROL;
    let (mut card, mut peers) = Card::new(1, features);
    card.fill(0, 128, 1526);
    let (mut sent, mut arrived) = (0, 0);
    let mut old = Vec::new();
    for round in 0..ROUNDS {
        // Both directions are busy when it is stopped.
        let peer = peers.pop().unwrap();
        let (done, is_done) = mpsc::channel::<()>();
        let pump = thread::spawn(move || {
            let mut next = round << 16;
            let mut arrived = Vec::new();
            while is_done.try_recv().is_err() {
                next += u32::from(peer.try_send(&packet(next, 100 + next as usize * 7 % 9000)));
                arrived.extend(peer.receive_within(Duration::ZERO));
            }
            (peer, arrived)
        });
        let start = Instant::now();
        let mut expected = round << 16;
        while expected < (round << 16) + 300 {
            assert!(start.elapsed() < LONG, "round {round} stands still");
            while card.queues[1].pop().is_some() {}
            while card.queues[1].in_flight() < 100 {
                card.post(0, u64::from(sent % 256) * 2048, &[&packet(sent, 1000)])
                    .unwrap();
                sent += 1;
            }
            card.queues[1].kick();
            while let Some(received) = card.try_receive(0) {
                let received = number(&received);
                if received >> 16 == round {
                    assert_eq!(received, expected);
                    expected += 1;
                }
            }
        }
        let (source, new) = migrate(&mut card, 1);
        done.send(()).unwrap();
        let (peer, mut those) = pump.join().unwrap();
        while let Some(packet) = peer.receive_within(Duration::ZERO) {
            those.push(packet);
        }
        for packet in those.iter().filter(|packet| !is_announcement(packet)) {
            assert_eq!(number(packet), arrived);
            arrived += 1;
        }
        old.push((source, peer));
        peers = new;
    }
    // All that is left arrives at the last one.
    while arrived < sent {
        let packet = peers[0].receive();
        if !is_announcement(&packet) {
            assert_eq!(number(&packet), arrived);
            arrived += 1;
        }
    }
    while card.queues[1].in_flight() > 0 {
        card.queues[1].wait();
    }
}

fn is_announcement(packet: &[u8]) -> bool {
    packet.len() == HEADER + 60 && packet[HEADER + 12..][..2] == [0x80, 0x35]
}

#[test]
fn a_card_that_has_moved_is_announced() {
    for features in [CONTROL | ANNOUNCE | CONTROL_MAC, 0] {
        let (mut card, peers) = Card::new(1, features);
        let mut mac = MAC;
        if features & CONTROL != 0 {
            mac = [6, 5, 4, 3, 2, 1];
            assert_eq!(card.command(SET_MAC.0, SET_MAC.1, &mac), OK);
        }
        let (_source, targets) = migrate(&mut card, 1);
        let start = Instant::now();
        if features & ANNOUNCE != 0 {
            card.await_config();
            assert_eq!(card.config().1, 3);
            assert_eq!(card.command(ACK_ANNOUNCE.0, ACK_ANNOUNCE.1, &[]), OK);
        }
        assert_eq!(card.config().1, 1);
        for _ in 0..5 {
            let frame = targets[0].receive();
            assert!(is_announcement(&frame));
            assert_eq!(frame[..HEADER + 6], [&[0; HEADER][..], &[0xff; 6]].concat());
            for at in [6, 22, 32] {
                assert_eq!(frame[HEADER + at..][..6], mac);
            }
        }
        assert!(start.elapsed() > Duration::from_millis(700));
        assert_eq!(targets[0].receive_within(MOMENT * 6), None);
        assert_eq!(peers[0].receive_within(Duration::ZERO), None);
        // It is as it was.
        assert_eq!(card.config().0, mac);
        // Stopping and starting it is no reason to do that again.
        let client = &card.machine.client;
        client.set_device_state(DeviceState::Stop).unwrap();
        client.set_device_state(DeviceState::Running).unwrap();
        assert_eq!(targets[0].receive_within(MOMENT), None);
    }
}

#[test]
fn a_driver_that_was_still_to_announce_itself_does_so_where_it_runs_next() {
    let features = MERGEABLE | CONTROL | ANNOUNCE | MULTI_QUEUE;
    let (mut card, _peers) = Card::new(3, features);
    assert_eq!(card.command(SET_PAIRS.0, SET_PAIRS.1, &[2, 0]), OK);
    let (_first, _) = migrate(&mut card, 3);
    card.await_config();
    let (_second, peers) = migrate(&mut card, 3);
    card.await_config();
    assert_eq!(card.config(), (MAC, 3, 3, 1500));
    assert_eq!(card.command(ACK_ANNOUNCE.0, ACK_ANNOUNCE.1, &[]), OK);
    // The pairs in use are as they were.
    for (pair, peer) in peers.iter().enumerate() {
        card.fill(pair, 16, 2048);
        peer.send(&packet(5, 100));
    }
    for pair in 0..2 {
        assert_eq!(number(&card.receive(pair)), 5);
    }
    assert!(card.try_receive(2).is_none());
}

#[test]
fn cards_of_another_kind_are_not_taken_over() {
    let (card, _peers) = Card::new(2, MERGEABLE | MULTI_QUEUE | MTU);
    card.machine.set_state(DeviceState::StopCopy).unwrap();
    let state = card.machine.saved();
    let refuses = |target: &Machine, state: &[u8]| {
        target.set_state(DeviceState::Resuming).unwrap();
        let written = target.client.migration_write(state);
        written.is_err() || target.set_state(DeviceState::Stop).is_err()
    };
    let target = |options: Options, pairs: usize| {
        let (fds, peers): (Vec<OwnedFd>, Vec<_>) = (0..pairs).map(|_| Peer::pair()).unzip();
        (
            card::machine(move || net::open_with(&options, fds), Ram::new()),
            peers,
        )
    };
    assert!(!refuses(&target(options(), 2).0, &state));
    assert!(refuses(&target(options(), 3).0, &state));
    let jumbo = Options {
        mtu: Some(9000),
        ..options()
    };
    assert!(refuses(&target(jumbo, 2).0, &state));
    let smaller = Options {
        queue_size: 128,
        ..options()
    };
    assert!(refuses(&target(smaller, 2).0, &state));
    assert!(refuses(&target(options(), 2).0, &state[..state.len() - 1]));
}
