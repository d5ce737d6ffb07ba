//! The pure PCI core: configuration space, BARs, MSI, MSI-X, INTx, capabilities and the bus.
//!
//! Nothing here knows of a hypervisor, a device's transport or a thread, so all of it is tested against naive models.
#![forbid(unsafe_code)]

mod endpoint;
mod msi;

pub use endpoint::{BarIndex, BarMapper, Cause, Endpoint, Vectors};
pub use msi::MsiMessage;
