//! MAC addresses.

use std::fmt;
use std::str::FromStr;

use rustix::rand::{GetRandomFlags, getrandom};
use thiserror::Error;

/// The MAC address of a network card: one that a card can have, so neither a multicast address nor all zeroes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MacAddress([u8; 6]);

/// Why a text is no MAC address of a card.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum MacError {
    /// It is something else.
    #[error("{0:?} is no MAC address, which looks like 52:54:00:12:34:56")]
    Syntax(String),
    /// No card can have it.
    #[error(
        "{0} is a multicast address or none at all; that of a card has an even first byte, as in 52:54:00:12:34:56"
    )]
    NotACards(String),
}

impl MacAddress {
    /// The address with these bytes. `None` if no card can have it.
    pub fn new(bytes: [u8; 6]) -> Option<Self> {
        let [first, ..] = bytes;
        // The lowest bit of the first byte is that of groups (IEEE 802, 8.2).
        let is_cards = first & 1 == 0 && bytes != [0; 6];
        is_cards.then_some(Self(bytes))
    }

    /// Its bytes, in the order in which they are sent.
    pub fn bytes(self) -> [u8; 6] {
        self.0
    }

    /// An address by chance, of those that belong to no maker.
    pub(super) fn random() -> std::io::Result<Self> {
        let mut bytes = [0; 6];
        getrandom(&mut bytes, GetRandomFlags::empty())?;
        let [first, rest @ ..] = bytes;
        let [b, c, d, e, f] = rest;
        // Locally administered, and not of a group (IEEE 802, 8.4).
        Ok(Self([first & !1 | 2, b, c, d, e, f]))
    }
}

impl FromStr for MacAddress {
    type Err = MacError;

    fn from_str(text: &str) -> Result<Self, MacError> {
        let byte = |digits: &str| {
            let is_byte =
                digits.len() == 2 && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
            is_byte
                .then(|| u8::from_str_radix(digits, 16).ok())
                .flatten()
        };
        let bytes: Option<Vec<u8>> = text.split(':').map(byte).collect();
        let bytes = bytes.and_then(|bytes| <[u8; 6]>::try_from(bytes).ok());
        let bytes = bytes.ok_or_else(|| MacError::Syntax(text.to_owned()))?;
        Self::new(bytes).ok_or_else(|| MacError::NotACards(text.to_owned()))
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_and_written_alike() {
        let text = "52:54:00:12:AB:ff";
        let address: MacAddress = text.parse().unwrap();
        assert_eq!(address.bytes(), [0x52, 0x54, 0, 0x12, 0xab, 0xff]);
        assert_eq!(address.to_string(), text.to_lowercase());
        let random = MacAddress::random().unwrap();
        assert_eq!(random.to_string().parse(), Ok(random));
    }

    #[test]
    fn what_no_card_has_is_refused() {
        for text in [
            "",
            "52:54:00:12:34",
            "52:54:00:12:34:56:78",
            "52:54:0:12:34:56",
            "+2:54:00:12:34:56",
        ] {
            let refused = text.parse::<MacAddress>();
            assert_eq!(refused, Err(MacError::Syntax(text.to_owned())));
        }
        for text in [
            "01:00:5e:00:00:01",
            "ff:ff:ff:ff:ff:ff",
            "00:00:00:00:00:00",
        ] {
            let refused = text.parse::<MacAddress>();
            assert_eq!(refused, Err(MacError::NotACards(text.to_owned())));
        }
    }
}
