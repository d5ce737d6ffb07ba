//! What the rest of the machine sees of a function on the bus, and what a function needs of the machine.

use std::error::Error;
use std::fmt;

use crate::msi::MsiMessage;

/// The cause of a failed operation whose details only the implementor knows.
pub type Cause = Box<dyn Error + Send + Sync>;

/// A function on the bus that is not a bridge.
///
/// All methods take `&self`, and the bus holds no lock while it calls them: vCPUs call concurrently, and one that
/// waits for a slow device keeps nobody else waiting. A failure that the guest can see is all-ones on a read and
/// nothing on a write, as on a real bus; the endpoint counts and logs it.
pub trait Endpoint: Send + Sync + fmt::Debug {
    /// Reads configuration space. `offset` is below 4096; `data` is 1, 2 or 4 bytes and naturally aligned.
    fn config_read(&self, offset: u16, data: &mut [u8]);

    /// Writes configuration space, under the same guarantees as [`Endpoint::config_read`].
    fn config_write(&self, offset: u16, data: &[u8]);

    /// Reads from a BAR. `offset` is in bytes from its start, and `data` (1 to 8 bytes, not necessarily aligned)
    /// ends within it.
    fn bar_read(&self, bar: BarIndex, offset: u64, data: &mut [u8]);

    /// Writes to a BAR, under the same guarantees as [`Endpoint::bar_read`].
    fn bar_write(&self, bar: BarIndex, offset: u64, data: &[u8]);

    /// Puts the function into its state after power-on: nothing decoded, no interrupts, registers at their defaults.
    /// Called while no vCPU runs.
    fn reset(&self) -> Result<(), Cause>;
}

/// Which of a function's six base address registers, of which a 64-bit BAR is named by its lower half; or the
/// [expansion ROM](Self::ROM)'s, which is much like one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BarIndex(u8);

impl BarIndex {
    /// The six, in order.
    pub const ALL: [Self; 6] = [Self(0), Self(1), Self(2), Self(3), Self(4), Self(5)];

    /// The expansion ROM base address register (7.5.1.2.4). It decodes only while it is enabled by a bit of its own,
    /// and holds nothing that could be written.
    pub const ROM: Self = Self(6);

    /// The six and the ROM.
    pub const ALL_AND_ROM: [Self; 7] = [
        Self(0),
        Self(1),
        Self(2),
        Self(3),
        Self(4),
        Self(5),
        Self::ROM,
    ];

    /// The BAR with this number, if there is one.
    pub const fn new(index: u8) -> Option<Self> {
        if index < 6 { Some(Self(index)) } else { None }
    }

    /// Its number, 0 to 5, or 6 for the ROM.
    pub const fn number(self) -> u8 {
        self.0
    }

    /// Its number, for indexing.
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

impl fmt::Display for BarIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::ROM => write!(f, "the expansion ROM"),
            Self(number) => write!(f, "BAR{number}"),
        }
    }
}

/// Makes a function's BARs answer at guest addresses.
///
/// The endpoint calls it, not the bus, so that it can order mapping against the register write that causes it:
/// *forward, then map* when decoding starts; *unmap, then forward* when it ends.
pub trait BarMapper: Send + Sync + fmt::Debug {
    /// Makes `bar` answer at `address`: a guest physical address, or a port number for an I/O BAR. Fails, leaving the
    /// BAR unmapped, where the address lies outside the host bridge's windows or upon something else.
    fn map(&self, bar: BarIndex, address: u64) -> Result<(), Cause>;

    /// Takes `bar` off the bus. Does nothing if it is not mapped.
    fn unmap(&self, bar: BarIndex);
}

/// The messages that a function's MSI or MSI-X vectors send: one event per vector, which the device signals.
pub trait Vectors: Send + Sync + fmt::Debug {
    /// Sets the message that each of these vectors sends when its event is signalled, for all of them at once;
    /// `None` masks the vector: its event is then left signalled, which is what [`Vectors::pending`] sees, and sent
    /// when the vector is unmasked.
    fn program(&self, changes: &[(u16, Option<MsiMessage>)]) -> Result<(), Cause>;

    /// Whether a masked vector's event has been signalled.
    fn pending(&self, vector: u16) -> bool;
}
