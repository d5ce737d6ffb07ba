//! A network card, as Linux's driver has it. The host is at the other end, and has the first address of the card's network.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, ErrorKind};
use std::net::{TcpStream, UdpSocket};
use std::sync::mpsc::RecvTimeoutError;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use guest::offload::{self, Offload};
use guest::stream::{Order, PORT};

use super::CARD;
use super::block::entries;
use crate::interrupts::wait_for;
use crate::passthrough::{busybox, interrupts};
use crate::pci::Device;
use crate::work::button;

/// A card that has a name, and its network.
pub(crate) struct Card {
    /// Such as eth0.
    pub(crate) name: String,
    /// This end, and the other.
    pub(crate) addresses: [String; 2],
    virtio: String,
}

impl Card {
    /// The card that a device is, up and with an address.
    pub(crate) fn of(device: &Device) -> Result<Self> {
        let all = Device::with_ids(CARD)?;
        let number = all.iter().position(|other| other.name == device.name);
        let number = number.context("no such card")?;
        let mut found = None;
        wait_for("the card", || {
            let inside = entries(&device.sysfs(""))?;
            found = inside.into_iter().find_map(|virtio| {
                let name = entries(&device.sysfs(&format!("{virtio}/net")))
                    .ok()?
                    .pop()?;
                Some((name, virtio))
            });
            Ok(found.is_some())
        })?;
        let (name, virtio) = found.context("no card")?;
        // Addresses for tests of networks (RFC 2544).
        let addresses = [2, 1].map(|last| format!("198.18.{number}.{last}"));
        let card = Self {
            name,
            addresses,
            virtio,
        };
        if card.attribute("operstate")? == "down" {
            let address = format!("{}/24", card.addresses[0]);
            busybox(&["ip", "address", "replace", &address, "dev", &card.name])?;
            busybox(&["ip", "link", "set", &card.name, "up"])?;
            wait_for("the link", || Ok(card.attribute("carrier")? == "1"))?;
        }
        Ok(card)
    }

    /// What sysfs says about it.
    fn attribute(&self, name: &str) -> Result<String> {
        let path = format!("/sys/class/net/{}/{name}", self.name);
        let text = fs::read_to_string(&path).context(path)?;
        Ok(text.trim().to_owned())
    }

    /// Connects to a port of the host.
    pub(crate) fn connect(&self, port: u16) -> Result<TcpStream> {
        let stream = TcpStream::connect((self.addresses[1].as_str(), port))?;
        let patience = Some(Duration::from_secs(60));
        stream.set_read_timeout(patience)?;
        stream.set_write_timeout(patience)?;
        Ok(stream)
    }

    /// Sends a small packet and waits for the answer, so often.
    pub(crate) fn echo(&self, count: u32) -> Result<()> {
        let socket = UdpSocket::bind((self.addresses[0].as_str(), 0))?;
        socket.connect((self.addresses[1].as_str(), PORT))?;
        socket.set_read_timeout(Some(Duration::from_secs(2)))?;
        for number in 0..count {
            let sent = number.to_le_bytes();
            let mut lost = 0;
            loop {
                socket.send(&sent)?;
                let mut received = [0; 4];
                match socket.recv(&mut received) {
                    Ok(_) if received == sent => break,
                    // An answer to one that was sent twice.
                    Ok(_) => {}
                    Err(error) if is_timeout(&error) && lost < 5 => lost += 1,
                    Err(error) => return Err(error).context("no answer"),
                }
            }
        }
        Ok(())
    }
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut)
}

/// Says what the card is like.
pub(super) fn facts(device: &Device) -> Result<()> {
    let card = Card::of(device)?;
    let queues = entries(format!("/sys/class/net/{}/queues", card.name).as_ref())?;
    let mut words = vec![format!("queues={}", queues.len())];
    for attribute in ["address", "mtu", "carrier"] {
        words.push(format!("{attribute}={}", card.attribute(attribute)?));
    }
    println!("FACT card {} {}", card.name, words.join(" "));
    Ok(())
}

/// Packets go there and come back, also such as fill a frame.
pub(super) fn ping(device: &Device) -> Result<()> {
    let card = Card::of(device)?;
    let mtu: usize = card.attribute("mtu")?.parse()?;
    // What is before the data, of IP and of ICMP.
    let largest = (mtu - 28).to_string();
    for size in ["56", "1000", &largest] {
        let words = ["ping", "-q", "-c", "3", "-w", "20", "-i", "0.2", "-s"];
        busybox(&[&words[..], &[size, &card.addresses[1]]].concat())?;
    }
    Ok(())
}

/// Much data goes both ways undamaged, over several connections at a time, whatever the card is left to do.
pub(super) fn bulk(device: &Device) -> Result<()> {
    const FLOWS: u64 = 4;
    const LENGTH: u64 = 1 << 20;
    let card = Card::of(device)?;
    use Offload::{Checksum, GenericSegmentation, Pieces, Segmentation};
    for (number, off) in (0..).zip([
        &[][..],
        &[Segmentation, GenericSegmentation],
        &[Checksum, Pieces],
    ]) {
        for offload in off {
            offload::set(&card.name, *offload, false).with_context(|| format!("{offload:?}"))?;
        }
        for is_upload in [true, false] {
            thread::scope(|scope| {
                let order = |flow: u64| Order {
                    seed: number << 8 | flow << 1 | u64::from(is_upload),
                    length: LENGTH + flow,
                    is_upload,
                };
                let orders = (0..FLOWS).map(order);
                let card = &card;
                let flow = |order: Order| scope.spawn(move || order.carry_out(card.connect(PORT)?));
                let flows: Vec<_> = orders.map(flow).collect();
                flows
                    .into_iter()
                    .try_for_each(|thread| thread.join().ok().context("a flow panicked")?)
            })
            .with_context(|| format!("without {off:?}"))?;
        }
    }
    for offload in [Checksum, Pieces, Segmentation, GenericSegmentation] {
        offload::set(&card.name, offload, true).with_context(|| format!("{offload:?}"))?;
    }
    Ok(())
}

/// Datagrams that are sent as one packet arrive as they are, whoever splits it.
pub(super) fn datagrams(device: &Device) -> Result<()> {
    const SIZE: u16 = 1200;
    const ATTEMPTS: u32 = 5;
    let card = Card::of(device)?;
    let socket = UdpSocket::bind((card.addresses[0].as_str(), 0))?;
    socket.connect((card.addresses[1].as_str(), PORT))?;
    socket.set_read_timeout(Some(Duration::from_secs(2)))?;
    offload::split_datagrams(&socket, SIZE)?;
    let sent: Vec<_> = (0..20_u8)
        .flat_map(|number| [number].repeat(SIZE.into()))
        .chain([20; 7])
        .collect();
    let expected: BTreeSet<_> = sent.chunks(SIZE.into()).map(<[u8]>::to_vec).collect();
    let mut received = BTreeSet::new();
    for _ in 0..ATTEMPTS {
        if received.len() == expected.len() {
            break;
        }
        socket.send(&sent)?;
        let mut answer = [0; 2048];
        // Some may be lost, and then all are sent again.
        while received.len() < expected.len() {
            match socket.recv(&mut answer) {
                Ok(length) => {
                    let datagram = answer.get(..length).unwrap_or_default().to_vec();
                    ensure!(
                        expected.contains(&datagram),
                        "{length} bytes that nobody sent"
                    );
                    received.insert(datagram);
                }
                Err(error) if is_timeout(&error) => break,
                Err(error) => return Err(error).context("no answer"),
            }
        }
    }
    let (arrived, all) = (received.len(), expected.len());
    ensure!(arrived == all, "{arrived} of {all} datagrams come back");
    Ok(())
}

/// Each of its queues that Linux uses has been of use, in both directions.
pub(super) fn queues(device: &Device) -> Result<()> {
    let card = Card::of(device)?;
    for direction in ["input", "output"] {
        let counts = interrupts(&format!("{}-{direction}", card.virtio))?;
        let used = counts.iter().filter(|count| count.1 > 0).count();
        println!("FACT card-interrupts {} {direction} {counts:?}", card.name);
        ensure!(used > 0, "no interrupts of its {direction}s");
    }
    Ok(())
}

/// Says `CARRIER CARD 1` or `CARRIER CARD 0` when a card's link comes or goes, until the power button is pressed.
pub(crate) fn until_button() -> Result<()> {
    let button = button()?;
    let cards = Device::with_ids(CARD)?;
    let cards: Vec<_> = cards.iter().map(Card::of).collect::<Result<_>>()?;
    let mut carriers = vec![String::new(); cards.len()];
    while button.recv_timeout(Duration::from_millis(20)) == Err(RecvTimeoutError::Timeout) {
        for (card, before) in cards.iter().zip(&mut carriers) {
            let carrier = card.attribute("carrier")?;
            if carrier != *before {
                println!("CARRIER {} {carrier}", card.name);
                *before = carrier;
            }
        }
    }
    Ok(())
}
