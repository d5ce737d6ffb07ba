//! The machine: memory, vCPUs, boot, interrupts and buses around the devices that others provide.
//!
//! [`Vm`] is all of it. [`Vmm`] is where one runs, as the command line says or as [`control`] asks.

mod acpi;
pub mod api;
mod bars;
mod boot;
mod bus;
mod chips;
mod clock;
mod config;
mod console;
pub mod control;
mod cpu_profile;
mod cpuid;
mod ending;
mod event_loop;
mod events;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod host_devices;
mod interrupts;
mod kvm;
mod kvm_ext;
mod kvm_vfio;
mod layout;
mod machine;
mod memory;
mod migration;
mod options;
mod pci_host;
mod platform;
pub mod private_socket;
mod saved;
mod servers;
mod slots;
mod snapshot;
mod sparse;
#[cfg(test)]
mod test_machine;
mod vcpu;
mod vcpus;
mod vm;
mod vmm;

pub use config::{
    ConfigError, DiskConfig, HostDeviceConfig, HostDeviceSource, IommufdConfig, MemoryConfig,
    NetConfig, PayloadConfig, SerialConfig, UserDeviceConfig, VmConfig, parse_cpus,
};
pub use ending::Ending;
pub use events::{Events, EventsError};
pub use kvm::only_emulates;
pub use servers::SERVER_READY;
pub use vcpus::Vcpus;
pub use vm::{Vm, VmError};
pub use vmm::{Policy, Vmm, VmmError};
