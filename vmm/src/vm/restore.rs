//! A VM made of what was saved of another.

use std::io;

use super::{Origin, Surroundings, Vm, VmError};
use crate::clock::TimeAway;
use crate::config::{ConfigError, VmConfig};
use crate::cpu_profile::{self, CpuProfile, HostCpu};
use crate::kvm::{self, KvmError};
use crate::machine::state::{Description, MachineState, StateError};
use crate::snapshot::{Snapshot, SnapshotError};

/// Why a VM cannot be restored.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RestoreError {
    /// Nobody has such a machine.
    #[error("the saved VM cannot be")]
    Config(#[from] ConfigError),
    /// This host, or the machine that it makes, is not what was saved in all this.
    #[error("the VM cannot run here: {0}")]
    Mismatch(String),
    /// It cannot be made.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// The snapshot is none.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// The machine does not take the state.
    #[error(transparent)]
    State(#[from] StateError),
}

impl Vm {
    /// Makes a VM of a snapshot. `config` is the saved one, but for where devices are on this host. Its devices stand
    /// still until the machine is [thawed](crate::machine::Machine::thaw). `progress` is as that of a snapshot.
    pub(crate) fn restore(
        snapshot: &Snapshot,
        config: &VmConfig,
        surroundings: &Surroundings,
        progress: &(impl Fn(u64) -> io::Result<()> + Sync),
    ) -> Result<Self, RestoreError> {
        let mut vm = Self::like(&snapshot.machine, config, Origin::Saved, surroundings)?;
        snapshot.load_ram(&vm.machine.memory, progress)?;
        let pci = vm.machine.pci.restore(&snapshot.state.pci);
        pci.map_err(StateError::from)?;
        snapshot.load_devices(&vm.machine, progress)?;
        vm.take_platform(snapshot.state.clone(), TimeAway::Skipped)?;
        Ok(vm)
    }

    /// Makes a VM like one that was described, which takes over the state of that one. Its devices run.
    pub(crate) fn like(
        saved: &Description,
        config: &VmConfig,
        origin: impl FnOnce(CpuProfile) -> Origin,
        surroundings: &Surroundings,
    ) -> Result<Self, RestoreError> {
        config.validate()?;
        check_memory(config.memory.size)?;
        expect_none(&compare_cpu(config, &saved.cpu)?)?;
        let vm = Self::assemble(config, origin(saved.cpu.clone()), surroundings)?;
        expect_none(&vm.machine.compare(saved))?;
        Ok(vm)
    }

    /// Takes over the state of what is neither RAM nor a device.
    pub(crate) fn take_platform(
        &mut self,
        mut state: MachineState,
        time_away: TimeAway,
    ) -> Result<(), StateError> {
        if state.vcpus.len() != self.stopped.len() {
            return Err(StateError::Count {
                what: "vCPUs",
                saved: state.vcpus.len(),
                here: self.stopped.len(),
            });
        }
        let vm = &self.machine.vm;
        state.clock.restore(vm, time_away, &mut state.vcpus)?;
        for (vcpu, state) in self.stopped.iter_mut().zip(&state.vcpus) {
            vcpu.restore(state)?;
        }
        // What these have still to deliver goes to the vCPUs at once.
        state.chips.restore(vm)?;
        self.machine.interrupts.signal_edges(&state.signalled)?;
        match (self.machine.platform.serial(), &state.serial) {
            (Some(serial), Some(state)) => serial.restore(state)?,
            (None, None) => {}
            (here, saved) => {
                return Err(StateError::Count {
                    what: "serial ports",
                    saved: saved.iter().count(),
                    here: here.iter().count(),
                });
            }
        }
        Ok(())
    }
}

/// Whether this host could have so much RAM for a guest, in bytes. What is said of another VM may be wrong, and what is made
/// for it takes memory before the first byte of RAM is there.
fn check_memory(size: u64) -> Result<(), RestoreError> {
    let host = rustix::system::sysinfo();
    let unit = u64::from(host.mem_unit);
    let available = host
        .totalram
        .saturating_add(host.totalswap)
        .saturating_mul(unit);
    if size > available {
        let what =
            format!("it has {size} bytes of RAM, and this host {available}, with its swap space");
        return Err(RestoreError::Mismatch(what));
    }
    Ok(())
}

/// In what this host's CPUs are less than the saved VM's.
fn compare_cpu(
    config: &VmConfig,
    saved: &CpuProfile,
) -> Result<Vec<cpu_profile::Mismatch>, VmError> {
    let host = HostCpu::new(&kvm::open()?, config.vcpus);
    let host = host.map_err(|source| KvmError::Step {
        step: "tell what CPUs it offers",
        source,
    })?;
    Ok(saved.compare(&host))
}

/// An error that has all of them, if there are any.
fn expect_none(mismatches: &[impl ToString]) -> Result<(), RestoreError> {
    if mismatches.is_empty() {
        return Ok(());
    }
    let all: Vec<_> = mismatches.iter().map(ToString::to_string).collect();
    Err(RestoreError::Mismatch(all.join("; ")))
}
