//! The control of a VMM: what is known of it and what can be asked of it, from whichever thread.
//!
//! [`Control`] is a handle to be cloned at will. It never waits for a device, a peer or the guest: what takes time is done
//! by the main thread, which owns the VM, or by an [operation](Operation) on a thread of its own, and whoever asked gets
//! a [`Pending`] outcome. Its locks are held for moments only.

mod commands;
mod counters;
mod error;
mod migrations;
mod operations;
mod progress;
mod request;
mod snapshots;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

pub use self::commands::Pending;
pub(crate) use self::commands::{Command, Commands, Reply, Request};
pub use self::counters::Counters;
pub use self::error::ControlError;
use self::operations::Operations;
pub(crate) use self::operations::{Cancel, Order, Task};
pub use self::progress::{DeviceProgress, MigrationProgress, OperationKind, Phase};
pub use self::request::{
    DevicePlaces, MigrationUrl, Operation, ReceiveRequest, Resolution, RestoreRequest, SendRequest,
    SnapshotRequest, TimeoutStrategy, snapshot_directory,
};
use crate::config::VmConfig;
use crate::events::Events;
use crate::machine::Machine;
use crate::migration::{Reception, Record};
use crate::vcpus::RunState;
use crate::vm::{Surroundings, Vm};

/// A handle to a VMM.
#[derive(Debug, Clone)]
pub struct Control(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    vm: Mutex<Slot>,
    commands: Commands,
    operations: Operations,
    surroundings: Surroundings,
    /// What has become of VMs that were sent here.
    record: Arc<Record>,
    /// Where the source of such a VM may ask.
    reception: Mutex<Option<Arc<Reception>>>,
}

/// The place of the one VM that a VMM has at a time.
#[derive(Debug, Default)]
struct Slot {
    config: Option<Arc<VmConfig>>,
    /// Is there while the VM runs. Nobody takes it out of here except the operations, which end before it does.
    machine: Option<Arc<Machine>>,
    /// Whether the main thread is putting it back into its state at power-on.
    is_resetting: bool,
}

/// What a VM does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VmState {
    /// It has been described, and does not run.
    Created,
    /// Its vCPUs run, or one of them has not stopped yet.
    Running,
    /// Its vCPUs stand still.
    Paused,
}

impl VmState {
    fn name(self) -> &'static str {
        match self {
            Self::Created => "not running",
            Self::Running => "running",
            Self::Paused => "paused",
        }
    }
}

/// What is known of a VM.
#[derive(Debug, Clone)]
pub struct VmInfo {
    /// What it is to be.
    pub config: Arc<VmConfig>,
    /// What it does.
    pub state: VmState,
    /// Where its devices are on the bus, by their ids.
    pub devices: BTreeMap<String, pci::Bdf>,
}

impl Control {
    pub(crate) fn new(surroundings: Surroundings) -> Self {
        Self(Arc::new(Shared {
            vm: Mutex::default(),
            commands: Commands::new(surroundings.endings.clone()),
            operations: Operations::default(),
            surroundings,
            record: Arc::default(),
            reception: Mutex::default(),
        }))
    }

    /// What is known of the VM.
    pub fn info(&self) -> Result<VmInfo, ControlError> {
        let slot = self.slot();
        let config = slot.config.clone().ok_or(ControlError::NoVm)?;
        let devices = slot.machine.as_ref();
        let devices = devices.map(|machine| machine.pci.places().clone());
        Ok(VmInfo {
            config,
            state: slot.state(),
            devices: devices.unwrap_or_default(),
        })
    }

    /// What has been counted so far.
    pub fn counters(&self) -> Result<Counters, ControlError> {
        let mut counters = {
            let slot = self.slot();
            counters::of_machine(slot.running()?)
        };
        if let Ok(progress) = self.0.operations.progress() {
            counters.insert("_migration".to_owned(), progress.counters());
        }
        Ok(counters)
    }

    /// Says what the VM is to be. It is made when it is booted.
    pub fn create(&self, config: VmConfig) -> Result<(), ControlError> {
        config
            .validate()
            .map_err(|error| ControlError::failed("this VM cannot be", error))?;
        let mut slot = self.slot();
        self.expect_no_operation()?;
        if slot.config.is_some() {
            return Err(ControlError::HasVm);
        }
        slot.config = Some(Arc::new(config));
        self.events().tell("vm", "created", &[]);
        Ok(())
    }

    /// Asks the vCPUs to stop. They have when [the VM's state](Self::info) is `Paused`.
    pub fn pause(&self) -> Result<(), ControlError> {
        let vcpus = {
            let slot = self.slot();
            let machine = slot.running()?;
            self.expect_no_operation()?;
            if machine.vcpus.run_state() != RunState::Running {
                return Err(slot.wrong("running"));
            }
            machine.vcpus.pause();
            machine.vcpus.clone()
        };
        self.events().tell("vm", "pausing", &[]);
        let events = self.events().clone();
        // Whoever wants to know when they stand still is not in this thread.
        let waiter = thread::Builder::new().name("pause".into()).spawn(move || {
            if vcpus.wait_paused(Instant::now() + PAUSE_EVENT) {
                events.tell("vm", "paused", &[]);
            }
        });
        if let Err(error) = waiter {
            log::warn!("cannot tell when the VM is paused: {error}");
        }
        Ok(())
    }

    /// Lets the vCPUs go on.
    pub fn resume(&self) -> Result<(), ControlError> {
        let slot = self.slot();
        let machine = slot.running()?;
        self.expect_no_operation()?;
        if machine.vcpus.run_state() == RunState::Running {
            return Err(slot.wrong("paused"));
        }
        machine.vcpus.resume();
        self.events().tell("vm", "resumed", &[]);
        Ok(())
    }

    /// Presses the power button.
    pub fn press_power_button(&self) -> Result<(), ControlError> {
        let slot = self.slot();
        let pressed = slot.running()?.power_button.write(1);
        pressed.map_err(|error| ControlError::failed("cannot press the power button", error))
    }

    /// Makes the VM that was created, and starts it.
    pub fn boot(&self) -> Pending {
        self.0.commands.send(Request::Boot)
    }

    /// Ends the VM's run. What was created can be booted again.
    pub fn shut_down(&self) -> Pending {
        self.0.commands.send(Request::Shutdown)
    }

    /// Ends the VM's run, if it runs, and forgets it.
    pub fn delete(&self) -> Pending {
        self.0.commands.send(Request::Delete)
    }

    /// Resets the VM, and starts it again.
    pub fn reboot(&self) -> Pending {
        self.0.commands.send(Request::Reboot)
    }

    /// Ends the VMM.
    pub fn quit(&self) -> Pending {
        self.0.commands.send(Request::Quit)
    }

    /// Starts an operation. Its [progress](Self::migration) and its outcome can be waited for.
    pub fn start(&self, operation: Operation) -> Result<Pending, ControlError> {
        // Held until the operation is known to go on, so that nothing comes between.
        let slot = self.slot();
        match operation {
            Operation::Snapshot(_) => {
                if slot.running()?.vcpus.run_state() == RunState::Running {
                    return Err(slot.wrong("paused"));
                }
            }
            Operation::Send(_) => {
                slot.running()?;
            }
            Operation::Restore(_) | Operation::Receive(_) => {
                if slot.config.is_some() {
                    return Err(ControlError::HasVm);
                }
            }
        }
        self.0.operations.start(self, operation)
    }

    /// How far the operation has come that goes on, or how the last one ended.
    pub fn migration(&self) -> Result<MigrationProgress, ControlError> {
        self.0.operations.progress()
    }

    /// Asks the operation that goes on to end. It does soon, unless it has come too far.
    pub fn cancel(&self) -> Result<(), ControlError> {
        self.0.operations.cancel()
    }

    /// Says what is to become of a VM whose migration is in doubt. The outcome is whether that is known now.
    pub fn resolve(&self, resolution: Resolution) -> Result<Pending, ControlError> {
        self.0.operations.resolve(resolution)
    }

    /// Where events are told.
    pub(crate) fn events(&self) -> &Events {
        &self.0.surroundings.events
    }

    /// What a new VM is to be put into.
    fn surroundings(&self) -> &Surroundings {
        &self.0.surroundings
    }

    /// The machine of the VM that runs.
    fn machine(&self) -> Result<Arc<Machine>, ControlError> {
        self.slot().running().cloned()
    }

    /// Has the main thread take over a VM whose devices run, and waits until it has. Not for the main thread.
    fn adopt(&self, vm: Vm, config: Arc<VmConfig>, resume: bool) -> Result<(), ControlError> {
        let vm = Box::new(vm);
        self.0
            .commands
            .send(Request::Adopt { vm, config, resume })
            .wait()
    }

    /// Has the main thread end the VM that it has adopted last. Not for the main thread.
    fn discard(&self) {
        let discarded = self.0.commands.send(Request::Discard).wait();
        if let Err(error) = discarded {
            log::debug!("the VM ends with its VMM: {error}");
        }
    }

    /// Has the main thread end the VM, soon: it runs elsewhere.
    fn depart(&self) {
        self.0.commands.send(Request::Depart);
    }

    /// What has become of VMs that were sent here.
    fn record(&self) -> &Arc<Record> {
        &self.0.record
    }

    /// Goes on to answer there, to whoever asks what has become of the VM.
    fn keep_reception(&self, reception: Arc<Reception>) {
        *self.reception() = Some(reception);
    }

    /// Answers there no longer.
    fn close_reception(&self) {
        let reception = self.reception().take();
        drop(reception);
    }

    fn reception(&self) -> MutexGuard<'_, Option<Arc<Reception>>> {
        let reception = self.0.reception.lock();
        reception.unwrap_or_else(PoisonError::into_inner)
    }

    /// What the main thread has been asked to do.
    pub(crate) fn commands(&self) -> &Commands {
        &self.0.commands
    }

    /// What the VM is to be that has been created, if it does not run.
    pub(crate) fn to_boot(&self) -> Result<Arc<VmConfig>, ControlError> {
        let slot = self.slot();
        self.expect_no_operation()?;
        match (&slot.config, &slot.machine) {
            (Some(config), None) => Ok(config.clone()),
            (Some(_), Some(_)) => Err(slot.wrong("not running")),
            (None, _) => Err(ControlError::NoVm),
        }
    }

    /// Says that the VM runs.
    pub(crate) fn started(&self, machine: Arc<Machine>) {
        self.slot().machine = Some(machine);
    }

    /// Keeps everyone else off the VM, which the main thread resets. An operation that goes on is cancelled.
    pub(crate) fn reset_begins(&self) {
        self.slot().is_resetting = true;
        self.0.operations.cancel_and_wait();
    }

    /// Says that the VM runs again.
    pub(crate) fn reset_ends(&self) {
        self.slot().is_resetting = false;
    }

    /// Says that a VM with this configuration runs, or stands still, that was not created here.
    pub(crate) fn adopted(&self, config: Arc<VmConfig>, machine: Arc<Machine>) {
        let mut slot = self.slot();
        slot.config = Some(config);
        slot.machine = Some(machine);
    }

    /// An error, unless the VM runs and no operation has to do with it.
    pub(crate) fn expect_running(&self) -> Result<(), ControlError> {
        self.slot().running()?;
        self.expect_no_operation()
    }

    /// An error, unless there is a VM, and no operation has to do with it.
    pub(crate) fn expect_idle(&self) -> Result<(), ControlError> {
        self.slot().config.as_ref().ok_or(ControlError::NoVm)?;
        self.expect_no_operation()
    }

    /// Forgets a VM that was adopted and is not to run, which the operation knows that goes on.
    pub(crate) fn discarded(&self) {
        *self.slot() = Slot::default();
    }

    /// Forgets the machine of a VM whose run ends, and that there was one at all unless it `stays` created.
    pub(crate) fn ended(&self, stays: bool) {
        self.0.operations.end();
        let mut slot = self.slot();
        slot.machine = None;
        slot.is_resetting = false;
        if !stays {
            slot.config = None;
        }
    }

    /// Ends what goes on, and takes no more commands: the VMM is about to end.
    pub(crate) fn close(&self) {
        self.0.commands.close();
        self.0.operations.end();
        self.close_reception();
    }

    /// An error, if an operation goes on.
    fn expect_no_operation(&self) -> Result<(), ControlError> {
        self.0.operations.expect_none()
    }

    fn slot(&self) -> MutexGuard<'_, Slot> {
        self.0.vm.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How long a pause is waited for, to tell that it has come about. A vCPU that waits for a device waits no longer.
const PAUSE_EVENT: Duration = Duration::from_secs(60);

impl Slot {
    fn running(&self) -> Result<&Arc<Machine>, ControlError> {
        match (&self.machine, &self.config) {
            (Some(_), _) if self.is_resetting => Err(ControlError::State {
                is: "being reset",
                needed: "running",
            }),
            (Some(machine), _) => Ok(machine),
            (None, Some(_)) => Err(self.wrong("running")),
            (None, None) => Err(ControlError::NoVm),
        }
    }

    fn state(&self) -> VmState {
        match self
            .machine
            .as_ref()
            .map(|machine| machine.vcpus.run_state())
        {
            None => VmState::Created,
            Some(_) if self.is_resetting => VmState::Running,
            Some(RunState::Paused) => VmState::Paused,
            Some(RunState::Running | RunState::Pausing) => VmState::Running,
        }
    }

    /// The error that the VM is something else than needed.
    fn wrong(&self, needed: &'static str) -> ControlError {
        ControlError::State {
            is: self.state().name(),
            needed,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::tests::config;
    use crate::ending::Endings;

    fn control() -> Control {
        let endings = Arc::new(Endings::new().unwrap());
        Control::new(Surroundings::new(endings, Events::default()).unwrap())
    }

    #[test]
    fn vm_is_created_once() {
        let control = control();
        assert!(matches!(control.info(), Err(ControlError::NoVm)));
        assert!(matches!(control.to_boot(), Err(ControlError::NoVm)));
        let absurd = VmConfig {
            vcpus: 0,
            ..config()
        };
        assert!(control.create(absurd).is_err());
        control.create(config()).unwrap();
        assert!(matches!(control.create(config()), Err(ControlError::HasVm)));
        assert_eq!(control.info().unwrap().state, VmState::Created);
        assert_eq!(*control.to_boot().unwrap(), config());
        control.ended(false);
        assert!(matches!(control.info(), Err(ControlError::NoVm)));
    }

    #[test]
    fn what_does_not_run_is_neither_paused_nor_counted() {
        let control = control();
        assert!(matches!(control.pause(), Err(ControlError::NoVm)));
        control.create(config()).unwrap();
        for error in [
            control.pause().unwrap_err(),
            control.resume().unwrap_err(),
            control.press_power_button().unwrap_err(),
            control.counters().unwrap_err(),
        ] {
            let text = error.to_string();
            assert_eq!(
                text,
                "the VM is not running, and this needs one that is running"
            );
        }
    }

    #[test]
    fn who_asks_at_the_end_hears_of_it() {
        let control = control();
        let before = control.boot();
        control.close();
        let after = control.quit();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap();
        for pending in [before, after] {
            let outcome = runtime.block_on(pending.outcome());
            assert!(matches!(outcome, Err(ControlError::Ending)));
        }
    }
}
