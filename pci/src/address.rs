//! The address of a function.

use std::fmt;

/// Bus, device and function number: a function's address within its segment, and the requester ID of what it sends
/// (2.2.6.2).
///
/// Its 16 bits are the bus number (15:8), the device number (7:3) and the function number (2:0). Displayed in hex as
/// `bus:device.function`, as in `00:01.0`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Bdf(u16);

impl Bdf {
    /// The function with these numbers; `None` if `device` is above 31 or `function` above 7.
    pub const fn new(bus: u8, device: u8, function: u8) -> Option<Self> {
        if device < 32 && function < 8 {
            Some(Self(u16::from_be_bytes([bus, device << 3 | function])))
        } else {
            None
        }
    }

    /// The function with this requester ID.
    pub const fn from_bits(bits: u16) -> Self {
        Self(bits)
    }

    /// Its requester ID.
    pub const fn bits(self) -> u16 {
        self.0
    }

    /// Its bus number.
    pub const fn bus(self) -> u8 {
        self.0.to_be_bytes()[0]
    }

    /// Its device number, 0 to 31.
    pub const fn device(self) -> u8 {
        self.0.to_be_bytes()[1] >> 3
    }

    /// Its function number, 0 to 7.
    pub const fn function(self) -> u8 {
        self.0.to_be_bytes()[1] & 0x7
    }
}

impl fmt::Display for Bdf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:02x}:{:02x}.{:x}",
            self.bus(),
            self.device(),
            self.function()
        )
    }
}

impl fmt::Debug for Bdf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_packed_as_in_a_requester_id() {
        let bdf = Bdf::new(0x12, 0x1f, 0x7).unwrap();
        assert_eq!(bdf.bits(), 0x12ff);
        assert_eq!((bdf.bus(), bdf.device(), bdf.function()), (0x12, 0x1f, 0x7));
        assert_eq!(Bdf::from_bits(0x12ff), bdf);
    }

    #[test]
    fn numbers_out_of_range_are_refused() {
        assert_eq!(Bdf::new(0, 32, 0), None);
        assert_eq!(Bdf::new(0, 0, 8), None);
    }

    #[test]
    fn displayed_as_lspci_does() {
        assert_eq!(Bdf::new(0, 1, 0).unwrap().to_string(), "00:01.0");
        assert_eq!(format!("{:?}", Bdf::from_bits(0xffff)), "ff:1f.7");
    }
}
