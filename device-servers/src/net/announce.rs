//! How the server announces the card after it has moved here: by frames from its address, so that switches learn where it
//! is now.

use std::time::Duration;

use super::config::HEADER;
use super::mac::MacAddress;

/// How many frames there are.
pub(super) const ANNOUNCEMENTS: u8 = 5;

/// How long to wait before the frame after which so many are left. The first goes at once, and the later ones are for
/// switches and links that are not ready that soon.
pub(super) fn pause(left: u8) -> Duration {
    let earlier = ANNOUNCEMENTS.saturating_sub(left);
    match earlier {
        0 => Duration::ZERO,
        earlier => Duration::from_millis(100 * u64::from(earlier) - 50),
    }
}

/// A frame that makes known where the address is and asks nobody for anything: a reverse ARP request (RFC 903), as other
/// VMMs send it.
pub(super) fn frame(mac: MacAddress) -> Vec<u8> {
    /// Bytes of an Ethernet frame at least, without its checksum (IEEE 802.3, 4A.4.2).
    const SHORTEST: usize = 60;
    let mac = mac.bytes();
    let mut frame = vec![0; HEADER];
    frame.extend([0xff; 6]);
    frame.extend(mac);
    frame.extend(0x8035_u16.to_be_bytes()); // reverse ARP
    frame.extend(1_u16.to_be_bytes()); // Ethernet
    frame.extend(0x0800_u16.to_be_bytes()); // IPv4
    frame.extend([6, 4]); // how long their addresses are
    frame.extend(3_u16.to_be_bytes()); // request reverse
    for _ in ["sender", "target"] {
        frame.extend(mac);
        frame.extend([0; 4]);
    }
    frame.resize(HEADER + SHORTEST, 0);
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_spread_over_a_second() {
        let pauses = (0..=ANNOUNCEMENTS)
            .rev()
            .map(|left| pause(left).as_millis());
        assert_eq!(pauses.collect::<Vec<_>>(), [0, 50, 150, 250, 350, 450]);
    }
}
