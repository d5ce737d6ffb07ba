//! The network card, when the system does not let it wait. This is a process of its own, as its limits are changed.

#![expect(clippy::unwrap_used, reason = "a test panics when it fails")]

#[path = "support/card.rs"]
mod card;
mod support;

use card::{Card, MERGEABLE, number, packet};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use support::EVENT_IDX;

#[test]
fn a_card_that_cannot_wait_needs_a_reset_and_gets_one() {
    let features = MERGEABLE | EVENT_IDX;
    let (mut card, peers) = Card::new(1, features);
    card.fill(0, 16, 2048);
    peers[0].send(&packet(1, 100));
    assert_eq!(number(&card.receive(0)), 1);
    // The kernel waits for no more descriptors than a process may have open. A pair of queues has five to wait for, and
    // whoever serves or uses the device has fewer.
    let usual = getrlimit(Resource::Nofile);
    let current = Some(4);
    setrlimit(Resource::Nofile, Rlimit { current, ..usual }).unwrap();
    peers[0].send(&packet(2, 100));
    card.machine.await_needs_reset();
    setrlimit(Resource::Nofile, usual).unwrap();
    let mut card = Card::start(card.machine, 1, features);
    card.fill(0, 16, 2048);
    peers[0].send(&packet(3, 100));
    while number(&card.receive(0)) != 3 {}
}
