//! What the card is like beside its queues, and how that migrates.

use std::{fmt, io};

use super::config::{Config, GUEST_OFFLOADS};
use super::mac::MacAddress;

/// What the driver has set, and what it is told. The thread that serves the client and the one that serves the control
/// queue share it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct State {
    pub(super) mac: MacAddress,
    /// How many pairs of queues the driver uses.
    pub(super) pairs: u16,
    /// The features among the [`GUEST_OFFLOADS`] that are on. `None` before the driver has negotiated.
    pub(super) offloads: Option<u64>,
    /// Whether the driver is to announce itself, and has not said that it does.
    pub(super) announces: bool,
    /// How many times the server has still to announce the card itself. Each host counts its own.
    pub(super) announcements: u8,
    /// Whether the tap is up. Each host has its own.
    pub(super) is_link_up: bool,
}

/// Version of the encoding. It is another whenever a field comes or goes.
const VERSION: u32 = 1;

/// No offloads, because nothing has been negotiated.
const NONE: u64 = u64::MAX;

impl State {
    pub(super) fn new(mac: MacAddress, is_link_up: bool) -> Self {
        Self {
            mac,
            pairs: 1,
            offloads: None,
            announces: false,
            announcements: 0,
            is_link_up,
        }
    }

    pub(super) fn encode(&self, config: &Config) -> Vec<u8> {
        let mut bytes = VERSION.to_le_bytes().to_vec();
        bytes.extend(config.mtu.unwrap_or(0).to_le_bytes());
        bytes.extend(self.mac.bytes());
        bytes.extend(self.pairs.to_le_bytes());
        bytes.extend(self.offloads.unwrap_or(NONE).to_le_bytes());
        bytes.push(self.announces.into());
        bytes
    }

    /// Parses the state of another card, which is to go on with this one's tap.
    ///
    /// # Errors
    ///
    /// If no card with this configuration can have it.
    pub(super) fn decode(bytes: &[u8], config: &Config, is_link_up: bool) -> io::Result<Self> {
        let fields = parse(bytes).ok_or_else(|| invalid("is none of a network card"))?;
        let (mtu, mac, pairs, offloads, announces) = fields;
        if mtu != config.mtu.unwrap_or(0) {
            return Err(invalid(format_args!(
                "has an MTU of {mtu}, and this card one of {}; mtu= sets it (0 is none)",
                config.mtu.unwrap_or(0)
            )));
        }
        let mac = MacAddress::new(mac).ok_or_else(|| invalid("has no MAC address"))?;
        if !(1..=config.pairs).contains(&pairs) {
            return Err(invalid(format_args!("uses {pairs} pairs of queues")));
        }
        let offloads = Some(offloads).filter(|offloads| *offloads != NONE);
        let possible = config.features() & GUEST_OFFLOADS;
        if offloads.is_some_and(|offloads| offloads & !possible != 0) {
            return Err(invalid("has offloads that this card has not"));
        }
        Ok(Self {
            mac,
            pairs,
            offloads,
            announces,
            announcements: 0,
            is_link_up,
        })
    }
}

/// MTU, MAC address, pairs, offloads, and whether the driver is to announce itself.
type Fields = (u16, [u8; 6], u16, u64, bool);

fn parse(bytes: &[u8]) -> Option<Fields> {
    let (version, bytes) = bytes.split_first_chunk()?;
    let (mtu, bytes) = bytes.split_first_chunk()?;
    let (mac, bytes) = bytes.split_first_chunk()?;
    let (pairs, bytes) = bytes.split_first_chunk()?;
    let (offloads, bytes) = bytes.split_first_chunk()?;
    let announces = match bytes {
        [0] => false,
        [1] => true,
        _ => return None,
    };
    let is_known = u32::from_le_bytes(*version) == VERSION;
    is_known.then_some((
        u16::from_le_bytes(*mtu),
        *mac,
        u16::from_le_bytes(*pairs),
        u64::from_le_bytes(*offloads),
        announces,
    ))
}

fn invalid(what: impl fmt::Display) -> io::Error {
    let what = format!("the state that is to be taken over {what}");
    io::Error::new(io::ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: Config = Config {
        pairs: 4,
        queue_size: 256,
        mtu: Some(1500),
        has_uso: false,
    };

    fn state() -> State {
        State {
            pairs: 3,
            offloads: Some(1 << 1 | 1 << 7),
            announces: true,
            ..State::new("52:54:00:12:34:56".parse().unwrap(), true)
        }
    }

    fn decode(bytes: &[u8]) -> Option<State> {
        State::decode(bytes, &CONFIG, true).ok()
    }

    #[test]
    fn a_state_survives() {
        assert_eq!(decode(&state().encode(&CONFIG)), Some(state()));
        let fresh = State::new(state().mac, true);
        assert_eq!(decode(&fresh.encode(&CONFIG)), Some(fresh));
    }

    #[test]
    fn impossible_and_damaged_states_are_refused() {
        let changes: [fn(&mut State); 4] = [
            |state| state.pairs = 0,
            |state| state.pairs = 5,
            |state| state.offloads = Some(1 << 56),
            |state| state.offloads = Some(1),
        ];
        for (number, change) in changes.into_iter().enumerate() {
            let mut state = state();
            change(&mut state);
            assert_eq!(decode(&state.encode(&CONFIG)), None, "{number}");
        }
        let bytes = state().encode(&CONFIG);
        for cut in 0..bytes.len() {
            assert_eq!(decode(&bytes[..cut]), None, "{cut}");
        }
        assert_eq!(decode(&[&bytes[..], &[0]].concat()), None);
        // The version, the MAC address, and whether the driver is to announce itself.
        for (at, value) in [(0, 2), (6, 0x53), (bytes.len() - 1, 2)] {
            let mut bytes = bytes.clone();
            bytes[at] = value;
            assert_eq!(decode(&bytes), None, "{at}");
        }
        let other = Config {
            mtu: Some(9000),
            ..CONFIG
        };
        let error = State::decode(&bytes, &other, true).unwrap_err().to_string();
        assert!(error.contains("1500") && error.contains("9000"));
    }
}
