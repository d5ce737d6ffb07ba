//! The parts of a VM that the main thread shares with whoever pauses it, takes its state out or moves it.
//!
//! [`Vm`](crate::Vm) runs the guest and outlives every other user of its machine.

pub(crate) mod device_data;
mod freeze;
pub(crate) mod handover;
pub(crate) mod state;

use std::sync::{Arc, OnceLock};

use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::EventFd;

pub(crate) use self::freeze::{FreezeError, Frozen, can};
use crate::config::VmConfig;
use crate::cpu_profile::{CpuProfile, HostCpu};
use crate::cpuid::CommonCpuid;
use crate::interrupts::Interrupts;
use crate::kvm::{self, KvmError};
use crate::memory::Memory;
use crate::pci_host::PciHost;
use crate::platform::Platform;
use crate::servers::Process;
use crate::vcpus::Vcpus;

/// A machine whose guest may be running.
#[derive(Debug)]
pub(crate) struct Machine {
    // First the threads, then what they use.
    pub(crate) vcpus: Vcpus,
    pub(crate) pci: PciHost,
    pub(crate) platform: Platform,
    pub(crate) memory: Memory,
    pub(crate) interrupts: Interrupts,
    /// Raises the interrupt of the power button.
    pub(crate) power_button: EventFd,
    pub(crate) vm: Arc<VmFd>,
    /// What it was made of.
    pub(crate) config: VmConfig,
    pub(crate) cpus: Cpus,
    /// The servers of its built-in devices.
    pub(crate) servers: Vec<Arc<Process>>,
}

/// What the guest has been told of its CPUs.
#[derive(Debug)]
pub(crate) struct Cpus {
    cpuid: CommonCpuid,
    /// Known when it is first asked for, or when it was saved.
    profile: OnceLock<CpuProfile>,
}

impl Cpus {
    /// CPUs that are made with `cpuid`, which is that of a saved profile if there is one.
    pub(crate) fn new(cpuid: CommonCpuid, saved: Option<CpuProfile>) -> Self {
        Self {
            cpuid,
            profile: saved.map(OnceLock::from).unwrap_or_default(),
        }
    }

    /// What a host must offer that is to run the guest.
    fn profile(&self, vcpus: u32) -> Result<&CpuProfile, KvmError> {
        if let Some(profile) = self.profile.get() {
            return Ok(profile);
        }
        let failed = |source| KvmError::Step {
            step: "tell what CPUs it offers",
            source,
        };
        let host = HostCpu::new(&kvm::open()?, vcpus).map_err(failed)?;
        let profile = CpuProfile::new(&self.cpuid, &host);
        let profile = profile.ok_or_else(|| failed(kvm_ioctls::Error::new(libc::E2BIG)))?;
        Ok(self.profile.get_or_init(|| profile))
    }
}
