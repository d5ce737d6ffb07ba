//! The operations that move a VM from one VMM to another.

use std::sync::Arc;

use super::operations::Task;
use super::progress::Phase;
use super::request::{ReceiveRequest, SendRequest};
use super::snapshots::relocate;
use super::{Control, ControlError};
use crate::clock::TimeAway;
use crate::migration::{Arrival, Departed, ReceiveError, Reception, source};
use crate::vm::{Origin, Vm};

/// Sends the VM. If it arrives, there is none here any more.
pub(super) fn send(
    control: &Control,
    request: &SendRequest,
    task: &Task,
) -> Result<(), ControlError> {
    let machine = control.machine()?;
    match source::send(&machine, request, task) {
        Ok(Departed::Gone) => {
            control.depart();
            Ok(())
        }
        Ok(Departed::Abandoned) => Err(ControlError::Ending),
        Err(error) => {
            task.check()?;
            Err(ControlError::failed("the VM does not move", error))
        }
    }
}

/// Waits for a VM, and takes it.
pub(super) fn receive(
    control: &Control,
    request: &ReceiveRequest,
    task: &Task,
) -> Result<(), ControlError> {
    let failed = |error| {
        task.check()
            .and_then(|()| Err(ControlError::failed("no VM has come", error)))
    };
    // Whoever waits at the same place for questions about an older migration gives way.
    control.close_reception();
    let record = control.record().clone();
    let opened = Reception::open(request, record.clone());
    let reception = match opened {
        Ok(reception) => Arc::new(reception),
        Err(error) => return failed(ReceiveError::from(error)),
    };
    task.enter(Phase::Listening);
    let mut arrival = match Arrival::wait(&reception, &record, task) {
        Ok(arrival) => arrival,
        Err(error) => return failed(error),
    };
    let (taken, source_knows) = match take(control, request, task, &mut arrival) {
        Ok(()) => (Ok(()), arrival.say_committed()),
        Err(error) => {
            let knows = arrival.refuse(&error);
            (failed(error), knows)
        }
    };
    if !source_knows {
        control.keep_reception(reception.clone());
    }
    taken
}

fn take(
    control: &Control,
    request: &ReceiveRequest,
    task: &Task,
    arrival: &mut Arrival<'_>,
) -> Result<(), ReceiveError> {
    task.enter(Phase::Preparing);
    let offer = arrival.offer()?;
    let mut config = offer.machine.config.clone();
    relocate(&mut config, &request.devices).map_err(ReceiveError::Adopt)?;
    let inheritance = arrival.inheritance(offer.handed)?;
    let is_handed = inheritance.is_some();
    if is_handed && !request.devices.is_empty() {
        let what = "devices: the VM is handed over, and its devices stay where they are".to_owned();
        return Err(ReceiveError::Adopt(ControlError::Invalid(what)));
    }
    let origin = |cpus| match inheritance {
        Some(inheritance) => Origin::Handed(cpus, inheritance),
        None => Origin::Elsewhere(cpus),
    };
    let mut vm = Vm::like(&offer.machine, &config, origin, control.surroundings())?;
    let machine = vm.machine();
    task.enter(Phase::Precopy);
    let last = if is_handed {
        arrival.take_over(&machine)?
    } else {
        arrival.take_in(&machine, offer.connections)?
    };
    task.enter(Phase::Committing);
    vm.take_platform(last.state, TimeAway::Counted)?;
    // All that could fail is done before the source hears that nothing can.
    let adopted = control.adopt(vm, Arc::new(config), false);
    adopted.map_err(ReceiveError::Adopt)?;
    if arrival.commit() {
        machine.thaw();
        if last.runs {
            machine.vcpus.resume();
        }
        Ok(())
    } else {
        // The main thread has the machine, and is to be the last.
        drop(machine);
        control.discard();
        Err(ReceiveError::Refused)
    }
}
