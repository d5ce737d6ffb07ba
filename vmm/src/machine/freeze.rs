//! Holding a machine still, so that its state can be taken out.

use devices::{BackendError, DeviceState, Left, MigrationFlags, Passthrough, TransitionError};

use super::Machine;
use super::state::{MachineState, StateError};
use crate::interrupts::InterruptError;
use crate::pci_host::PciStateError;

/// Why a machine cannot be held still.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FreezeError {
    /// The vCPUs run.
    #[error("the VM is not paused")]
    NotPaused,
    /// A device's state cannot be taken out.
    #[error("{id}: {reason}")]
    Unmigratable {
        /// The device.
        id: String,
        /// Why not.
        reason: &'static str,
    },
    /// A device would not stop, and is better left alone.
    #[error("{id} does not answer; the VM can be saved or moved when it does again")]
    Silent {
        /// The device.
        id: String,
        /// What there is instead of an answer.
        #[source]
        source: BackendError,
    },
    /// A device cannot be left to another process.
    #[error("{id} cannot be handed over now")]
    Leave {
        /// The device.
        id: String,
        /// Why not.
        #[source]
        source: BackendError,
    },
    /// The interrupts cannot be disconnected.
    #[error(transparent)]
    Pci(#[from] PciStateError),
    /// The interrupts of the platform cannot be disconnected.
    #[error("cannot disconnect the platform's interrupts")]
    Interrupts(#[from] InterruptError),
    /// A device does not stop.
    #[error("{id} does not stop")]
    Device {
        /// The device.
        id: String,
        /// Why not.
        #[source]
        source: TransitionError,
    },
}

/// A machine of which nothing moves: no vCPU runs, no interrupt is under way, and all devices are stopped with their
/// state ready to be read, or have been left to another process. When it is dropped, the devices go on here, and the vCPUs
/// stay paused.
#[derive(Debug)]
pub(crate) struct Frozen<'m> {
    machine: &'m Machine,
}

impl Machine {
    /// Says why the state of this machine cannot be taken out, if a device's cannot. Nothing has changed then.
    pub(crate) fn check_migratable(&self) -> Result<(), FreezeError> {
        let devices = self.pci.devices();
        for device in devices {
            if let Some(reason) = why_unmigratable(device) {
                return Err(FreezeError::Unmigratable {
                    id: device.id().to_owned(),
                    reason,
                });
            }
        }
        // One that were told to stop and did not say whether it has would be lost.
        for device in devices {
            device
                .check_answers()
                .map_err(|source| FreezeError::Silent {
                    id: device.id().to_owned(),
                    source,
                })?;
        }
        Ok(())
    }

    /// Holds the machine still. Its vCPUs are paused.
    pub(crate) fn freeze(&self) -> Result<Frozen<'_>, FreezeError> {
        self.check_migratable()?;
        if !self.vcpus.are_paused() {
            return Err(FreezeError::NotPaused);
        }
        // What has been done is undone if the rest fails.
        let frozen = Frozen::of(self);
        self.pci.disconnect_interrupts()?;
        self.interrupts.set_edges_connected(false)?;
        let devices = self.pci.devices();
        // First none of them reaches another, then none does anything.
        for device in devices
            .iter()
            .filter(|device| can(device, MigrationFlags::P2P))
        {
            stop(device, without_p2p(device))?;
        }
        for device in devices {
            stop(device, DeviceState::StopCopy)?;
        }
        Ok(frozen)
    }
}

fn why_unmigratable(device: &Passthrough) -> Option<&'static str> {
    if device.is_lost() {
        return Some("it is lost, and the VM cannot be saved or moved with it");
    }
    device.migration().is_none().then_some(
        "it cannot be saved or moved: its driver or its server has no migration interface of VFIO's version 2",
    )
}

/// Whether a device has something to do with migration that not every one has.
pub(crate) fn can(device: &Passthrough, what: MigrationFlags) -> bool {
    let flags = device.migration().map(devices::Migration::flags);
    flags.is_some_and(|flags| flags.contains(what))
}

/// The state in which a device is as it is, but reaches no other.
fn without_p2p(device: &Passthrough) -> DeviceState {
    let state = device.migration().map(devices::Migration::state);
    match state {
        // What it has given away early stays good.
        Some(Ok(DeviceState::PreCopy)) => DeviceState::PreCopyP2p,
        _ => DeviceState::RunningP2p,
    }
}

fn stop(device: &Passthrough, state: DeviceState) -> Result<(), FreezeError> {
    device.change_state(state).map_err(|source| {
        if !matches!(source.left, Left::FellBack(_)) {
            // It is not any more what the guest thinks it is.
            device.give_up(&source);
        }
        FreezeError::Device {
            id: device.id().to_owned(),
            source,
        }
    })
}

impl<'m> Frozen<'m> {
    /// A machine that is about to be held still: what has been done by then is undone if this is dropped.
    pub(super) fn of(machine: &'m Machine) -> Self {
        Self { machine }
    }

    /// The machine.
    pub(crate) fn machine(&self) -> &Machine {
        self.machine
    }

    /// Leaves the machine as it is: it runs elsewhere.
    pub(crate) fn abandon(self) {
        std::mem::forget(self);
    }

    /// The state of everything but RAM and the devices themselves.
    pub(crate) fn state(&self) -> Result<MachineState, StateError> {
        MachineState::of(self.machine)
    }
}

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        self.machine.thaw();
    }
}

impl Machine {
    /// Has the devices run, and gives them and the guest the doorbells and the interrupts that waited. A device that does
    /// not go on is given up. One that has been left runs, and is this process' from now on.
    pub(crate) fn thaw(&self) {
        for device in self.pci.devices() {
            if device.is_lost() || device.is_left() {
                continue;
            }
            if let Err(error) = device.change_state(DeviceState::Running) {
                device.give_up(&format_args!("it does not go on: {error}"));
            }
        }
        self.pci.resume();
        if let Err(error) = self.interrupts.set_edges_connected(true) {
            log::error!("the serial port and the power button do not interrupt the guest: {error}");
        }
    }
}
