//! The operations that take a VM's state out into a directory, and make a VM of what is there.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::operations::Task;
use super::progress::Phase;
use super::request::{DevicePlaces, RestoreRequest, SnapshotRequest};
use super::{Control, ControlError};
use crate::config::{HostDeviceSource, VmConfig};
use crate::machine::Machine;
use crate::snapshot::{self, Snapshot};
use crate::vm::Vm;

/// How long the vCPUs may take to stand still: longer than the longest access to a device.
const PAUSE: Duration = Duration::from_secs(30);

/// Writes the state of a VM that has been paused.
pub(super) fn save(
    machine: &Machine,
    request: &SnapshotRequest,
    task: &Task,
) -> Result<(), ControlError> {
    let failed = |error| ControlError::failed("the VM cannot be saved", error);
    wait_paused(machine, task)?;
    task.check()?;
    task.enter(Phase::StopAndCopy);
    let progress = follow(task, machine.memory.size());
    snapshot::save(machine, &request.directory, &progress)
        .or_else(|error| task.check().and(Err(failed(error))))
}

/// Makes a VM of a snapshot, and has the main thread run it.
pub(super) fn restore(
    control: &Control,
    request: &RestoreRequest,
    task: &Task,
) -> Result<(), ControlError> {
    let failed = |source: pci::Cause| ControlError::failed("the VM cannot be restored", source);
    let snapshot = Snapshot::open(&request.directory).map_err(|error| failed(error.into()))?;
    let mut config = snapshot.machine.config.clone();
    config.memory.prefault |= request.prefault;
    relocate(&mut config, &request.devices)?;
    task.check()?;
    task.enter(Phase::StopAndCopy);
    let progress = follow(task, config.memory.size);
    let vm = Vm::restore(&snapshot, &config, control.surroundings(), &progress)
        .or_else(|error| task.check().and(Err(failed(error.into()))))?;
    task.check()?;
    let machine = vm.machine();
    machine.thaw();
    control.adopt(vm, Arc::new(config), request.resume)?;
    if request.resume {
        Ok(())
    } else {
        wait_paused(&machine, task)
    }
}

fn wait_paused(machine: &Machine, task: &Task) -> Result<(), ControlError> {
    let deadline = Instant::now() + PAUSE;
    while !machine
        .vcpus
        .wait_paused(deadline.min(Instant::now() + Duration::from_millis(100)))
    {
        task.check()?;
        if Instant::now() >= deadline {
            let error = "a vCPU does not come back from the guest or from a device";
            return Err(ControlError::failed("the VM is not paused", error));
        }
    }
    Ok(())
}

/// Tells of the bytes of RAM that have been copied, out of so many.
fn follow(task: &Task, bytes: u64) -> impl Fn(u64) -> io::Result<()> + Sync + '_ {
    task.update(|progress| {
        progress.memory_bytes = bytes;
        progress.remaining_bytes = bytes;
    });
    move |copied| {
        if task.cancel().is_asked() {
            return Err(io::ErrorKind::Interrupted.into());
        }
        task.update(|progress| {
            progress.copied_bytes += copied;
            progress.remaining_bytes = progress.remaining_bytes.saturating_sub(copied);
        });
        Ok(())
    }
}

/// Has devices be where they are on this host.
pub(super) fn relocate(config: &mut VmConfig, places: &DevicePlaces) -> Result<(), ControlError> {
    for (id, place) in places {
        let user = config
            .user_devices
            .iter_mut()
            .find(|device| device.id == *id);
        let host = config.devices.iter_mut().find(|device| device.id == *id);
        let disk = config.disks.iter_mut().find(|disk| disk.id == *id);
        let net = config.nets.iter_mut().find(|net| net.id == *id);
        match (user, host, disk, net) {
            (Some(user), ..) => user.socket.clone_from(place),
            (_, Some(host), ..) => {
                host.source = HostDeviceSource::Path(place.to_string_lossy().into_owned());
            }
            (.., Some(disk), _) => disk.path.clone_from(place),
            (.., Some(net)) => net.tap = Some(place.to_string_lossy().into_owned()),
            _ => {
                return Err(ControlError::Invalid(format!(
                    "devices: the VM has no device `{id}`"
                )));
            }
        }
    }
    Ok(())
}
