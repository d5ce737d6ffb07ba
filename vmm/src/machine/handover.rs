//! Handing a machine to another process of this host: what goes as it is, because both have it, and what only moves its
//! owner.
//!
//! The [`Estate`] goes first, while the guest still runs: RAM, the ways to the devices, and the devices' servers. The
//! [`Inheritance`] is what the other process gets of it, to make a machine of. When the guest stands still, the devices are
//! [left](Machine::leave), which run on and do not notice, and [taken over](Machine::take_over) there.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use devices::{Attachment, BackendError, Descriptors, Passthrough, Standing};
use serde::{Deserialize, Serialize};

use super::{FreezeError, Frozen, Machine};
use crate::config::SerialConfig;
use crate::servers::Process;

/// Why a machine cannot be handed over.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HandoverError {
    /// A device cannot.
    #[error("cannot hand {id} over")]
    Device {
        /// The device.
        id: String,
        /// Why not.
        #[source]
        source: BackendError,
    },
    /// There is no descriptor for it.
    #[error("cannot hand guest RAM over (too many open files? see `ulimit -n`)")]
    Ram(#[source] std::io::Error),
    /// What was handed over is not whole.
    #[error("what was handed over is not whole: {0}")]
    Missing(&'static str),
}

/// What goes to another process. Descriptors are numbers in the list that goes with it.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Estate {
    /// The files of guest RAM, from the lowest address on.
    ram: Vec<u32>,
    /// The devices, in the order of their places on the bus.
    devices: Vec<DeviceEstate>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct DeviceEstate {
    attachment: Attachment,
    /// The pidfd of its server, if that was started for this machine.
    server: Option<u32>,
}

/// What another process has handed over.
#[derive(Debug)]
pub(crate) struct Inheritance {
    pub(crate) ram: Vec<OwnedFd>,
    pub(crate) devices: Vec<Inherited>,
    pub(crate) descriptors: Descriptors,
}

/// A device that another process has handed over.
#[derive(Debug)]
pub(crate) struct Inherited {
    pub(crate) attachment: Attachment,
    pub(crate) server: Option<Arc<Process>>,
}

impl Machine {
    /// Says why this machine cannot be handed over, if something of it cannot. Nothing is asked of any device.
    pub(crate) fn check_can_be_left(&self) -> Result<(), FreezeError> {
        if let SerialConfig::Socket(_) = self.config.serial {
            return Err(FreezeError::Unmigratable {
                id: "--serial socket".to_owned(),
                reason: "its socket and its client are tied to this process; try without local, on another host",
            });
        }
        let mut devices = self.pci.devices().iter();
        let why_not = devices.find_map(|device| Some((device, why_tied(device)?)));
        why_not.map_or(Ok(()), |(device, reason)| {
            Err(FreezeError::Unmigratable {
                id: device.id().to_owned(),
                reason,
            })
        })
    }

    /// What another process needs to make a machine that can take over from this one.
    pub(crate) fn estate(&self, descriptors: &mut Descriptors) -> Result<Estate, HandoverError> {
        let mut ram = Vec::new();
        for region in self.memory.regions() {
            let file = region.file.try_clone().map_err(HandoverError::Ram)?;
            ram.push(descriptors.add(&Arc::new(file.into())));
        }
        let mut devices = Vec::new();
        for device in self.pci.devices() {
            let attachment = device.describe(descriptors).map_err(failed(device))?;
            let mut servers = self.servers.iter();
            let server = servers.find(|server| server.id() == device.id());
            devices.push(DeviceEstate {
                attachment,
                server: server.map(|server| descriptors.add(server.pidfd())),
            });
        }
        Ok(Estate { ram, devices })
    }

    /// Holds the machine still, and leaves its devices, which run on, to another process, each when nothing is on its way to
    /// it or from it, for which all together have `limit`. If the result is dropped, the machine goes on with them.
    pub(crate) fn leave(
        &self,
        limit: Duration,
        descriptors: &mut Descriptors,
    ) -> Result<(Frozen<'_>, Vec<Standing>), FreezeError> {
        self.check_can_be_left()?;
        if !self.vcpus.are_paused() {
            return Err(FreezeError::NotPaused);
        }
        let deadline = Instant::now() + limit;
        let mut standings = Vec::new();
        for device in self.pci.devices() {
            let limit = deadline.saturating_duration_since(Instant::now());
            let left = device.leave(limit, descriptors);
            match left {
                Ok(standing) => standings.push(standing),
                Err(source) => {
                    // The others are still connected, and those that have been left are used again.
                    self.pci.come_back();
                    return Err(FreezeError::Leave {
                        id: device.id().to_owned(),
                        source,
                    });
                }
            }
        }
        let frozen = Frozen::of(self);
        self.pci.disconnect_interrupts()?;
        self.interrupts.set_edges_connected(false)?;
        Ok((frozen, standings))
    }

    /// Learns where another process has left the devices of this machine, which has been made of its estate.
    pub(crate) fn take_over(
        &self,
        standings: &[Standing],
        descriptors: &Descriptors,
    ) -> Result<(), HandoverError> {
        let devices = self.pci.devices();
        if devices.len() != standings.len() {
            return Err(HandoverError::Missing("there is another number of devices"));
        }
        for (device, standing) in devices.iter().zip(standings) {
            let taken = device.take_over(standing, descriptors);
            taken.map_err(failed(device))?;
        }
        Ok(())
    }
}

/// Why a device cannot be handed over, if it cannot.
fn why_tied(device: &Passthrough) -> Option<&'static str> {
    if device.is_lost() {
        return Some("it is lost, and the VM cannot be moved with it");
    }
    device.handover().is_none().then_some(
        "it is a device of the host, which VFIO ties to the process that has opened it: the VM cannot be handed over \
         with it; try without local",
    )
}

fn failed(device: &Passthrough) -> impl FnOnce(BackendError) -> HandoverError + '_ {
    |source| HandoverError::Device {
        id: device.id().to_owned(),
        source,
    }
}

impl Inheritance {
    /// What these descriptors are, as the other process says.
    pub(crate) fn new(estate: Estate, descriptors: Descriptors) -> Result<Self, HandoverError> {
        let find = |number| {
            let found = descriptors.find(number);
            found.ok_or(HandoverError::Missing("a descriptor is missing"))
        };
        let mut ram = Vec::new();
        for number in estate.ram {
            ram.push(find(number)?.try_clone().map_err(HandoverError::Ram)?);
        }
        let mut devices = Vec::new();
        for DeviceEstate { attachment, server } in estate.devices {
            let server = server.map(|number| {
                let pidfd = Arc::clone(find(number)?);
                Ok::<_, HandoverError>(Arc::new(Process::inherit(&attachment.id, pidfd)))
            });
            devices.push(Inherited {
                server: server.transpose()?,
                attachment,
            });
        }
        Ok(Self {
            ram,
            devices,
            descriptors,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use serde_json::json;

    use super::*;

    #[test]
    fn what_is_missing_is_not_inherited() {
        let inherit = |ram: &[u32]| {
            let null = || File::open("/dev/null").unwrap().into();
            let descriptors = Descriptors::from(vec![null(), null()]);
            let estate = serde_json::from_value(json!({"ram": ram, "devices": []})).unwrap();
            Inheritance::new(estate, descriptors).map(|inheritance| inheritance.ram.len())
        };
        assert!(matches!(inherit(&[1, 0]), Ok(2)));
        for ram in [[0, 2], [u32::MAX, 0]] {
            assert!(matches!(inherit(&ram), Err(HandoverError::Missing(_))));
        }
        let more = json!({"ram": [], "devices": [], "more": 1});
        assert!(serde_json::from_value::<Estate>(more).is_err());
    }
}
