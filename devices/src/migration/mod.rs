//! Taking a device's state out and putting it back: the verbs of VFIO's migration interface (linux/vfio.h, "Device
//! migration v2"), which the kernel's VFIO and vfio-user share.
//!
//! The order of states, and whose turn it is when, is up to whoever migrates the VM. What is here concerns one device.

mod transition;

use std::fmt;
use std::ops::Range;

use vfio_user_client::{DeviceState, MigrationFlags};

pub use self::transition::{Fallback, Left, TransitionError, transition};
use crate::backend::BackendError;

/// A device whose state can be taken out and put back.
///
/// One thread at a time moves a device through its states and its data. What it writes to guest memory may be asked for
/// meanwhile.
pub trait Migration: Send + Sync + fmt::Debug {
    /// How it can migrate; by way of [`DeviceState::StopCopy`] at least.
    fn flags(&self) -> MigrationFlags;

    /// Its state.
    fn state(&self) -> Result<DeviceState, BackendError>;

    /// Brings it into a state, by way of others if need be. An error leaves it anywhere on the way: see [`transition()`].
    fn set_state(&self, state: DeviceState) -> Result<(), BackendError>;

    /// Reads the next of its data: in [`DeviceState::StopCopy`], and while it runs in [`DeviceState::PreCopy`]. After an
    /// error the data is lost.
    fn read(&self, data: &mut [u8]) -> Result<Chunk, BackendError>;

    /// Writes the next of the data of another device, in [`DeviceState::Resuming`]. After an error nothing but a reset
    /// ends that state. That all data was good is said by the next change of state.
    fn write(&self, data: &[u8]) -> Result<(), BackendError>;

    /// About how many bytes would still have to be read if the device was stopped now. vfio-user cannot say.
    fn remaining(&self) -> Option<u64>;

    /// Starts to log what the device writes to these guest physical addresses, and returns how many bytes a bit of the
    /// log stands for, which may differ from `page_size`. An error means that it has no log: all that it can reach
    /// counts as written.
    fn start_dirty(&self, page_size: u64, ranges: &[Range<u64>]) -> Result<u64, BackendError>;

    /// Takes what the device wrote to a range since the last time: a bit for each page of the size that
    /// [`start_dirty`](Self::start_dirty) returned, from the lowest bit of the first word on. The range is one of those,
    /// a whole mapping, since not every server can tell of a part. After an error all of it counts as written.
    fn dirty(&self, range: Range<u64>, page_size: u64) -> Result<Vec<u64>, BackendError>;

    /// Stops logging.
    fn stop_dirty(&self) -> Result<(), BackendError>;
}

/// What a read of a device's data gave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chunk {
    /// How many bytes have been read.
    pub length: usize,
    /// What comes after them.
    pub next: Next,
}

/// What comes after a piece of a device's data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// More, possibly.
    More,
    /// Nothing for now: the device runs, and there may be more later.
    Later,
    /// Nothing: that was all.
    End,
}
