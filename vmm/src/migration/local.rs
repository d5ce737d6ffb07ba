//! A VM that stays on its host: nothing is copied, and its devices run on with servers that do not notice.
//!
//! The conversation is that of any other migration, without the connections for RAM and the devices' state. Descriptors
//! follow the two documents that name them.

use std::io;

use devices::{Descriptors, Standing};
use serde::{Deserialize, Serialize};

use super::destination::ReceiveError;
use super::source::{self, Departed, Downtime, Last, Offer, Paused, SendError};
use super::stream::{Route, Stream};
use super::wire::{self, Kind, MigrationId, WireError};
use crate::control::{Phase, SendRequest, Task};
use crate::machine::Machine;
use crate::machine::handover::{Estate, Inheritance};
use crate::machine::state::StateError;

/// The most descriptors that go along with a VM: more than all devices that fit on the bus have of anything.
const MAX_DESCRIPTORS: u32 = 1 << 17;

/// What comes along with the description of the machine.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct HandedEstate {
    estate: Estate,
    /// How many descriptors follow.
    descriptors: u32,
}

/// What comes along with the state of the platform.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct HandedDevices {
    devices: Vec<Standing>,
    /// How many descriptors follow.
    descriptors: u32,
}

/// Hands the VM over to the destination that has heard who calls.
pub(super) fn hand_over(
    machine: &Machine,
    request: &SendRequest,
    task: &Task,
    route: &Route,
    id: MigrationId,
    control: &mut Stream,
) -> Result<Departed, SendError> {
    let mut descriptors = Descriptors::default();
    let estate = machine.estate(&mut descriptors)?;
    let offer = Offer {
        machine: machine.describe()?,
        connections: 1,
        handed: Some(HandedEstate {
            estate,
            descriptors: count(&descriptors)?,
        }),
    };
    send(control, Kind::Machine, &offer, &descriptors)?;
    drop(descriptors);
    source::await_ready(control)?;

    let mut downtime = Downtime::begin();
    // What follows, whatever goes wrong has the VM go on.
    let paused = Paused::pause(machine)?;
    downtime.has_done("pause");
    task.enter(Phase::StopAndCopy);
    let mut descriptors = Descriptors::default();
    let (frozen, devices) = machine.leave(request.downtime, &mut descriptors)?;
    downtime.has_done("devices");
    let last = Last {
        state: frozen.state()?,
        runs: paused.ran,
        handed: Some(HandedDevices {
            devices,
            descriptors: count(&descriptors)?,
        }),
    };
    downtime.has_done("state");
    send(control, Kind::State, &last, &descriptors)?;
    downtime.has_done("copy");
    source::await_prepared(control)?;
    downtime.has_done("destination");
    let ended = source::commit(control, route, id, task);
    source::conclude(ended, frozen, paused, downtime, task)
}

/// What is handed over to this process, if anything is.
pub(super) fn inheritance(
    control: &mut Stream,
    handed: HandedEstate,
) -> Result<Inheritance, ReceiveError> {
    let descriptors = receive(control, handed.descriptors)?;
    Ok(Inheritance::new(handed.estate, descriptors)?)
}

/// Takes over the devices of a machine that has been made of its inheritance, and returns the state of the rest.
pub(super) fn take_over(control: &mut Stream, machine: &Machine) -> Result<Last, ReceiveError> {
    let document = wire::expect(control, Kind::State)?;
    let mut last: Last = serde_json::from_slice(&document)?;
    let handed = last.handed.take();
    let handed = handed.ok_or_else(|| WireError::Unexpected("no devices".to_owned()))?;
    let descriptors = receive(control, handed.descriptors)?;
    machine.take_over(&handed.devices, &descriptors)?;
    let restored = machine.pci.restore(&last.state.pci);
    restored.map_err(StateError::from)?;
    Ok(last)
}

fn send(
    control: &mut Stream,
    kind: Kind,
    document: &impl Serialize,
    descriptors: &Descriptors,
) -> Result<(), SendError> {
    let document = serde_json::to_vec(document)?;
    let descriptors: Vec<_> = descriptors.iter().collect();
    wire::send(control, kind, &[&document])
        .and_then(|()| control.send_descriptors(&descriptors))
        .map_err(WireError::from)?;
    Ok(())
}

fn receive(control: &mut Stream, count: u32) -> Result<Descriptors, WireError> {
    if count > MAX_DESCRIPTORS || !control.takes_descriptors() {
        return Err(WireError::Unexpected(format!("{count} descriptors")));
    }
    let received = control.receive_descriptors(usize::try_from(count).unwrap_or(usize::MAX))?;
    Ok(Descriptors::from(received))
}

fn count(descriptors: &Descriptors) -> Result<u32, WireError> {
    let count = u32::try_from(descriptors.count()).ok();
    let count = count.filter(|&count| count <= MAX_DESCRIPTORS);
    count.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput).into())
}
