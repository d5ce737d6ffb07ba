//! The VMM's end of a vfio-user connection.
//!
//! A [`Client`] speaks to the server of one device. It knows the whole protocol and nothing of PCI, KVM or guest
//! memory: the device's own memory accesses go through [`GuestDma`], a trait that the VMM implements. The server is not
//! trusted. Whatever it sends, or does not, ends in a [`ConnError`] at the latest when the deadline of that kind of call
//! comes ([`Deadlines`]), and allocates nothing but what the caller asked for.
//!
//! Any number of threads may call at once. Each sends its command by itself; one of those who wait reads the socket and
//! hands the others their replies, so a call costs no switch to another thread.
//!
//! ```no_run
//! # use std::{path::Path, sync::Arc};
//! use vfio_user_client::{Client, ConnError, DmaError, GuestDma, Options};
//!
//! /// A VMM that has no memory for the device.
//! struct NoMemory;
//!
//! impl GuestDma for NoMemory {
//!     fn read(&self, _address: u64, _data: &mut [u8]) -> Result<(), DmaError> {
//!         Err(DmaError)
//!     }
//!
//!     fn write(&self, _address: u64, _data: &[u8]) -> Result<(), DmaError> {
//!         Err(DmaError)
//!     }
//! }
//!
//! # fn main() -> Result<(), ConnError> {
//! let client = Client::connect(Path::new("/run/device"), Arc::new(NoMemory), &Options::default())?;
//! let mut register = [0; 4];
//! client.region_read(0, 0x10, &mut register)?;
//! # Ok(())
//! # }
//! ```

#![forbid(unsafe_code)]
#![warn(clippy::indexing_slicing)]

mod calls;
mod client;
mod connection;
mod counters;
mod device;
mod dma;
mod error;
mod handover;
mod irqs;
mod maps;
mod migration;
mod options;
mod reader;
mod regions;
mod setup;
mod socket;
mod twin;
mod watch;

pub use client::Client;
pub use connection::State;
pub use counters::{Counters, Histogram};
pub use device::{DeviceInfo, IoEvent, IrqInfo, MappedArea, RegionInfo};
pub use dma::{DmaError, GuestDma};
pub use error::{ConnError, Loss};
pub use handover::{Connected, Descriptors, Standing};
pub use irqs::{IrqAction, Irqs};
pub use maps::DmaAccess;
pub use options::{Deadlines, Options};
pub use regions::RegionWrite;
pub use setup::Setup;

pub use vfio_user_protocol::{
    Command, DeviceState, Limits, LoggingRange, MigrationFlags, ProtocolError,
};
