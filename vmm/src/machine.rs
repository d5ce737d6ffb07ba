//! The parts of a VM that the main thread shares with whoever pauses it, takes its state out or moves it.
//!
//! [`Vm`](crate::Vm) runs the guest and outlives every other user of its machine.

use vmm_sys_util::eventfd::EventFd;

use crate::memory::Memory;
use crate::pci_host::PciHost;
use crate::platform::Platform;
use crate::vcpus::Vcpus;

/// A machine whose guest may be running.
#[derive(Debug)]
pub(crate) struct Machine {
    // First the threads, then what they use.
    pub(crate) vcpus: Vcpus,
    pub(crate) pci: PciHost,
    pub(crate) platform: Platform,
    pub(crate) memory: Memory,
    /// Raises the interrupt of the power button.
    pub(crate) power_button: EventFd,
}
