//! What is saved of a machine: what there has to be where it is restored, and the state of what is not RAM and not a
//! device's own.

use std::ops::Range;

use devices::{Fingerprint, Serial, SerialError, SerialState};
use serde::{Deserialize, Serialize};

use super::Machine;
use crate::chips::{ChipsError, ChipsState};
use crate::clock::{ClockError, ClockState};
use crate::config::VmConfig;
use crate::cpu_profile::CpuProfile;
use crate::interrupts::InterruptError;
use crate::kvm::KvmError;
use crate::pci_host::{BusMismatch, PciState, PciStateError};
use crate::vcpu::{VcpuError, VcpuState};

/// The version of these types. A program reads its own and the one before.
pub(crate) const VERSION: u32 = 1;

/// What a machine is like. Before anything else is restored, the one that is made for it is compared with this.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Description {
    /// [`VERSION`]
    pub(crate) version: u32,
    pub(crate) config: VmConfig,
    pub(crate) cpu: CpuProfile,
    /// The guest physical addresses of RAM.
    pub(crate) ram: Vec<Range<u64>>,
    pub(crate) devices: Vec<Fingerprint>,
}

/// The state of the platform.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct MachineState {
    pub(crate) vcpus: Vec<VcpuState>,
    pub(crate) chips: ChipsState,
    pub(crate) clock: ClockState,
    pub(crate) pci: PciState,
    pub(crate) serial: Option<SerialState>,
    /// The GSIs of the platform's edge-triggered interrupts that were signalled and not raised.
    pub(crate) signalled: Vec<u32>,
}

/// Why the state of a machine cannot be taken out or put back.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StateError {
    /// KVM does not say what its CPUs are like.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// That of a vCPU.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    /// That of the interrupt controllers.
    #[error(transparent)]
    Chips(#[from] ChipsError),
    /// That of the guest's clock.
    #[error(transparent)]
    Clock(#[from] ClockError),
    /// That of the PCI bus.
    #[error(transparent)]
    Pci(#[from] PciStateError),
    /// That of the platform's interrupts.
    #[error("cannot raise the platform's interrupts")]
    Interrupts(#[from] InterruptError),
    /// That of the serial port.
    #[error(transparent)]
    Serial(#[from] SerialError),
    /// There are fewer or more of something.
    #[error("{what}: {saved} were saved, and there are {here}")]
    Count {
        /// What there is another number of.
        what: &'static str,
        /// How many were saved.
        saved: usize,
        /// How many there are here.
        here: usize,
    },
}

/// In what a machine is not like the one that was described.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum MachineMismatch {
    /// RAM is elsewhere.
    #[error("guest RAM is at {here:x?} here, and was at {saved:x?}")]
    Ram {
        /// Where it was.
        saved: Vec<Range<u64>>,
        /// Where it is here.
        here: Vec<Range<u64>>,
    },
    /// A device is another, or missing.
    #[error(transparent)]
    Bus(#[from] BusMismatch),
}

impl Machine {
    /// What a machine must be like that is to take over this one's state.
    pub(crate) fn describe(&self) -> Result<Description, StateError> {
        Ok(Description {
            version: VERSION,
            config: self.config.clone(),
            cpu: self.cpus.profile(self.config.vcpus)?.clone(),
            ram: self.ram(),
            devices: self.pci.fingerprints(),
        })
    }

    fn ram(&self) -> Vec<Range<u64>> {
        self.memory.regions().map(|region| region.range).collect()
    }

    /// In what this machine is not like the one that was described. (Its CPUs are, since it was made with them.)
    pub(crate) fn compare(&self, saved: &Description) -> Vec<MachineMismatch> {
        let mut found = Vec::new();
        let here = self.ram();
        if saved.ram != here {
            found.push(MachineMismatch::Ram {
                saved: saved.ram.clone(),
                here,
            });
        }
        let bus = self.pci.compare(&saved.devices);
        found.extend(bus.into_iter().map(MachineMismatch::from));
        found
    }
}

impl MachineState {
    /// Takes the state out of a machine of which nothing moves.
    pub(super) fn of(machine: &Machine) -> Result<Self, StateError> {
        let vcpus = machine.vcpus.save()?;
        Ok(Self {
            // The clock comes after the counters that are set by it.
            clock: ClockState::save(&machine.vm)?,
            chips: ChipsState::save(&machine.vm)?,
            pci: machine.pci.save()?,
            serial: machine.platform.serial().map(Serial::save),
            signalled: machine.interrupts.signalled_edges(),
            vcpus,
        })
    }
}
