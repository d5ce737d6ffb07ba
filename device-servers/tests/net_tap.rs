//! The network card on taps. It takes `CAP_NET_ADMIN` and `ip` to make them; without those, they are skipped.

#![expect(clippy::unwrap_used, reason = "a test panics when it fails")]

#[path = "support/card.rs"]
mod card;
#[path = "../../tests/src/skipped.rs"]
#[expect(unreachable_pub, reason = "it is reachable where it belongs")]
mod skipped;
mod support;

use std::net::UdpSocket;
use std::process::Command;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use card::{
    CONTROL, Card, GUEST_CSUM, HEADER, MAC, MERGEABLE, MULTI_QUEUE, QUEUE, config, machine, options,
};
use device_servers::net::{self, NetError, Options};
use skipped::skip;
use support::{EVENT_IDX, LONG, Ram};

const UP: u16 = 1;

/// A tap that stays until this goes, with a network of its own.
struct Tap {
    name: String,
    /// The third byte of its addresses.
    network: u8,
}

impl Tap {
    /// Makes one, up and with an address, if that is possible.
    fn new(flags: &[&str]) -> Option<Self> {
        static NEXT: AtomicU8 = AtomicU8::new(1);
        let network = NEXT.fetch_add(1, Ordering::SeqCst);
        let name = format!("ortest{network}-{}", std::process::id() % 100_000);
        let made = ip(&[&["tuntap", "add", "dev", &name, "mode", "tap"], flags].concat());
        if !made {
            skip("no tap can be made (CAP_NET_ADMIN, /dev/net/tun, `ip`)");
            return None;
        }
        let tap = Self { name, network };
        // Addresses for tests of networks (RFC 2544).
        let address = format!("198.18.{network}.1/24");
        assert!(ip(&["address", "add", &address, "dev", &tap.name]));
        assert!(ip(&["link", "set", &tap.name, "mtu", "1400", "up"]));
        Some(tap)
    }

    fn options(&self) -> Options {
        Options {
            tap: Some(self.name.clone()),
            mtu: None,
            ..options()
        }
    }

    fn card(&self, pairs: u16, features: u64) -> Card {
        let options = Options {
            num_queues: pairs,
            ..self.options()
        };
        let machine = machine(move || net::open(&options), Ram::new());
        let mut card = Card::start(machine, pairs.into(), features);
        card.fill(0, QUEUE / 2, 2048);
        card
    }

    /// The host's address, and the guest's.
    fn addresses(&self) -> [[u8; 4]; 2] {
        [1, 2].map(|last| [198, 18, self.network, last])
    }

    /// Tells the host where the guest is, so that it does not ask.
    fn introduce(&self) {
        let guest = format!("198.18.{}.2", self.network);
        let mac = MAC.map(|byte| format!("{byte:02x}")).join(":");
        let entry = [
            "neigh", "replace", &guest, "lladdr", &mac, "dev", &self.name,
        ];
        assert!(ip(&[&entry[..], &["nud", "permanent"]].concat()));
    }

    fn socket(&self) -> UdpSocket {
        let [host, _] = self.addresses();
        let socket = UdpSocket::bind((std::net::Ipv4Addr::from(host), 9)).unwrap();
        socket.set_read_timeout(Some(LONG)).unwrap();
        socket
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        ip(&["link", "delete", &self.name]);
    }
}

fn ip(arguments: &[&str]) -> bool {
    let output = Command::new("ip").args(arguments).output();
    output.is_ok_and(|output| output.status.success())
}

/// A packet of UDP over IPv4 from the guest, whose checksum is left to whoever can do it.
fn udp([host, guest]: [[u8; 4]; 2], host_mac: [u8; 6], data: &[u8]) -> Vec<u8> {
    let length = u16::try_from(8 + data.len()).unwrap();
    let total = (20 + length).to_be_bytes();
    let mut ip = vec![0x45, 0, total[0], total[1], 0, 0, 0, 0, 64, 17, 0, 0];
    ip.extend(guest);
    ip.extend(host);
    let checksum = !sum(&ip);
    ip[10..12].copy_from_slice(&checksum.to_be_bytes());
    let pseudo = [&guest[..], &host, &[0, 17], &length.to_be_bytes()].concat();
    let ports = [0, 7, 0, 9];
    // Needs a checksum, from 34 on, at 6.
    let mut packet = vec![1, 0, 0, 0, 0, 0, 34, 0, 6, 0, 0, 0];
    packet.extend(host_mac);
    packet.extend(MAC);
    packet.extend([8, 0]);
    packet.extend(ip);
    packet.extend(ports);
    packet.extend(length.to_be_bytes());
    packet.extend(sum(&pseudo).to_be_bytes());
    packet.extend(data);
    packet
}

/// The sum of 16-bit words in one's complement (RFC 1071).
fn sum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|word| {
        let [high, low] = [word[0], word.get(1).copied().unwrap_or(0)];
        u32::from(u16::from_be_bytes([high, low]))
    });
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    u16::try_from(sum).unwrap()
}

fn is_udp(packet: &[u8]) -> bool {
    packet[HEADER + 12..HEADER + 14] == [8, 0] && packet[HEADER + 23] == 17
}

/// The next packet of UDP; a host has more to say than that.
fn receive_udp(card: &mut Card, pair: usize) -> Vec<u8> {
    loop {
        let packet = card.receive(pair);
        if is_udp(&packet) {
            return packet;
        }
    }
}

#[test]
fn packets_pass_the_host() {
    let Some(tap) = Tap::new(&["vnet_hdr"]) else {
        return;
    };
    tap.introduce();
    let socket = tap.socket();
    let [_, guest] = tap.addresses();
    let path = format!("/sys/class/net/{}/address", tap.name);
    let host_mac = std::fs::read_to_string(path).unwrap();
    let host_mac: net::MacAddress = host_mac.trim().parse().unwrap();
    for features in [MERGEABLE | EVENT_IDX | GUEST_CSUM, 0] {
        let mut card = tap.card(1, features);
        assert_eq!(card.config(), (MAC, UP, 1, 1400));
        for round in 0..100_u8 {
            let data = vec![round; 10 * usize::from(round) + 1];
            socket
                .send_to(&data, (std::net::Ipv4Addr::from(guest), 7))
                .unwrap();
            let packet = receive_udp(&mut card, 0);
            assert_eq!(packet[HEADER + 42..], data);
            // Without the offload, the kernel has done the sum.
            let segment = &packet[HEADER + 34..];
            let length = u16::try_from(segment.len()).unwrap().to_be_bytes();
            let pseudo = [&packet[HEADER + 26..HEADER + 34], &[0, 17], &length].concat();
            let is_whole = sum(&[&pseudo, segment].concat()) == 0xffff;
            assert_eq!(
                (packet[0] & 1 == 1, is_whole),
                (features != 0, features == 0)
            );
            card.send(0, &udp(tap.addresses(), host_mac.bytes(), &data));
            let mut received = [0; 2000];
            let (count, from) = socket.recv_from(&mut received).unwrap();
            assert_eq!(received[..count], data);
            assert_eq!(from, (std::net::Ipv4Addr::from(guest), 7).into());
        }
        card.machine.end();
    }
}

#[test]
fn the_link_follows_the_tap() {
    let Some(tap) = Tap::new(&["vnet_hdr"]) else {
        return;
    };
    let card = tap.card(1, CONTROL | MERGEABLE);
    assert_eq!(config(&card.machine).1, UP);
    for (state, expected) in [("down", 0), ("up", UP), ("down", 0)] {
        assert!(ip(&["link", "set", &tap.name, state]));
        await_status(&card, expected);
    }
    // What happened while nobody was looking is seen too.
    assert!(card.machine.negotiate(support::VERSION_1));
    assert!(ip(&["link", "set", &tap.name, "up"]));
    let card = Card::start(card.machine, 1, MERGEABLE);
    await_status(&card, UP);
    // So is a tap that goes for good.
    assert!(ip(&["link", "delete", &tap.name]));
    await_status(&card, 0);
    let mut card = Card::start(card.machine, 1, MERGEABLE | GUEST_CSUM);
    card.send(0, &[0; 100]);
    assert_eq!(card.config().1, 0);
}

fn await_status(card: &Card, expected: u16) {
    let start = Instant::now();
    while card.config().1 != expected {
        card.await_config();
        assert!(start.elapsed() < LONG, "the link is not {expected}");
    }
}

#[test]
fn pairs_take_their_share() {
    let Some(tap) = Tap::new(&["vnet_hdr", "multi_queue"]) else {
        return;
    };
    tap.introduce();
    let [host, guest] = tap.addresses();
    let features = MERGEABLE | EVENT_IDX | CONTROL | MULTI_QUEUE;
    let mut card = tap.card(4, features);
    for pair in 1..3 {
        card.fill(pair, QUEUE / 2, 2048);
    }
    let send = |packets: u16| {
        for port in 0..packets {
            let socket = UdpSocket::bind((std::net::Ipv4Addr::from(host), 0)).unwrap();
            let data = port.to_le_bytes();
            socket
                .send_to(&data, (std::net::Ipv4Addr::from(guest), 7))
                .unwrap();
        }
    };
    // The host spreads flows over the queues that are in use, which is one at first, and then three.
    send(64);
    let mut received = 0;
    while received < 64 {
        receive_udp(&mut card, 0);
        received += 1;
    }
    assert_eq!(card.command(4, 0, &[3, 0]), 0);
    send(64);
    let mut shares = [0; 3];
    let start = Instant::now();
    while shares.iter().sum::<u16>() < 64 {
        for (pair, share) in shares.iter_mut().enumerate() {
            while let Some(packet) = card.try_receive(pair) {
                *share += u16::from(is_udp(&packet));
            }
        }
        assert!(start.elapsed() < LONG, "{shares:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(shares.iter().all(|share| *share > 0), "{shares:?}");
    // A new driver begins with one again.
    let mut card = Card::start(card.machine, 4, features);
    card.fill(0, QUEUE / 2, 2048);
    send(64);
    for _ in 0..64 {
        receive_udp(&mut card, 0);
    }
}

#[test]
fn taps_that_will_not_do_are_named() {
    let refused = |options: Options| net::open(&options).unwrap_err();
    let Some(tap) = Tap::new(&["vnet_hdr"]) else {
        return;
    };
    let several = Options {
        num_queues: 2,
        ..tap.options()
    };
    let error = refused(several);
    assert!(matches!(error, NetError::NotSuitable { .. }));
    assert!(error.to_string().contains(&tap.name) && error.to_string().contains("multi_queue"));
    let _first = net::open(&tap.options()).unwrap();
    let error = refused(tap.options());
    assert!(matches!(error, NetError::InUse { .. }));
    assert!(error.to_string().contains(&tap.name));
    // What is there, and no tap.
    let loopback = Options {
        tap: Some("lo".to_owned()),
        ..options()
    };
    assert!(matches!(refused(loopback), NetError::NotSuitable { .. }));
    // One of several queues is good for a card of one.
    let multi = Tap::new(&["vnet_hdr", "multi_queue"]).unwrap();
    net::open(&multi.options()).unwrap();
}

#[test]
fn a_tap_that_is_made_is_up_and_goes_with_the_card() {
    if Tap::new(&[]).is_none() {
        return;
    }
    let name = format!("ormade-{}", std::process::id() % 100_000);
    let options = Options {
        tap: Some(name.clone()),
        mtu: Some(1300),
        num_queues: 2,
        ..options()
    };
    let path = format!("/sys/class/net/{name}");
    let read = |file: &str| std::fs::read_to_string(format!("{path}/{file}")).unwrap();
    let machine = machine(move || net::open(&options), Ram::new());
    assert_eq!(config(&machine), (MAC, UP, 2, 1300));
    assert_eq!([read("mtu"), read("carrier")], ["1300\n", "1\n"]);
    machine.end();
    // Another test may be starting a program just now, which for a moment has all that this process has.
    let deadline = Instant::now() + Duration::from_secs(10);
    while std::path::Path::new(&path).exists() {
        assert!(Instant::now() < deadline, "{name} is still there");
        std::thread::yield_now();
    }
    // The kernel chooses a name if nobody else does.
    let unnamed = Options::default();
    drop(net::open(&unnamed).unwrap());
}
