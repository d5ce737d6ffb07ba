//! What a virtio device is.

use std::io;

use super::queue::VirtQueue;
use super::signals::ConfigSignal;

/// A virtio device: what is behind the transport. The thread that serves the client calls it.
pub trait VirtioDevice {
    /// What the device is.
    fn identity(&self) -> Identity;

    /// The features that the device offers, by their bits. Those of the transport and of the queues, from 24 to 40, are
    /// the transport's to offer.
    fn features(&self) -> u64;

    /// How many entries each queue may have, in the order of the queues: powers of two, up to 32768. There are always as
    /// many, and [`MAX_QUEUES`](super::MAX_QUEUES) at most.
    fn queue_sizes(&self) -> Vec<u16>;

    /// The device's configuration as the driver reads it now. It always has the same length, up to 4096 bytes.
    fn config(&self) -> Vec<u8>;

    /// The driver writes its configuration. The range may be anywhere in those 4096 bytes.
    fn write_config(&mut self, offset: u64, data: &[u8]);

    /// Begins to serve the queues that the driver has enabled. Each is to be looked at as if it had been notified.
    ///
    /// # Errors
    ///
    /// If the device cannot run. It then needs a reset.
    fn activate(&mut self, activation: Activation) -> io::Result<()>;

    /// Finishes what has been taken out of the queues, and gives them back. After this, no thread of the device accesses
    /// memory, interrupts, or waits for a doorbell. A device that is not active gives nothing back.
    fn deactivate(&mut self) -> Vec<VirtQueue>;

    /// Brings the device, which is not active, to the state that it began with.
    fn reset(&mut self);

    /// The device, which is not active, is to stand still: until [`start`](Self::start), it touches nothing outside.
    ///
    /// # Errors
    ///
    /// If it cannot. It then goes on to run.
    fn stop(&mut self) -> io::Result<()>;

    /// The device goes on after [`stop`](Self::stop), perhaps of another device on another host. It is activated after
    /// this, if the driver is ready.
    ///
    /// # Errors
    ///
    /// If it cannot run. It then stays stopped.
    fn start(&mut self) -> io::Result<()>;

    /// Whether the device can migrate. If not, it says so in the log, with the reason.
    fn migrates(&self) -> bool;

    /// The state of the device, which is stopped, without the transport's and the queues'. At most 64 KiB.
    fn save(&self) -> Vec<u8>;

    /// All of what was [saved](Self::save) has been read. Unless it is [started](Self::start) again, the device runs
    /// elsewhere from now on.
    fn saved(&mut self);

    /// Takes over what another device has [saved](Self::save). The device is stopped.
    ///
    /// # Errors
    ///
    /// If `state` is not such a state. It comes from another host and may be anything.
    fn restore(&mut self, state: &[u8]) -> io::Result<()>;
}

/// What a device is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Its number among the types of virtio devices (virtio 1.2, section 5).
    pub kind: u16,
    /// Its PCI class: base class, subclass and programming interface, as in `0x02_00_00` for a network card.
    pub class: u32,
}

/// What a device gets when the driver is ready.
#[derive(Debug)]
pub struct Activation {
    /// The features that the driver has accepted, by their bits.
    pub features: u64,
    /// The queues that the driver has enabled, in the order of their numbers.
    pub queues: Vec<VirtQueue>,
    /// What tells the driver that the configuration has changed.
    pub config: ConfigSignal,
}
