//! A driver of a network card, and who is at the other end of its cable.

#![allow(dead_code, reason = "not every test needs everything")]

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::time::Duration;

use device_servers::net::{self, NetError, OpenNet, Options};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use crate::support::queue::Queue;
use crate::support::{BUFFERS, LONG, Machine, Ram, wait_for};

// Features.
pub(crate) const GUEST_CSUM: u64 = 1 << 1;
pub(crate) const CONTROL_OFFLOADS: u64 = 1 << 2;
pub(crate) const MTU: u64 = 1 << 3;
pub(crate) const GUEST_TSO4: u64 = 1 << 7;
pub(crate) const MERGEABLE: u64 = 1 << 15;
pub(crate) const CONTROL: u64 = 1 << 17;
pub(crate) const ANNOUNCE: u64 = 1 << 21;
pub(crate) const MULTI_QUEUE: u64 = 1 << 22;
pub(crate) const CONTROL_MAC: u64 = 1 << 23;

pub(crate) const MAC: [u8; 6] = [0x52, 0x54, 0, 1, 2, 3];

/// Bytes before each packet.
pub(crate) const HEADER: usize = 12;

/// The other end of one queue of the card.
pub(crate) struct Peer(pub(crate) OwnedFd);

impl Peer {
    /// The card's end, and this one.
    pub(crate) fn pair() -> (OwnedFd, Self) {
        let flags = SocketFlags::CLOEXEC;
        let (theirs, ours) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        (theirs, Self(ours))
    }

    pub(crate) fn send(&self, packet: &[u8]) {
        assert_eq!(rustix::io::write(&self.0, packet), Ok(packet.len()));
    }

    /// Sends a packet if there is room for it.
    pub(crate) fn try_send(&self, packet: &[u8]) -> bool {
        is_ready(&self.0, PollFlags::OUT, Duration::ZERO) && {
            self.send(packet);
            true
        }
    }

    /// The next packet.
    pub(crate) fn receive(&self) -> Vec<u8> {
        self.receive_within(LONG).unwrap()
    }

    pub(crate) fn receive_within(&self, limit: Duration) -> Option<Vec<u8>> {
        if !is_ready(&self.0, PollFlags::IN, limit) {
            return None;
        }
        let mut packet = vec![0; 1 << 17];
        let length = rustix::io::read(&self.0, packet.as_mut_slice()).unwrap();
        packet.truncate(length);
        Some(packet)
    }
}

fn is_ready(fd: &OwnedFd, flags: PollFlags, limit: Duration) -> bool {
    let mut fds = [PollFd::new(fd, flags)];
    let limit = Timespec::try_from(limit).unwrap();
    poll(&mut fds, Some(&limit)).unwrap();
    fds[0].revents().contains(flags)
}

/// A card that is ready, with its queues.
pub(crate) struct Card {
    pub(crate) machine: Machine,
    pub(crate) queues: Vec<Queue>,
    features: u64,
    /// Where the buffers are that are to be received into, by queue and head.
    buffers: HashMap<(usize, u16), (u64, u32)>,
}

/// Entries of each queue.
pub(crate) const QUEUE: u16 = 256;

/// Where the packets are that a pair of queues sends.
pub(crate) fn outgoing(pair: usize) -> u64 {
    BUFFERS + 0x300_0000 + pair as u64 * 0x40_0000
}

/// Where a pair of queues receives packets to.
pub(crate) fn incoming(pair: usize) -> u64 {
    BUFFERS + pair as u64 * 0x100_0000
}

impl Card {
    /// A card with so many pairs of queues, and the other ends of them.
    pub(crate) fn new(pairs: usize, features: u64) -> (Self, Vec<Peer>) {
        let (machine, peers) = plug(pairs, Ram::new());
        (Self::start(machine, pairs, features), peers)
    }

    /// Starts a card that nobody drives.
    pub(crate) fn start(mut machine: Machine, pairs: usize, features: u64) -> Self {
        machine.enable_msix();
        let known = if features & MULTI_QUEUE == 0 {
            1
        } else {
            pairs
        };
        let count = 2 * known + usize::from(features & CONTROL != 0);
        let queues = machine.start(features, count.try_into().unwrap(), QUEUE);
        // Changes of the configuration have the first vector.
        machine.write(machine.places.common + 0x10, &0_u16.to_le_bytes());
        Self {
            machine,
            queues,
            features,
            buffers: HashMap::new(),
        }
    }

    pub(crate) fn ram(&self) -> &Ram {
        &self.machine.ram
    }

    /// Goes on with another device that has taken over this one's state.
    pub(crate) fn move_to(&mut self, mut machine: Machine) -> Machine {
        machine.enable_msix();
        for queue in &mut self.queues {
            queue.move_to(&machine);
        }
        std::mem::replace(&mut self.machine, machine)
    }

    /// Gives a pair of queues so many buffers of a size to receive into, side by side.
    pub(crate) fn fill(&mut self, pair: usize, count: u16, size: u32) {
        for number in 0..u64::from(count) {
            self.give(pair, incoming(pair) + number * u64::from(size), size);
        }
        self.queues[2 * pair].kick();
    }

    fn give(&mut self, pair: usize, address: u64, size: u32) {
        let head = self.queues[2 * pair].add(&[(address, size, true)]);
        self.buffers.insert((pair, head), (address, size));
    }

    /// The next packet that a pair of queues receives, with its header, and how many buffers it is in. The buffers are
    /// given back.
    pub(crate) fn receive_in(&mut self, pair: usize) -> (Vec<u8>, u16) {
        let first = self.queues[2 * pair].wait();
        self.take(pair, first)
    }

    pub(crate) fn receive(&mut self, pair: usize) -> Vec<u8> {
        self.receive_in(pair).0
    }

    /// A packet that has been received, if there is one.
    pub(crate) fn try_receive(&mut self, pair: usize) -> Option<Vec<u8>> {
        let first = self.queues[2 * pair].pop()?;
        Some(self.take(pair, first).0)
    }

    fn take(&mut self, pair: usize, (head, written): (u16, u32)) -> (Vec<u8>, u16) {
        let mut used = vec![(head, written)];
        let (address, _) = self.buffers[&(pair, head)];
        let count = self.ram().read16(address + 10);
        // All buffers of a packet are there at the same time.
        used.extend((1..count).map(|_| self.queues[2 * pair].pop().unwrap()));
        let mut packet = Vec::new();
        let mut buffers = Vec::new();
        for (at, (head, written)) in used.iter().enumerate() {
            let (address, size) = self.buffers.remove(&(pair, *head)).unwrap();
            // Only the last may have room left.
            assert!(*written == size || at + 1 == used.len());
            packet.extend(self.ram().read(address, usize::try_from(*written).unwrap()));
            buffers.push((address, size));
        }
        for (address, size) in buffers {
            self.give(pair, address, size);
        }
        self.queues[2 * pair].kick();
        (packet, count)
    }

    /// Sends a packet of `pieces`, and returns the head of its chain.
    pub(crate) fn post(&mut self, pair: usize, place: u64, pieces: &[&[u8]]) -> Option<u16> {
        let mut buffers = Vec::new();
        let mut address = outgoing(pair) + place;
        for piece in pieces {
            self.ram().write(address, piece);
            buffers.push((address, u32::try_from(piece.len()).unwrap(), false));
            address += piece.len() as u64;
        }
        self.queues[2 * pair + 1].try_add(&buffers)
    }

    /// Sends a packet, and waits until the card has taken it.
    pub(crate) fn send(&mut self, pair: usize, packet: &[u8]) {
        let head = self.post(pair, 0, &[packet]).unwrap();
        let queue = &mut self.queues[2 * pair + 1];
        queue.kick();
        assert_eq!(queue.wait(), (head, 0));
    }

    /// What the control queue answers to a command.
    pub(crate) fn command(&mut self, class: u8, number: u8, data: &[u8]) -> u8 {
        let place = outgoing(0) - 0x1000;
        let command = [&[class, number], data].concat();
        self.ram().write(place, &command);
        self.ram().write(place + 0x800, &[0xff]);
        let length = u32::try_from(command.len()).unwrap();
        let queue = self.queues.last_mut().unwrap();
        queue.add(&[
            (place, 2, false),
            (place + 2, length - 2, false),
            (place + 0x800, 1, true),
        ]);
        queue.kick();
        assert_eq!(queue.wait().1, 1);
        self.ram().read(place + 0x800, 1)[0]
    }

    /// MAC address, status, pairs and MTU.
    pub(crate) fn config(&self) -> ([u8; 6], u16, u16, u16) {
        config(&self.machine)
    }

    /// Waits until the configuration has changed.
    pub(crate) fn await_config(&self) {
        assert!(wait_for(&self.machine.vectors[0]) > 0);
    }
}

pub(crate) fn config(machine: &Machine) -> ([u8; 6], u16, u16, u16) {
    let bytes: [u8; 12] = machine.read(machine.places.config);
    let word = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
    (bytes[..6].try_into().unwrap(), word(6), word(8), word(10))
}

/// A card that nobody drives.
pub(crate) fn plug(pairs: usize, ram: Ram) -> (Machine, Vec<Peer>) {
    let (theirs, peers) = (0..pairs).map(|_| Peer::pair()).unzip();
    let options = options();
    let open = move || net::open_with(&options, theirs);
    (machine(open, ram), peers)
}

pub(crate) fn machine(
    open: impl FnOnce() -> Result<OpenNet, NetError> + Send + 'static,
    ram: Ram,
) -> Machine {
    Machine::with_ram(move || open().unwrap().server().unwrap(), ram)
}

pub(crate) fn options() -> Options {
    Options {
        mac: net::MacAddress::new(MAC),
        mtu: Some(1500),
        ..Options::default()
    }
}

/// A packet with a header that asks for nothing, and a number from which all of it follows.
pub(crate) fn packet(number: u32, length: usize) -> Vec<u8> {
    let mut packet = vec![0; HEADER];
    packet.extend(number.to_le_bytes());
    packet.extend(
        (0_u32..)
            .map(|at| at.wrapping_mul(number | 1).to_le_bytes()[1])
            .take(length),
    );
    packet
}

/// Checks a packet, and returns its number.
pub(crate) fn number(received: &[u8]) -> u32 {
    let number = u32::from_le_bytes(received[HEADER..HEADER + 4].try_into().unwrap());
    let mut expected = packet(number, received.len() - HEADER - 4);
    // What the card fills in.
    expected[..HEADER].copy_from_slice(&received[..HEADER]);
    assert!(received == expected, "packet {number} is damaged");
    number
}
