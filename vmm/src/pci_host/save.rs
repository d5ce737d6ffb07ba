//! Saving and restoring the bus and all that is on it, and comparing it with another.

use std::fmt::Display;
use std::sync::Arc;

use devices::{EndpointState, Fingerprint, Mismatch, Passthrough, RestoreError, SaveError};
use pci::{Cause, ConfigSpaceState, StateError};
use serde::{Deserialize, Serialize};

use super::PciHost;

/// A saved bus, without what the devices know themselves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct PciState {
    /// CONFIG_ADDRESS.
    config_address: u32,
    host_bridge: ConfigSpaceState,
    endpoints: Vec<EndpointState>,
}

/// Why the bus cannot be saved, restored or held still.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PciStateError {
    #[error("cannot save {id}")]
    Save {
        id: String,
        #[source]
        source: SaveError,
    },
    #[error("cannot restore {id}")]
    Restore {
        id: String,
        #[source]
        source: RestoreError,
    },
    #[error("cannot restore the host bridge")]
    HostBridge(#[source] StateError),
    #[error("{} saved devices, and there are {here} on the bus", .saved)]
    Count { saved: usize, here: usize },
    #[error("{0} is on the bus, and nothing was saved of it")]
    Missing(String),
    #[error("cannot disconnect the interrupts of {id}")]
    Disconnect {
        id: String,
        #[source]
        source: Cause,
    },
}

/// What is on one bus and not on another, or not the same.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum BusMismatch {
    #[error("{0}: it is not configured here")]
    Missing(String),
    #[error("{0}: it is configured here, and was not there")]
    Extra(String),
    #[error(transparent)]
    Device(#[from] Mismatch),
}

impl PciHost {
    /// The devices, in the order in which they were attached.
    pub(crate) fn devices(&self) -> &[Arc<Passthrough>] {
        &self.devices
    }

    /// What another bus must be like that is to take over this one's state.
    pub(crate) fn fingerprints(&self) -> Vec<Fingerprint> {
        let devices = self.devices.iter();
        devices.map(|device| device.fingerprint().clone()).collect()
    }

    /// What of another bus is not so here.
    pub(crate) fn compare(&self, saved: &[Fingerprint]) -> Vec<BusMismatch> {
        let mut found = Vec::new();
        for saved in saved {
            match self.device(&saved.id) {
                Some(here) => {
                    let mismatches = Fingerprint::compare(saved, here.fingerprint());
                    found.extend(mismatches.into_iter().map(BusMismatch::from));
                }
                None => found.push(BusMismatch::Missing(saved.id.clone())),
            }
        }
        for here in &self.devices {
            if !saved.iter().any(|saved| saved.id == here.id()) {
                found.push(BusMismatch::Extra(here.id().to_owned()));
            }
        }
        found
    }

    /// Takes all devices' interrupts off the interrupt controllers. What the devices signal waits for
    /// [`resume`](Self::resume).
    pub(crate) fn disconnect_interrupts(&self) -> Result<(), PciStateError> {
        for device in &self.devices {
            device
                .disconnect_interrupts()
                .map_err(|source| PciStateError::Disconnect {
                    id: device.id().to_owned(),
                    source,
                })?;
        }
        Ok(())
    }

    /// What is to be saved. No vCPU runs, the interrupts are disconnected, and the devices are stopped.
    pub(crate) fn save(&self) -> Result<PciState, PciStateError> {
        let save = |device: &Arc<Passthrough>| {
            device.save().map_err(|source| PciStateError::Save {
                id: device.id().to_owned(),
                source,
            })
        };
        Ok(PciState {
            config_address: self.ports.save(),
            host_bridge: self.bridge.save(),
            endpoints: self.devices.iter().map(save).collect::<Result<_, _>>()?,
        })
    }

    /// Takes over what was saved. No vCPU runs; every device runs, or its data can be written.
    pub(crate) fn restore(&self, state: &PciState) -> Result<(), PciStateError> {
        if state.endpoints.len() != self.devices.len() {
            return Err(PciStateError::Count {
                saved: state.endpoints.len(),
                here: self.devices.len(),
            });
        }
        self.ports
            .restore(state.config_address)
            .and_then(|()| self.bridge.restore(&state.host_bridge))
            .map_err(PciStateError::HostBridge)?;
        for device in &self.devices {
            let id = || device.id().to_owned();
            let mut states = state.endpoints.iter();
            let state = states.find(|state| state.id == device.id());
            let state = state.ok_or_else(|| PciStateError::Missing(id()))?;
            device
                .restore(state)
                .map_err(|source| PciStateError::Restore { id: id(), source })?;
        }
        Ok(())
    }

    /// Uses those devices again that have been left. The interrupts are as they were.
    pub(crate) fn come_back(&self) {
        let left = self.devices.iter().filter(|device| device.is_left());
        left.for_each(|device| resume(device));
    }

    /// Gives the guest and the devices, which run, what they have missed. A device with which that fails is given up.
    pub(crate) fn resume(&self) {
        self.devices.iter().for_each(|device| resume(device));
    }

    fn device(&self, id: &str) -> Option<&Arc<Passthrough>> {
        self.devices.iter().find(|device| device.id() == id)
    }
}

fn resume(device: &Passthrough) {
    if let Err(error) = device.resume() {
        let reason: &dyn Display = &format_args!("it does not go on: {error}");
        device.give_up(reason);
    }
}

#[cfg(test)]
mod tests;
