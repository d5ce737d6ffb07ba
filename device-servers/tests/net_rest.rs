//! The network card, when it can do nothing but wait. This is a process of its own, to see what that uses of processors.

#![expect(clippy::unwrap_used, reason = "a test panics when it fails")]

#[path = "support/card.rs"]
mod card;
mod support;

use std::thread;
use std::time::Duration;

use card::{Card, MERGEABLE, incoming, number, packet};
use support::EVENT_IDX;

/// Long enough to see who does not rest.
const WHILE: Duration = Duration::from_millis(500);

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
        assert_rests();
        // One at a time, with a kick for each.
        for expected in 0..20 {
            let head = card.queues[0].add(&[(incoming(0), 1526, true)]);
            card.queues[0].kick();
            assert_eq!(card.queues[0].wait().0, head);
            assert_eq!(number(&card.ram().read(incoming(0), 1016)), expected);
        }
        assert_rests();
        card.fill(0, 32, 1526);
        for expected in 20..sent {
            assert_eq!(number(&card.receive(0)), expected);
        }
        // Nor is there anything to do when nothing comes, or nobody is at the other end any more.
        assert_rests();
        drop(peers);
        assert_rests();
        card.send(0, &packet(0, 100));
        assert_rests();
    }
}

fn assert_rests() {
    let before = ticks();
    thread::sleep(WHILE);
    let used = ticks() - before;
    // There are a hundred in a second (`USER_HZ`), so that a thread that is always busy uses about fifty.
    assert!(used < 15, "somebody does not rest: {used} ticks");
}

/// How long this process has used processors (`utime` and `stime` of proc_pid_stat(5)).
fn ticks() -> u64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let (_, fields) = stat.rsplit_once(')').unwrap();
    let times = fields.split_whitespace().skip(11).take(2);
    times.map(|time| time.parse::<u64>().unwrap()).sum()
}
