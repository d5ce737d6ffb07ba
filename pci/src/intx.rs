//! Legacy interrupts: pins, and the lines of the root bus that they are wired to.

/// The pin by which a function signals legacy interrupts (7.5.1.1.13).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum InterruptPin {
    /// INTA#, the only one for a device with a single function.
    A = 1,
    /// INTB#.
    B = 2,
    /// INTC#.
    C = 3,
    /// INTD#.
    D = 4,
}

impl InterruptPin {
    /// Every pin, in order.
    pub const ALL: [Self; 4] = [Self::A, Self::B, Self::C, Self::D];

    /// The pin that the Interrupt Pin register tells; `None` for 0, no pin, and for values that are reserved.
    pub const fn from_register(value: u8) -> Option<Self> {
        match value {
            1 => Some(Self::A),
            2 => Some(Self::B),
            3 => Some(Self::C),
            4 => Some(Self::D),
            _ => None,
        }
    }

    /// What the Interrupt Pin register reads, 1 to 4.
    pub const fn register(self) -> u8 {
        self as u8
    }

    /// The line, 0 to 3, that this pin of a device on the root bus is wired to: neighbours start at different lines,
    /// so that their pins A do not all share one (2.2.8.1, table 2-20).
    pub const fn line(self, device: u8) -> u8 {
        (device % 4 + self.register() - 1) % 4
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_register_names_the_pin() {
        for pin in InterruptPin::ALL {
            assert_eq!(InterruptPin::from_register(pin.register()), Some(pin));
        }
        assert_eq!(InterruptPin::from_register(0), None);
        assert_eq!(InterruptPin::from_register(5), None);
    }

    #[test]
    fn pins_rotate_with_the_device_number() {
        assert_eq!(InterruptPin::ALL.map(|pin| pin.line(0)), [0, 1, 2, 3]);
        assert_eq!(InterruptPin::ALL.map(|pin| pin.line(1)), [1, 2, 3, 0]);
        assert_eq!(InterruptPin::ALL.map(|pin| pin.line(31)), [3, 0, 1, 2]);
        assert_eq!(InterruptPin::D.line(u8::MAX), 2);
    }
}
