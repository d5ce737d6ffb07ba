//! The network card, by a driver as a guest has it.

#![expect(clippy::unwrap_used, reason = "a test panics when it fails")]

#[path = "support/card.rs"]
mod card;
mod support;

use std::os::fd::OwnedFd;
use std::thread;
use std::time::Duration;

use card::{
    ANNOUNCE, CONTROL, CONTROL_MAC, CONTROL_OFFLOADS, Card, GUEST_CSUM, GUEST_TSO4, HEADER, MAC,
    MERGEABLE, MTU, MULTI_QUEUE, Peer, QUEUE, config, incoming, number, options, outgoing, packet,
    plug,
};
use device_servers::net::{self, NetError, Options};
use support::{
    BASE, BUFFERS, EVENT_IDX, INDIRECT, INDIRECT_TABLE, Machine, NEEDS_RESET, NEXT, Queue, Ram,
    SIZE, VERSION_1, WRITE,
};
use vfio_user_client::{DeviceState, DmaAccess, LoggingRange};

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
fn without_buffers_packets_wait_in_the_tap() {
    for features in [0, MERGEABLE | EVENT_IDX] {
        let (mut card, peers) = Card::new(1, features);
        let mut sent = 0;
        // Until the socket is full, which is when nobody reads it.
        while peers[0].try_send(&packet(sent, 1000)) {
            sent += 1;
            thread::sleep(Duration::from_micros(200));
        }
        assert!(sent < 2000 && card.queues[0].pop().is_none());
        let cpu = cpu_time();
        thread::sleep(MOMENT);
        assert!(cpu_time() - cpu < MOMENT / 2 * 3, "somebody does not rest");
        // One at a time, with a kick for each.
        for expected in 0..20 {
            let head = card.queues[0].add(&[(incoming(0), 1526, true)]);
            card.queues[0].kick();
            assert_eq!(card.queues[0].wait().0, head);
            assert_eq!(number(&card.ram().read(incoming(0), 1016)), expected);
        }
        card.fill(0, 32, 1526);
        for expected in 20..sent {
            assert_eq!(number(&card.receive(0)), expected);
        }
    }
}

/// What this process has used of processors; other tests use some too.
fn cpu_time() -> Duration {
    let stat = std::fs::read_to_string("/proc/self/schedstat").unwrap();
    let nanoseconds = stat.split(' ').next().unwrap().parse().unwrap();
    Duration::from_nanos(nanoseconds)
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

/// What a driver can put into a queue that it should not, and a look at whether the rest still works.
#[test]
fn hostile_chains_harm_nobody() {
    const NOWHERE: u64 = 0xffff_ffff_ffff_f000;
    let beyond = BASE + SIZE;
    // Descriptors of a chain whose head is 0.
    let chains: &[&[support::RawDescriptor]] = &[
        &[(NOWHERE, 0x2000, 0, 0)],
        &[(NOWHERE, 0x2000, WRITE, 0)],
        &[(beyond - 6, 2048, 0, 0)],
        &[(beyond - 6, 2048, WRITE, 0)],
        &[(BASE, u32::MAX, 0, 0)],
        &[(BASE, u32::MAX, WRITE, 0)],
        &[(BUFFERS, 0, 0, 0)],
        &[(BUFFERS, 0, WRITE, 0)],
        &[(BUFFERS, 5, WRITE, 0)],
        &[(BUFFERS, 11, 0, 0)],
        &[(BUFFERS, 12, 0, 0)],
        // Round and round.
        &[(BUFFERS, 16, NEXT, 0)],
        &[
            (BUFFERS, 16, NEXT | WRITE, 1),
            (BUFFERS, 16, NEXT | WRITE, 0),
        ],
        // Out of the table.
        &[(BUFFERS, 16, NEXT, 0xffff)],
        &[(BUFFERS, 16, NEXT | WRITE, QUEUE)],
        // What is to be read behind what is to be written.
        &[(BUFFERS, 64, NEXT | WRITE, 1), (BUFFERS, 64, 0, 0)],
        // Tables: none, one in a table, one that is odd, and one outside.
        &[(BUFFERS, 0, INDIRECT_TABLE, 0)],
        &[(BUFFERS + 0x1_0000, 16, INDIRECT_TABLE, 0)],
        &[(BUFFERS, 17, INDIRECT_TABLE, 0)],
        &[(NOWHERE, 0x1000, INDIRECT_TABLE, 0)],
        &[(BUFFERS, 0xffff_fff0, INDIRECT_TABLE, 0)],
        &[
            (BUFFERS, 16, INDIRECT_TABLE | NEXT | WRITE, 1),
            (BUFFERS, 64, WRITE, 0),
        ],
    ];
    let features = MERGEABLE | EVENT_IDX | INDIRECT | CONTROL;
    for (case, chain) in chains.iter().enumerate() {
        for queue in 0..3 {
            let (mut card, peers) = Card::new(1, features);
            card.ram().write(
                BUFFERS + 0x1_0000,
                &support::descriptor((BUFFERS + 0x1_0000, 16, INDIRECT_TABLE, 0)),
            );
            let victim = &mut card.queues[queue];
            for (at, descriptor) in (0..).zip(*chain) {
                victim.set_descriptor(victim.area + 16 * at, *descriptor);
            }
            victim.offer(0);
            victim.kick();
            if queue == 0 {
                peers[0].send(&packet(1, 3000));
            }
            thread::sleep(Duration::from_millis(5));
            // Whatever has become of that, a reset makes all of it good.
            let machine = card.machine;
            let mut card = Card::start(machine, 1, features);
            card.fill(0, 16, 2048);
            peers[0].send(&packet(2, 100));
            // The first packet may still be there.
            while number(&card.receive(0)) != 2 {}
            while peers[0].receive_within(Duration::ZERO).is_some() {}
            card.send(0, &packet(3, 100));
            assert_eq!(number(&peers[0].receive()), 3, "case {case}");
        }
    }
}

#[test]
fn queues_that_are_none_need_a_reset() {
    let changes: [fn(&mut Queue, &Ram); 2] = [
        // More available than there is room for.
        |queue, ram| ram.write(queue.available() + 2, &(QUEUE + 1).to_le_bytes()),
        // A head outside.
        |queue, _| queue.offer(QUEUE),
    ];
    for change in changes {
        for queue in 0..3 {
            let (mut card, peers) = Card::new(1, MERGEABLE | CONTROL);
            let ram = card.ram().clone();
            change(&mut card.queues[queue], &ram);
            card.queues[queue].ring();
            peers[0].send(&packet(1, 100));
            card.machine.await_needs_reset();
            card.await_config();
            let mut card = Card::start(card.machine, 1, MERGEABLE | CONTROL);
            assert_eq!(card.machine.status() & NEEDS_RESET, 0);
            card.fill(0, 16, 2048);
            peers[0].send(&packet(2, 100));
            while number(&card.receive(0)) != 2 {}
        }
    }
}

#[test]
fn buffers_may_be_in_memory_that_is_reached_by_messages() {
    let (mut card, peers) = Card::new(1, MERGEABLE);
    // More memory, which is not shared, but has the same contents as that which is.
    let far = BASE + SIZE;
    let client = &card.machine.client;
    client
        .dma_map(far, 0x10_0000, None, DmaAccess::ReadWrite)
        .unwrap();
    // The driver answers only for what is in its memory; this is refused, and the packet lost.
    card.queues[0].add(&[(far, 2048, true)]);
    card.queues[0].kick();
    peers[0].send(&packet(1, 100));
    assert_eq!(card.queues[0].wait().1, 116);
    card.queues[1].add(&[(far, 2048, false)]);
    card.queues[1].kick();
    card.queues[1].wait();
    // The same for memory that it has.
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
    let log = card.machine.client.dma_log(BASE, SIZE, 4096).unwrap();
    let is_dirty = |address: u64| {
        let page = (address - BASE) / 4096;
        log[usize::try_from(page / 64).unwrap()] >> (page % 64) & 1 != 0
    };
    let written: Vec<_> = (0..20)
        .filter(|page| is_dirty(incoming(0) + page * 4096))
        .collect();
    assert_eq!(written, [0, 1, 2, 3]);
    assert!(is_dirty(card.queues[0].used()));
    assert!(!is_dirty(outgoing(0)));
}

#[test]
fn a_card_can_be_reset_while_it_is_busy() {
    let features = MERGEABLE | EVENT_IDX | CONTROL;
    let (machine, mut peers) = plug(1, Ram::new());
    let peer = peers.pop().unwrap();
    let (done, is_done) = std::sync::mpsc::channel::<()>();
    let pump = thread::spawn(move || {
        let mut sent = 0;
        while is_done.try_recv().is_err() {
            sent += u32::from(peer.try_send(&packet(sent, 20_000)));
            while peer.receive_within(Duration::ZERO).is_some() {}
        }
        peer
    });
    let mut card = Card::start(machine, 1, features);
    for round in 0..50 {
        card.fill(0, 100, 1526);
        for place in 0..100 {
            card.post(0, place * 0x1000, &[&packet(round, 3000)]);
        }
        card.queues[1].kick();
        if round % 2 == 0 {
            number(&card.receive(0));
        }
        if round % 10 == 9 {
            card.machine.client.reset().unwrap();
            card.machine.enable();
        }
        card = Card::start(card.machine, 1, features);
    }
    done.send(()).unwrap();
    let peer = pump.join().unwrap();
    card.fill(0, 100, 1526);
    peer.send(&packet(0xffff_ffff, 100));
    while number(&card.receive(0)) != 0xffff_ffff {}
}

/// Moves a card to another machine with the same memory, and returns the machine that it was in.
fn migrate(card: &mut Card, pairs: usize) -> (Machine, Vec<Peer>) {
    let source = &card.machine;
    source
        .client
        .set_device_state(DeviceState::StopCopy)
        .unwrap();
    let state = saved(source);
    let (target, peers) = plug(pairs, source.ram.clone());
    let resume = |state: &[u8]| {
        target
            .client
            .set_device_state(DeviceState::Resuming)
            .unwrap();
        for piece in state.chunks(1000) {
            target.client.migration_write(piece).unwrap();
        }
        target.client.set_device_state(DeviceState::Stop)
    };
    resume(&state).unwrap();
    let source = card.move_to(target);
    card.machine
        .client
        .set_device_state(DeviceState::Running)
        .unwrap();
    (source, peers)
}

fn saved(machine: &Machine) -> Vec<u8> {
    let mut saved = Vec::new();
    loop {
        let mut piece = vec![0; 10_000];
        let count = machine.client.migration_read(&mut piece).unwrap();
        saved.extend(&piece[..count]);
        if count < piece.len() {
            return saved;
        }
    }
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
        let pump = thread::spawn(move || {
            let mut next = round << 16;
            let mut arrived = Vec::new();
            let start = std::time::Instant::now();
            while start.elapsed() < MOMENT {
                next += u32::from(peer.try_send(&packet(next, 100 + next as usize * 7 % 9000)));
                arrived.extend(peer.receive_within(Duration::ZERO));
            }
            (peer, arrived)
        });
        let start = std::time::Instant::now();
        let mut expected = round << 16;
        while start.elapsed() < MOMENT / 2 {
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
        assert!(
            expected > round << 16,
            "nothing was received in round {round}"
        );
        let (source, new) = migrate(&mut card, 1);
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
        let start = std::time::Instant::now();
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
    card.machine
        .client
        .set_device_state(DeviceState::StopCopy)
        .unwrap();
    let state = saved(&card.machine);
    let refuses = |target: &Machine, state: &[u8]| {
        target
            .client
            .set_device_state(DeviceState::Resuming)
            .unwrap();
        let written = target.client.migration_write(state);
        written.is_err() || target.client.set_device_state(DeviceState::Stop).is_err()
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
