//! The pure PCI core: configuration space, BARs, MSI, MSI-X, INTx, capabilities and the bus.
//!
//! Nothing here knows of a hypervisor, a device's transport or a thread, so all of it is tested against naive models.
//! Section numbers without a title are those of the PCI Express Base Specification, revision 5.0.
#![forbid(unsafe_code)]
#![warn(clippy::indexing_slicing)]

mod address;
mod bar;
mod bus;
mod capability;
mod config;
mod config_ports;
mod ecam;
mod endpoint;
pub mod header;
mod host_bridge;
mod intx;
mod msi;
mod msix;
mod path;
#[cfg(test)]
mod recorder;
mod register;
mod state;
mod window;

pub use address::Bdf;
pub use bar::{BarError, BarKind, BarSpec, Bars, Decoded};
pub use bus::{BusError, Segment};
pub use capability::{
    Capability, CapabilityError, ExtendedCapability, capabilities, extended_capabilities,
    hide_capability, hide_extended_capability, make_integrated_endpoint,
};
pub use config::ConfigSpace;
pub use config_ports::ConfigPorts;
pub use ecam::Ecam;
pub use endpoint::{BarIndex, BarMapper, Cause, Endpoint, Vectors};
pub use header::{Command, Status};
pub use host_bridge::HostBridge;
pub use intx::InterruptPin;
pub use msi::{Msi, MsiMessage};
pub use msix::{Msix, MsixError, MsixLayout};
pub use path::{PathError, TreePath};
pub use state::{BarsState, ByteState, ConfigSpaceState, MsiState, MsixState, StateError};
pub use window::{BarAllocator, Window, WindowError, WindowKind, Windows};
