//! What the user of a connection decides about it.

use std::time::Duration;

/// How a connection behaves.
#[derive(Clone, Debug)]
pub struct Options {
    /// How long each kind of call may take.
    pub deadlines: Deadlines,
    /// Most commands that are on their way at a time, from 1 to 64. Commands whose deadline has passed count until the
    /// server answers them.
    pub max_outstanding: usize,
    /// Whether to ask for a socket of its own for the device's memory accesses. Without one, calls are slower: see
    /// [`Client`](crate::Client).
    pub twin_socket: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            deadlines: Deadlines::default(),
            max_outstanding: 64,
            twin_socket: true,
        }
    }
}

/// How long each kind of call may take, from its beginning to its end.
#[derive(Clone, Debug)]
pub struct Deadlines {
    /// Connecting and agreeing on a version, each. A server that already has a client lets others wait here.
    pub handshake: Duration,
    /// Reading and writing regions, each message. A vCPU waits for this.
    pub region_io: Duration,
    /// Asking what the device is, and wiring its interrupts.
    pub control: Duration,
    /// Resetting the device, for which the specification sets no limit.
    pub reset: Duration,
    /// Mapping and unmapping guest memory, for which the server may have to quiesce the device.
    pub dma_map: Duration,
    /// Changing the migration state, migration data and DMA logging.
    pub migration: Duration,
}

impl Default for Deadlines {
    fn default() -> Self {
        Self {
            handshake: Duration::from_secs(5),
            region_io: Duration::from_secs(2),
            control: Duration::from_secs(5),
            reset: Duration::from_secs(30),
            dma_map: Duration::from_secs(30),
            migration: Duration::from_secs(60),
        }
    }
}
