//! The network card, by a driver as a guest has it.

#![expect(clippy::unwrap_used, reason = "a test panics when it fails")]

#[path = "support/card.rs"]
mod card;
mod support;

use std::thread;
use std::time::Duration;

use card::{
    ANNOUNCE, CONTROL, CONTROL_MAC, CONTROL_OFFLOADS, Card, GUEST_CSUM, GUEST_TSO4, HEADER, MAC,
    MERGEABLE, MULTI_QUEUE, config, incoming, number, options, packet, plug,
};
use device_servers::net::{self, NetError, Options};
use support::{BASE, EVENT_IDX, INDIRECT, Ram, SIZE, VERSION_1};
use vfio_user_client::DmaAccess;

/// Long enough for what should not happen to happen.
const MOMENT: Duration = Duration::from_millis(100);

const OK: u8 = 0;
const FAILED: u8 = 1;

// Commands: class and number.
const SET_MAC: (u8, u8) = (1, 1);
const ACK_ANNOUNCE: (u8, u8) = (3, 0);
const SET_PAIRS: (u8, u8) = (4, 0);
const SET_OFFLOADS: (u8, u8) = (5, 0);

#[test]
fn the_card_says_what_it_is() {
    let (machine, _peers) = plug(3, Ram::new());
    let mut ids = [0; 12];
    machine.client.region_read(7, 0, &mut ids).unwrap();
    assert_eq!(ids[..4], [0xf4, 0x1a, 0x41, 0x10]);
    assert_eq!(ids[9..], [0, 0, 2]);
    assert_eq!(config(&machine), (MAC, 1, 3, 1500));
    // Offloads with those of UDP, and all else but filters, from STATUS to ANNOUNCE and MAC_ADDR.
    let own = machine.offered() & !(((1 << 41) - 1) & !((1 << 24) - 1));
    let expected = 0b1010_1011 | 0x3b80 | MERGEABLE | 1 << 16 | CONTROL | ANNOUNCE;
    let expected = expected | MULTI_QUEUE | CONTROL_MAC | CONTROL_OFFLOADS | 0b111 << 54;
    assert_eq!(own, expected, "{own:#x} {expected:#x}");
    // Nothing of the configuration is the driver's.
    machine.write(machine.places.config, &[0xff; 4]);
    assert_eq!(config(&machine), (MAC, 1, 3, 1500));
    let (single, _peer) = plug(1, Ram::new());
    assert_eq!(single.offered() & MULTI_QUEUE, 0);
}

#[test]
fn packets_go_both_ways() {
    for features in [0, EVENT_IDX, INDIRECT, MERGEABLE | EVENT_IDX | INDIRECT] {
        let (mut card, peers) = Card::new(1, features);
        card.fill(0, 64, 2048);
        for index in 0..300 {
            let length = usize::try_from(index * 37 % 1500).unwrap();
            let outgoing = packet(index, length);
            card.send(0, &outgoing);
            assert_eq!(peers[0].receive(), outgoing);
            peers[0].send(&packet(!index, length));
            let (received, buffers) = card.receive_in(0);
            assert_eq!((number(&received), buffers), (!index, 1));
        }
        card.machine.end();
    }
}

#[test]
fn a_busy_card_sends_no_messages_and_few_interrupts() {
    const PACKETS: u32 = 4000;
    let (mut card, mut peers) = Card::new(1, MERGEABLE | EVENT_IDX);
    card.fill(0, 250, 2048);
    let peer = peers.pop().unwrap();
    let before = card.machine.client.counters();
    let echo = thread::spawn(move || {
        for expected in 0..PACKETS {
            let mut received = peer.receive();
            assert_eq!(number(&received), expected);
            received[..HEADER].fill(0);
            peer.send(&received);
        }
        peer
    });
    let (mut sent, mut came_back) = (0, 0);
    while came_back < PACKETS {
        while card.queues[1].pop().is_some() {}
        while sent < PACKETS && sent - came_back < 128 && card.queues[1].in_flight() < 128 {
            let packet = packet(sent, 1400);
            card.post(
                0,
                u64::from(sent % 256) * 2048,
                &[&packet[..HEADER], &packet[HEADER..]],
            );
            sent += 1;
        }
        card.queues[1].kick();
        if came_back < sent {
            assert_eq!(number(&card.receive(0)), came_back);
            came_back += 1;
        }
    }
    echo.join().unwrap();
    let after = card.machine.client.counters();
    assert_eq!((before.calls, before.served), (after.calls, after.served));
    let [receive, transmit] = [&card.queues[0], &card.queues[1]];
    let interrupts = receive.interrupts + transmit.interrupts;
    assert!(interrupts <= u64::from(PACKETS), "{interrupts}");
    assert!(receive.kicks < 10, "{}", receive.kicks);
}

#[test]
fn long_packets_are_in_several_buffers() {
    let (mut card, peers) = Card::new(1, MERGEABLE | EVENT_IDX);
    for (size, count) in [(1526, 200), (4096, 40), (300, 250)] {
        let (mut card, peers) = Card::new(1, MERGEABLE | EVENT_IDX);
        card.fill(0, count, size);
        let room = usize::from(count) * usize::try_from(size).unwrap();
        let mut expected = 0;
        // What is longer than those before, as long, shorter, and exactly what is expected.
        for length in [
            100, 65_535, 65_535, 20_000, 8, 65_535, 60_000, 1510, 1511, 1500,
        ] {
            let packet = packet(expected, length);
            if packet.len() > room {
                continue;
            }
            peers[0].send(&packet);
            let (received, buffers) = card.receive_in(0);
            assert_eq!(number(&received), expected);
            assert_eq!(received.len(), packet.len());
            assert_eq!(
                usize::from(buffers),
                packet.len().div_ceil(size.try_into().unwrap())
            );
            expected += 1;
        }
    }
    // A packet for which there is room only with the last buffer waits for that.
    card.fill(0, 9, 1000);
    peers[0].send(&packet(1, 10_000 - HEADER - 4));
    peers[0].send(&packet(2, 100));
    thread::sleep(MOMENT);
    assert!(card.queues[0].pop().is_none());
    let last = incoming(0) + 9 * 1000;
    let head = card.queues[0].add(&[(last, 1000, true)]);
    card.queues[0].kick();
    for expected in 0..10 {
        let (used, written) = card.queues[0].wait();
        assert_eq!(written, 1000);
        assert_eq!(used == head, expected == 9);
    }
    assert_eq!(number(&card.ram().read(incoming(0), 10_000)), 1);
    assert_eq!(card.ram().read16(incoming(0) + 10), 10);
}

#[test]
fn packets_that_one_buffer_does_not_hold_are_dropped_without_merging() {
    let (mut card, peers) = Card::new(1, 0);
    card.fill(0, 4, 1526);
    for (sent, length) in [
        (1, 1400),
        (2, 1600),
        (3, 60_000),
        (4, 1510),
        (5, 1511),
        (6, 10),
    ] {
        peers[0].send(&packet(sent, length));
    }
    for expected in [1, 4, 6] {
        let (received, buffers) = card.receive_in(0);
        assert_eq!((number(&received), buffers), (expected, 1));
    }
    // What is no packet is nothing.
    peers[0].send(&[0; HEADER - 1]);
    peers[0].send(&packet(7, 0));
    assert_eq!(number(&card.receive(0)), 7);
}

#[test]
fn headers_of_offloads_pass_as_they_are() {
    let (mut card, peers) = Card::new(1, MERGEABLE | GUEST_CSUM | GUEST_TSO4);
    card.fill(0, 64, 2048);
    // Checksum from 34 on, at 16, in segments of 1448 bytes of TCP over IPv4 with ECN.
    let header = [1, 0x81, 54, 0, 0xa8, 5, 34, 0, 16, 0, 0, 0];
    let mut packet = packet(9, 30_000);
    packet[..HEADER].copy_from_slice(&header);
    card.send(0, &packet);
    assert_eq!(peers[0].receive(), packet);
    peers[0].send(&packet);
    let (received, buffers) = card.receive_in(0);
    assert_eq!(received[..10], header[..10]);
    assert_eq!(received[HEADER..], packet[HEADER..]);
    assert_eq!(buffers, 15);
}

#[test]
fn a_full_tap_holds_packets_back() {
    let (mut card, peers) = Card::new(1, EVENT_IDX);
    let mut sent = 0;
    // More than the socket has room for.
    for place in 0..250 {
        card.post(0, place * 4096, &[&packet(sent, 4000)]).unwrap();
        sent += 1;
    }
    card.queues[1].kick();
    thread::sleep(MOMENT);
    assert!(card.queues[1].pop().is_some());
    let taken = (0..).map_while(|_| card.queues[1].pop()).count();
    assert!(taken < 240, "{taken}");
    for expected in 0..sent {
        assert_eq!(number(&peers[0].receive()), expected);
    }
    while card.queues[1].in_flight() > 0 {
        card.queues[1].wait();
    }
    assert_eq!(peers[0].receive_within(Duration::ZERO), None);
}

#[test]
fn each_pair_has_its_own_queue_of_the_tap() {
    let features = MERGEABLE | EVENT_IDX | CONTROL | MULTI_QUEUE;
    let (mut card, peers) = Card::new(3, features);
    for pair in 0..3 {
        card.fill(pair, 64, 2048);
    }
    // At first, only one pair is in use.
    for (at, peer) in (0..).zip(&peers) {
        peer.send(&packet(at, 100));
    }
    assert_eq!(number(&card.receive(0)), 0);
    thread::sleep(MOMENT);
    assert!(card.try_receive(1).is_none() && card.try_receive(2).is_none());
    assert_eq!(card.command(SET_PAIRS.0, SET_PAIRS.1, &[3, 0]), OK);
    for pair in 1..3 {
        assert_eq!(number(&card.receive(pair)), u32::try_from(pair).unwrap());
    }
    for (pair, peer) in peers.iter().enumerate() {
        card.send(pair, &packet(7, 1000));
        assert_eq!(number(&peer.receive()), 7);
    }
    assert_eq!(card.command(SET_PAIRS.0, SET_PAIRS.1, &[1, 0]), OK);
    // Whoever has begun to wait for packets notices.
    thread::sleep(MOMENT);
    peers[2].send(&packet(8, 100));
    peers[0].send(&packet(9, 100));
    assert_eq!(number(&card.receive(0)), 9);
    thread::sleep(MOMENT);
    assert!(card.try_receive(2).is_none());
}

#[test]
fn the_control_queue_is_the_third_without_multi_queue() {
    let (mut card, peers) = Card::new(3, MERGEABLE | CONTROL | CONTROL_MAC);
    assert_eq!(card.queues.len(), 3);
    assert_eq!(card.command(SET_MAC.0, SET_MAC.1, &[2, 0, 0, 0, 0, 9]), OK);
    assert_eq!(card.config().0, [2, 0, 0, 0, 0, 9]);
    assert_eq!(card.command(SET_PAIRS.0, SET_PAIRS.1, &[1, 0]), FAILED);
    card.fill(0, 8, 2048);
    peers[0].send(&packet(1, 100));
    assert_eq!(number(&card.receive(0)), 1);
}

#[test]
fn commands_do_what_they_can() {
    let features = CONTROL | CONTROL_MAC | CONTROL_OFFLOADS | GUEST_CSUM | GUEST_TSO4;
    let (mut card, _peers) = Card::new(2, features | MULTI_QUEUE | ANNOUNCE);
    let offloads = |bits: u64| bits.to_le_bytes().to_vec();
    let long = vec![0; 1000];
    for ((class, number), data, expected) in [
        (SET_MAC, vec![2, 0, 0, 0, 0, 9], OK),
        (SET_MAC, vec![3, 0, 0, 0, 0, 9], FAILED),
        (SET_MAC, vec![0; 6], FAILED),
        (SET_MAC, vec![2; 5], FAILED),
        (SET_MAC, vec![2; 7], FAILED),
        (SET_PAIRS, vec![0, 0], FAILED),
        (SET_PAIRS, vec![1, 0], OK),
        (SET_PAIRS, vec![2, 0], OK),
        (SET_PAIRS, vec![3, 0], FAILED),
        (SET_PAIRS, vec![1, 1], FAILED),
        (SET_PAIRS, vec![1], FAILED),
        (SET_OFFLOADS, offloads(0), OK),
        (SET_OFFLOADS, offloads(GUEST_CSUM | GUEST_TSO4), OK),
        (SET_OFFLOADS, offloads(GUEST_CSUM | 1 << 8), FAILED),
        (SET_OFFLOADS, offloads(CONTROL), FAILED),
        (SET_OFFLOADS, vec![0; 7], FAILED),
        (ACK_ANNOUNCE, vec![], OK),
        (ACK_ANNOUNCE, vec![0], FAILED),
        // Filters, a table of addresses, hashes, and what nobody knows.
        ((0, 0), vec![1], FAILED),
        ((1, 0), long.clone(), FAILED),
        ((4, 1), long, FAILED),
        ((99, 99), vec![], FAILED),
    ] {
        let answer = card.command(class, number, &data);
        assert_eq!(answer, expected, "{class} {number} {data:?}");
    }
    assert_eq!(card.config().0, [2, 0, 0, 0, 0, 9]);
    // Nothing of this is possible to a driver that did not ask for it.
    let (mut card, _peers) = Card::new(2, CONTROL);
    for ((class, number), data) in [
        (SET_MAC, vec![2, 0, 0, 0, 0, 9]),
        (SET_PAIRS, vec![1, 0]),
        (SET_OFFLOADS, offloads(0)),
        (ACK_ANNOUNCE, vec![]),
    ] {
        assert_eq!(card.command(class, number, &data), FAILED);
    }
    // After a reset, the address is the card's own again.
    card.machine.set_status(0);
    assert_eq!(card.config().0, MAC);
}

#[test]
fn buffers_may_be_in_memory_that_is_reached_by_messages() {
    let (mut card, peers) = Card::new(1, MERGEABLE);
    // Memory that nobody has.
    let far = BASE + SIZE;
    let client = &card.machine.client;
    client
        .dma_map(far, 0x10_0000, None, DmaAccess::ReadWrite)
        .unwrap();
    // Access is refused, and the packets are lost.
    card.queues[0].add(&[(far, 2048, true)]);
    card.queues[0].kick();
    peers[0].send(&packet(1, 100));
    assert_eq!(card.queues[0].wait().1, 116);
    card.queues[1].add(&[(far, 2048, false)]);
    card.queues[1].kick();
    card.queues[1].wait();
    // Some of what there is, without a file.
    let near = incoming(1);
    let client = &card.machine.client;
    client.dma_unmap(BASE, SIZE).unwrap();
    for (start, end, file) in [
        (BASE, near, true),
        (near, near + 0x1_0000, false),
        (near + 0x1_0000, BASE + SIZE, true),
    ] {
        let ram = card.machine.ram.clone();
        let file = file.then(|| (std::os::fd::AsFd::as_fd(ram.file()), start - BASE));
        client
            .dma_map(start, end - start, file, DmaAccess::ReadWrite)
            .unwrap();
    }
    // A buffer that is mapped, one that is not, and one that is half of each.
    card.queues[0].add(&[(incoming(0), 1000, true)]);
    card.queues[0].add(&[(near, 1000, true)]);
    card.queues[0].add(&[(near - 500, 1000, true)]);
    card.queues[0].kick();
    peers[0].send(&packet(2, 2900 - 16));
    let used: Vec<_> = (0..3).map(|_| card.queues[0].wait().1).collect();
    assert_eq!(used, [1000, 1000, 900]);
    let last = card.ram().read(near - 500, 900);
    let received = [
        card.ram().read(incoming(0), 1000),
        card.ram().read(near, 1000),
    ];
    // The last buffer lies over the beginning of the second.
    let mut received = received.concat();
    received.extend(&last);
    let expected = packet(2, 2900 - 16);
    assert_eq!(received[HEADER..1000], expected[HEADER..1000]);
    assert_eq!(received[1400..], expected[1400..]);
    // And to be sent.
    let sent = packet(3, 984);
    card.ram().write(near, &sent);
    card.queues[1].add(&[(near, 1000, false)]);
    card.queues[1].kick();
    card.queues[1].wait();
    assert_eq!(number(&peers[0].receive()), 3);
}

#[test]
fn options_that_no_card_can_have_are_refused() {
    let refused = |options: Options| net::open(&options).unwrap_err();
    let with = |change: fn(&mut Options)| {
        let mut options = options();
        change(&mut options);
        refused(options)
    };
    assert!(matches!(
        with(|options| options.num_queues = 0),
        NetError::Queues(0)
    ));
    assert!(matches!(
        with(|options| options.num_queues = 64),
        NetError::Queues(64)
    ));
    assert!(matches!(
        with(|options| options.queue_size = 48),
        NetError::QueueSize(48)
    ));
    assert!(matches!(
        with(|options| options.queue_size = 2048),
        NetError::QueueSize(2048)
    ));
    assert!(matches!(
        with(|options| options.mtu = Some(67)),
        NetError::Mtu(67)
    ));
    let named = with(|options| options.tap = Some("a/b".to_owned()));
    assert!(matches!(named, NetError::Name(_)));
    assert!(matches!(
        net::open_with(&options(), Vec::new()),
        Err(NetError::Queues(0))
    ));
}

#[test]
fn a_card_whose_cable_is_cut_off_goes_on() {
    let (mut card, peers) = Card::new(1, MERGEABLE | CONTROL | CONTROL_MAC);
    card.fill(0, 16, 2048);
    drop(peers);
    card.send(0, &packet(1, 100));
    assert_eq!(card.command(SET_MAC.0, SET_MAC.1, &[2, 0, 0, 0, 0, 9]), OK);
    assert!(card.machine.negotiate(VERSION_1));
}
