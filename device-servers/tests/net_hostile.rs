//! The network card, by a driver that does what it should not.

#![expect(clippy::unwrap_used, reason = "a test panics when it fails")]

#[path = "support/card.rs"]
mod card;
mod support;

use std::thread;
use std::time::Duration;

use card::{CONTROL, Card, MERGEABLE, QUEUE, number, packet, plug};
use support::queue::{INDIRECT_TABLE, NEXT, Queue, RawDescriptor, WRITE, descriptor};
use support::{BASE, BUFFERS, EVENT_IDX, INDIRECT, NEEDS_RESET, Ram, SIZE};

/// What a driver can put into a queue that it should not, and a look at whether the rest still works.
#[test]
fn hostile_chains_harm_nobody() {
    const NOWHERE: u64 = 0xffff_ffff_ffff_f000;
    let beyond = BASE + SIZE;
    // Descriptors of a chain whose head is 0.
    let chains: &[&[RawDescriptor]] = &[
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
                &descriptor((BUFFERS + 0x1_0000, 16, INDIRECT_TABLE, 0)),
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
