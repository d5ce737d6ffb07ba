//! Splitting of UDP packets for a tap that does not (`VIRTIO_NET_F_HOST_USO`; Linux's taps do since 6.2). A guest that was
//! offered it on one host goes on using it on another, and finds the same features wherever it starts.
//!
//! What a driver hands over is one packet: a header, and the datagrams' data one behind the other, of which all but the last
//! have the same size (virtio 1.2, 5.1.6.2). Each datagram gets the packet's headers, with its own lengths and, with IPv4,
//! its own identification and header checksum. Its UDP checksum stays as unfinished as it was, of the addresses and the
//! length alone, for the tap's other end to finish.

use std::io::{self, IoSlice};

use virtio_bindings::bindings::virtio_net::{
    VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_NONE, VIRTIO_NET_HDR_GSO_UDP_L4,
};

use super::config::HEADER;

/// Most datagrams in a packet: more than any driver sends (Linux: `UDP_MAX_SEGMENTS`, 128), and not so many that splitting
/// one holds the card up.
const MOST: usize = 1024;

/// Bytes at the beginning of a packet in which it says how it is to be split.
pub(super) const KIND: usize = 2;

/// Whether a packet that begins like this holds several datagrams.
pub(super) fn is_for(start: [u8; KIND]) -> bool {
    let [_, kind] = start;
    u32::from(kind) == VIRTIO_NET_HDR_GSO_UDP_L4
}

/// Writes each datagram of a packet as a packet of its own.
///
/// # Errors
/// When it is none to be split, or what `write` says of the first. What comes behind one that was written is dropped, as by
/// a network.
pub(super) fn write(
    packet: &mut [u8],
    mut write: impl FnMut(&[IoSlice<'_>]) -> io::Result<()>,
) -> io::Result<()> {
    let invalid = || io::Error::from(io::ErrorKind::InvalidData);
    let headers = Headers::of(packet).ok_or_else(invalid)?;
    let (head, data) = packet
        .split_at_mut_checked(headers.length)
        .ok_or_else(invalid)?;
    for (number, datagram) in (0..).zip(data.chunks(headers.size)) {
        headers
            .describe(head, number, datagram.len())
            .ok_or_else(invalid)?;
        match write(&[IoSlice::new(head), IoSlice::new(datagram)]) {
            Err(error) if number > 0 && error.kind() == io::ErrorKind::WouldBlock => {
                return Err(io::Error::other("the tap has no room for the rest of it"));
            }
            result => result?,
        }
    }
    Ok(())
}

/// Where a packet's headers are, and what is in them.
#[derive(Clone, Copy, Debug)]
struct Headers {
    network: usize,
    version: Version,
    transport: usize,
    /// Bytes of all headers.
    length: usize,
    /// Bytes of data in each datagram but the last.
    size: usize,
    /// The UDP header's length, of all datagrams.
    total: u16,
    /// The unfinished UDP checksum that goes with it.
    checksum: u16,
}

#[derive(Clone, Copy, Debug)]
enum Version {
    /// With the identification of the first datagram.
    V4 {
        identification: u16,
    },
    V6,
}

/// Bytes of headers, and places in them: `struct virtio_net_hdr_v1` (virtio 1.2, 5.1.6), Ethernet with tags (IEEE 802.3 and
/// 802.1Q), IPv4 (RFC 791), IPv6 (RFC 8200) and UDP (RFC 768).
const FLAGS: usize = 0;
const GSO_TYPE: usize = 1;
const GSO_SIZE: usize = 4;
const CHECKSUM_START: usize = 6;
const CHECKSUM_OFFSET: usize = 8;
const ETHERNET_TYPE: usize = 12;
const ETHERNET: usize = 14;
const TAG: usize = 4;
const MAX_TAGS: usize = 2;
const V4_LENGTH: usize = 2;
const V4_IDENTIFICATION: usize = 4;
const V4_PROTOCOL: usize = 9;
const V4_CHECKSUM: usize = 10;
const V6_LENGTH: usize = 4;
const V6: usize = 40;
const UDP_LENGTH: usize = 4;
const UDP_CHECKSUM: usize = 6;
const UDP: usize = 8;
const PROTOCOL_UDP: u8 = 17;

impl Headers {
    fn of(packet: &[u8]) -> Option<Self> {
        let [flags, kind] = [FLAGS, GSO_TYPE].map(|at| packet.get(at).copied());
        let little = |at| Some(usize::from(u16::from_le_bytes(two(packet, at)?)));
        let is_possible = u32::from(flags?) & VIRTIO_NET_HDR_F_NEEDS_CSUM != 0
            && u32::from(kind?) == VIRTIO_NET_HDR_GSO_UDP_L4
            && little(CHECKSUM_OFFSET)? == UDP_CHECKSUM;
        let transport = HEADER + little(CHECKSUM_START)?;
        let (network, kind) = network(packet)?;
        let version = match kind {
            [0x08, 0x00] => {
                let length = usize::from(packet.get(network)? & 0xf) * 4;
                let protocol = *packet.get(network + V4_PROTOCOL)?;
                if transport != network + length || length < 20 || protocol != PROTOCOL_UDP {
                    return None;
                }
                let identification = big(packet, network + V4_IDENTIFICATION)?;
                Version::V4 { identification }
            }
            // There may be other headers behind the first, and all of them are repeated.
            [0x86, 0xdd] if transport >= network + V6 => Version::V6,
            _ => return None,
        };
        let total = big(packet, transport + UDP_LENGTH)?;
        let headers = Self {
            network,
            version,
            transport,
            length: transport + UDP,
            size: little(GSO_SIZE)?,
            total,
            checksum: big(packet, transport + UDP_CHECKSUM)?,
        };
        let is_whole = packet.len() > headers.length
            && transport + usize::from(total) == packet.len()
            && headers.size > 0
            && (packet.len() - headers.length).div_ceil(headers.size) <= MOST;
        (is_possible && is_whole).then_some(headers)
    }

    /// Makes the headers in `head` those of one datagram, with so much data. `None` if that is too much.
    fn describe(&self, head: &mut [u8], number: u16, data: usize) -> Option<()> {
        let udp = u16::try_from(UDP + data).ok()?;
        *head.get_mut(GSO_TYPE)? = u8::try_from(VIRTIO_NET_HDR_GSO_NONE).ok()?;
        put(head, GSO_SIZE, 0)?;
        put(head, self.transport + UDP_LENGTH, udp)?;
        // It is the sum of the addresses, the protocol and the length.
        let checksum = folded(
            [self.checksum, !self.total, udp]
                .map(u32::from)
                .iter()
                .sum(),
        );
        put(head, self.transport + UDP_CHECKSUM, checksum)?;
        let transport = self.transport - self.network;
        match self.version {
            Version::V4 { identification } => {
                let length = u16::try_from(transport + UDP + data).ok()?;
                put(head, self.network + V4_LENGTH, length)?;
                let identification = identification.wrapping_add(number);
                put(head, self.network + V4_IDENTIFICATION, identification)?;
                put(head, self.network + V4_CHECKSUM, 0)?;
                let header = head.get(self.network..self.transport)?;
                put(head, self.network + V4_CHECKSUM, !sum(header))
            }
            Version::V6 => {
                let length = u16::try_from(transport - V6 + UDP + data).ok()?;
                put(head, self.network + V6_LENGTH, length)
            }
        }
    }
}

/// Where the network's header is, and of which kind.
fn network(packet: &[u8]) -> Option<(usize, [u8; 2])> {
    let mut at = HEADER + ETHERNET_TYPE;
    for _ in 0..=MAX_TAGS {
        match two(packet, at)? {
            [0x81, 0x00] | [0x88, 0xa8] => at += TAG,
            kind => return Some((at + (ETHERNET - ETHERNET_TYPE), kind)),
        }
    }
    None
}

/// The checksum of the internet before it is inverted (RFC 1071).
fn sum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|word| match *word {
        [high, low] => u32::from(u16::from_be_bytes([high, low])),
        [high] => u32::from(high) << 8,
        _ => 0,
    });
    folded(words.sum())
}

fn folded(mut sum: u32) -> u16 {
    loop {
        match u16::try_from(sum) {
            Ok(sum) => return sum,
            Err(_) => sum = (sum & 0xffff) + (sum >> 16),
        }
    }
}

fn two(bytes: &[u8], at: usize) -> Option<[u8; 2]> {
    bytes.get(at..)?.first_chunk().copied()
}

fn big(bytes: &[u8], at: usize) -> Option<u16> {
    two(bytes, at).map(u16::from_be_bytes)
}

fn put(bytes: &mut [u8], at: usize, value: u16) -> Option<()> {
    *bytes.get_mut(at..)?.first_chunk_mut()? = value.to_be_bytes();
    Some(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The packet with an IP header of this kind, and the data.
    fn packet(is_v6: bool, tags: usize, size: u16, data: &[u8]) -> Vec<u8> {
        let udp = u16::try_from(UDP + data.len()).unwrap();
        let (kind, addresses, mut ip) = if is_v6 {
            let mut ip = vec![0x60, 0, 0, 0, 0, 0, PROTOCOL_UDP, 64];
            ip.extend(1..33);
            ip[4..6].copy_from_slice(&udp.to_be_bytes());
            (0x86dd_u16, 8..40, ip)
        } else {
            let mut ip = vec![0x46, 0, 0, 0, 0xff, 0xff, 0x40, 0, 64, PROTOCOL_UDP, 0, 0];
            ip.extend([192, 0, 2, 1, 198, 51, 100, 7]);
            // An option that does nothing.
            ip.extend([1, 1, 1, 0]);
            (0x0800, 12..20, ip)
        };
        let pseudo = [&ip[addresses], &[0, PROTOCOL_UDP], &udp.to_be_bytes()].concat();
        let mut bytes = vec![1, 5, 0, 0];
        let start = u16::try_from(ETHERNET + TAG * tags + ip.len()).unwrap();
        for word in [size, start, 6, 0] {
            bytes.extend(word.to_le_bytes());
        }
        bytes.extend([2; 12]);
        for _ in 0..tags {
            bytes.extend([0x81, 0, 0, 7]);
        }
        bytes.extend(kind.to_be_bytes());
        bytes.append(&mut ip);
        bytes.extend([0x13, 0x88, 0x13, 0x89]);
        bytes.extend(udp.to_be_bytes());
        bytes.extend(sum(&pseudo).to_be_bytes());
        bytes.extend(data);
        bytes
    }

    fn split(packet: &mut [u8]) -> io::Result<Vec<Vec<u8>>> {
        let mut all = Vec::new();
        write(packet, |slices| {
            all.push(slices.iter().flat_map(|slice| slice.to_vec()).collect());
            Ok(())
        })?;
        Ok(all)
    }

    proptest! {
        /// Each is what a driver would have sent that splits itself, and all data is there.
        #[test]
        fn datagrams_are_as_if_sent_alone(
            is_v6: bool,
            tags in 0..=MAX_TAGS,
            size in 10_u16..2000,
            data in prop::collection::vec(any::<u8>(), 1..9000),
        ) {
            let all = split(&mut packet(is_v6, tags, size, &data)).unwrap();
            let chunks = data.chunks(size.into());
            prop_assert_eq!(all.len(), chunks.len());
            for ((number, written), chunk) in (0_u16..).zip(all).zip(chunks) {
                let mut alone = packet(is_v6, tags, 0, chunk);
                alone[GSO_TYPE] = 0;
                if !is_v6 {
                    let at = HEADER + ETHERNET + TAG * tags;
                    let length = u16::try_from(alone.len() - at).unwrap();
                    put(&mut alone, at + V4_LENGTH, length).unwrap();
                    put(&mut alone, at + V4_IDENTIFICATION, 0xffff_u16.wrapping_add(number)).unwrap();
                    let checksum = !sum(&alone[at..at + 24]);
                    put(&mut alone, at + V4_CHECKSUM, checksum).unwrap();
                    prop_assert_eq!(sum(&alone[at..at + 24]), 0xffff);
                }
                prop_assert_eq!(written, alone);
            }
        }

        /// Whatever a driver writes, nothing worse happens than that it is dropped.
        #[test]
        fn no_packet_panics(
            is_v6: bool,
            mut changes in prop::collection::vec((0_usize..90, any::<u8>()), 0..4),
            length in 0_usize..200,
        ) {
            let mut bytes = packet(is_v6, 1, 20, &[3; 100]);
            bytes.truncate(length);
            for (at, value) in changes.drain(..) {
                if let Some(byte) = bytes.get_mut(at) {
                    *byte = value;
                }
            }
            let _ = split(&mut bytes);
        }
    }

    #[test]
    fn what_is_none_is_refused() {
        let changes: [fn(&mut Vec<u8>); 9] = [
            |bytes| bytes[FLAGS] = 0,
            |bytes| bytes[GSO_TYPE] = 1,
            |bytes| bytes[GSO_SIZE] = 0,
            |bytes| bytes[CHECKSUM_OFFSET] = 16,
            |bytes| bytes[CHECKSUM_START] += 2,
            |bytes| bytes[HEADER + ETHERNET_TYPE] = 9,
            |bytes| bytes[HEADER + ETHERNET + V4_PROTOCOL] = 6,
            |bytes| bytes.push(0),
            |bytes| *bytes = packet(false, 0, 1, &[0; MOST + 1]),
        ];
        for (number, change) in changes.into_iter().enumerate() {
            let mut bytes = packet(false, 0, 4, b"datagrams");
            assert_eq!(split(&mut bytes.clone()).unwrap().len(), 3);
            change(&mut bytes);
            split(&mut bytes).expect_err(&number.to_string());
        }
    }

    #[test]
    fn only_a_whole_packet_waits_for_room() {
        for room in 0..3 {
            let mut left = room;
            let error = write(&mut packet(true, 0, 4, b"datagrams"), |_| {
                left -= 1;
                match left {
                    0.. => Ok(()),
                    _ => Err(io::ErrorKind::WouldBlock.into()),
                }
            })
            .unwrap_err();
            let waits = error.kind() == io::ErrorKind::WouldBlock;
            assert_eq!(waits, room == 0, "{room}");
        }
    }
}
