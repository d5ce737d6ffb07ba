//! A VM made of what was saved of another.

use std::fmt;
use std::io;

use super::{Surroundings, Vm, VmError};
use crate::clock::TimeAway;
use crate::config::VmConfig;
use crate::cpu_profile::{self, HostCpu};
use crate::kvm::{self, KvmError};
use crate::machine::state::{MachineMismatch, MachineState, StateError};
use crate::snapshot::{Snapshot, SnapshotError};

/// Why a VM cannot be restored.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RestoreError {
    /// The host has no machine like that.
    #[error("the VM cannot run here: {0}")]
    Mismatch(Mismatches),
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

/// Everything in which this host or the machine that it makes is not what was saved.
#[derive(Debug)]
pub(crate) struct Mismatches {
    cpu: Vec<cpu_profile::Mismatch>,
    machine: Vec<MachineMismatch>,
}

impl fmt::Display for Mismatches {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let cpu = self.cpu.iter().map(ToString::to_string);
        let machine = self.machine.iter().map(ToString::to_string);
        let all: Vec<_> = cpu.chain(machine).collect();
        f.write_str(&all.join("; "))
    }
}

impl Vm {
    /// Makes a VM of a snapshot. `config` is the saved one, but for where devices are on this host. Its devices
    /// stand still until the machine is [thawed](crate::machine::Machine::thaw). `progress` hears of bytes of RAM, and can end it.
    pub(crate) fn restore(
        snapshot: &Snapshot,
        config: &VmConfig,
        surroundings: &Surroundings,
        progress: &(impl Fn(u64) -> io::Result<()> + Sync),
    ) -> Result<Self, RestoreError> {
        let saved = &snapshot.machine;
        check(check_cpu(config, &saved.cpu)?, Vec::new())?;
        let mut vm = Self::assemble(config, Some(&saved.cpu), surroundings)?;
        check(Vec::new(), vm.machine.compare(saved))?;
        snapshot.load_ram(&vm.machine.memory, progress)?;
        let pci = vm.machine.pci.restore(&snapshot.state.pci);
        pci.map_err(StateError::from)?;
        snapshot.load_devices(&vm.machine)?;
        vm.take_platform(snapshot.state.clone(), TimeAway::Skipped)?;
        Ok(vm)
    }

    /// Takes over the state of what is neither RAM nor a device.
    fn take_platform(
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

fn check_cpu(
    config: &VmConfig,
    saved: &cpu_profile::CpuProfile,
) -> Result<Vec<cpu_profile::Mismatch>, VmError> {
    let host = HostCpu::new(&kvm::open()?, config.vcpus);
    let host = host.map_err(|source| KvmError::Step {
        step: "tell what CPUs it offers",
        source,
    })?;
    Ok(saved.compare(&host))
}

fn check(
    cpu: Vec<cpu_profile::Mismatch>,
    machine: Vec<MachineMismatch>,
) -> Result<(), RestoreError> {
    if cpu.is_empty() && machine.is_empty() {
        Ok(())
    } else {
        Err(RestoreError::Mismatch(Mismatches { cpu, machine }))
    }
}
