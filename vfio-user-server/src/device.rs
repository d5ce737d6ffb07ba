//! The device: what its author writes.

use std::io;

use crate::doorbell::Doorbells;
use crate::function::Interrupts;
use crate::memory::Memory;

/// A PCI device.
///
/// One thread calls it, the one that serves it. Threads of the device's own use the handles of the [`Host`].
///
/// An error is told to the client as its errno ([`io::Error::from_raw_os_error`]), or one that goes with its
/// [kind](io::ErrorKind). What a guest then reads is all ones.
pub trait Device {
    /// Reads `data.len()` bytes at `offset` of a BAR. The range is in the BAR, and not in the MSI-X table.
    ///
    /// Registers are read with 1, 2, 4 or 8 bytes at a time; memory with as many as a message holds.
    ///
    /// # Errors
    ///
    /// If nothing is there to be read like this.
    fn read(&mut self, bar: usize, offset: u64, data: &mut [u8]) -> io::Result<()>;

    /// Writes `data` at `offset` of a BAR. The range is in the BAR, and neither in the MSI-X table nor a doorbell.
    ///
    /// # Errors
    ///
    /// If nothing is there to be written like this.
    fn write(&mut self, bar: usize, offset: u64, data: &[u8]) -> io::Result<()>;

    /// Brings the device to the state that it began with. The library has reset configuration space and interrupts.
    fn reset(&mut self);

    /// A doorbell has rung, once or several times. They have numbers in the order in which the description has them.
    fn doorbell(&mut self, doorbell: usize) {
        let _ = doorbell;
    }

    /// The mappings of guest memory have changed or are about to: let go of all views of it, also those of other threads.
    fn memory_changed(&mut self) {}

    /// Stops all that the device does by itself: after this, no thread of it accesses memory, interrupts, or reads a
    /// doorbell. Unless it has such threads, there is nothing to do.
    ///
    /// # Errors
    ///
    /// If it cannot stop. It then goes on to run.
    fn stop(&mut self) -> io::Result<()> {
        Ok(())
    }

    /// Goes on with what [`stop`](Self::stop) has stopped. After a migration this is the first call on the new host. The
    /// device should look at all of its queues, as if each doorbell had rung.
    ///
    /// # Errors
    ///
    /// If it cannot run. It then stays stopped.
    fn start(&mut self) -> io::Result<()> {
        Ok(())
    }

    /// How the device migrates, if it does.
    fn migration(&mut self) -> Migration<'_> {
        Migration::None
    }
}

/// How a device migrates. The library saves and restores what it knows itself: configuration space and interrupts.
pub enum Migration<'a> {
    /// Not at all.
    None,
    /// With a state that fits into memory a few times.
    Snapshot(&'a mut dyn Snapshot),
    /// With a state of any size, of which some may be saved while the device runs.
    Stream(&'a mut dyn StateStream),
}

/// A state of up to [`MAX_SNAPSHOT`](crate::MAX_SNAPSHOT) bytes.
pub trait Snapshot {
    /// The state of the device, which is stopped.
    ///
    /// # Errors
    ///
    /// If it cannot be saved.
    fn save(&mut self) -> io::Result<Vec<u8>>;

    /// Takes over a state that another device of this kind has saved. The device is stopped.
    ///
    /// # Errors
    ///
    /// If `state` is not such a state. It comes from another host and may be anything.
    fn restore(&mut self, state: &[u8]) -> io::Result<()>;
}

/// A state that is read and written as if it was a file.
pub trait StateStream {
    /// Reads the state of the device, which is stopped, from `offset` on, and returns how many bytes that were: fewer
    /// than `data` has, if it ends there. Offsets are asked for in order, from 0 on; 0 begins a new migration.
    ///
    /// # Errors
    ///
    /// If it cannot be saved.
    fn read_state(&mut self, offset: u64, data: &mut [u8]) -> io::Result<usize>;

    /// Writes what [`read_state`](Self::read_state) of another device has read, in order, in pieces of any size. The
    /// device is stopped. Offset 0 begins a new migration.
    ///
    /// # Errors
    ///
    /// If it is not part of such a state. It comes from another host and may be anything.
    fn write_state(&mut self, offset: u64, data: &[u8]) -> io::Result<()>;

    /// Takes over the state, of `size` bytes, of which the last has been written.
    ///
    /// # Errors
    ///
    /// If it is not a state that the device can have.
    fn state_written(&mut self, size: u64) -> io::Result<()>;

    /// Whether some state can be saved while the device runs.
    fn has_early_state(&self) -> bool {
        false
    }

    /// Reads, while the device runs, from `offset` on what can be saved early: memory, for example, of which
    /// [`read_state`](Self::read_state) then has what was changed since. Returns how many bytes that were: fewer than
    /// `data` has, if there is nothing more for now. Offsets are asked for in order, from 0 on; 0 begins a new migration.
    ///
    /// # Errors
    ///
    /// If it cannot be saved.
    fn read_early_state(&mut self, offset: u64, data: &mut [u8]) -> io::Result<usize> {
        let _ = (offset, data);
        Ok(0)
    }

    /// Writes what [`read_early_state`](Self::read_early_state) of another device has read, all of it before the first of
    /// [`write_state`](Self::write_state).
    ///
    /// # Errors
    ///
    /// If it is not part of such a state. It comes from another host and may be anything.
    fn write_early_state(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        let _ = (offset, data);
        Err(io::ErrorKind::InvalidData.into())
    }
}

/// The rest of the machine, as the device sees it.
#[derive(Clone, Debug)]
pub struct Host {
    /// Its interrupts.
    pub interrupts: Interrupts,
    /// Guest memory.
    pub memory: Memory,
    /// Its doorbells.
    pub doorbells: Doorbells,
}

impl std::fmt::Debug for Migration<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::None => "None",
            Self::Snapshot(_) => "Snapshot",
            Self::Stream(_) => "Stream",
        })
    }
}
