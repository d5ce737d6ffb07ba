//! What the machine's buses can lead to.

use std::fmt;

/// Something that answers at a range of guest physical addresses, or of I/O ports.
///
/// The bus holds no lock while it calls, and accesses come from all vCPUs at once.
pub trait BusDevice: Send + Sync + fmt::Debug {
    /// Reads `data`, which ends within the range, `offset` bytes from its start.
    fn read(&self, offset: u64, data: &mut [u8]);

    /// Writes `data`, which ends within the range, `offset` bytes from its start.
    fn write(&self, offset: u64, data: &[u8]);
}
