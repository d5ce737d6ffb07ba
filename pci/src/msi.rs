//! Message signalled interrupts.

/// What a message signalled interrupt writes, and where (PCI Local Bus 3.0, 6.8.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MsiMessage {
    /// The guest physical address that is written.
    pub address: u64,
    /// The value that is written there.
    pub data: u32,
}
