//! The device's end of a vfio-user connection: a library to write PCI devices with.

#![forbid(unsafe_code)]
#![warn(clippy::indexing_slicing)]

mod config;
mod core;
mod description;
mod device;
mod dirty;
mod doorbell;
mod errno;
mod eventfd;
mod function;
mod link;
mod memory;
mod migration;
mod reader;
mod registers;
mod server;
mod session;
mod socket;

pub use description::{
    Bar, Description, DescriptionError, Doorbell, Ids, MAX_DOORBELLS, MsixTable,
};
pub use device::{Device, Host, Migration, Snapshot, StateStream};
pub use dirty::PageLog;
pub use doorbell::{DoorbellEvent, Doorbells};
pub use function::{InterruptMode, Interrupts};
pub use link::Ended;
pub use memory::{Memory, MemoryError, View};
pub use migration::MAX_SNAPSHOT;
pub use registers::Registers;
pub use server::{Listener, Options, Server, ServerError, Stopper};
