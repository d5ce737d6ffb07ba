//! Operations: each on a thread of its own, one at a time, with progress, and an outcome that whoever wants waits for.
//!
//! A migration that is in doubt goes on until that is resolved, but whoever waits for its outcome is told of the doubt.

use std::collections::VecDeque;
use std::fmt::Display;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::commands::{Pending, Reply};
use super::progress::{MigrationProgress, OperationKind, Phase};
use super::request::{Operation, Resolution};
use super::{Control, ControlError};
use super::{migrations, snapshots};
use crate::events::Events;

/// The operation that goes on, or the last one.
#[derive(Debug, Default)]
pub(super) struct Operations {
    current: Mutex<Option<Current>>,
}

#[derive(Debug)]
struct Current {
    task: Arc<Task>,
    thread: Option<JoinHandle<()>>,
}

impl Operations {
    /// Starts an operation, unless another one goes on.
    pub(super) fn start(
        &self,
        control: &Control,
        operation: Operation,
    ) -> Result<Pending, ControlError> {
        self.run(operation.kind(), control.events(), {
            let control = control.clone();
            move |task| execute(&control, &operation, task)
        })
    }

    fn run(
        &self,
        kind: OperationKind,
        events: &Events,
        body: impl FnOnce(&Task) -> Result<(), ControlError> + Send + 'static,
    ) -> Result<Pending, ControlError> {
        let mut current = self.lock();
        if let Some(current) = current.as_ref() {
            current.task.expect_end()?;
        }
        let failed = |source: io::Error| ControlError::failed("cannot start the operation", source);
        let (outcome, pending) = Pending::new();
        let task = Arc::new(Task::new(kind, events.clone(), outcome));
        let thread = thread::Builder::new()
            .name(kind.endpoint().trim_start_matches("vm.").into())
            .spawn({
                let task = task.clone();
                move || {
                    task.tell(Phase::Preparing);
                    let result = body(&task);
                    task.end(result);
                }
            })
            .map_err(failed)?;
        *current = Some(Current {
            task,
            thread: Some(thread),
        });
        Ok(pending)
    }

    /// The progress of the operation that goes on, or of the last one.
    pub(super) fn progress(&self) -> Result<MigrationProgress, ControlError> {
        match self.lock().as_ref() {
            Some(current) => Ok(current.task.progress()),
            None => Err(ControlError::NoOperation),
        }
    }

    /// An error, if an operation goes on.
    pub(super) fn expect_none(&self) -> Result<(), ControlError> {
        let current = self.lock();
        let task = current.as_ref().map(|current| &current.task);
        task.map_or(Ok(()), |task| task.expect_end())
    }

    /// Asks the operation that goes on to end. It does so soon, or has come too far for that.
    pub(super) fn cancel(&self) -> Result<(), ControlError> {
        match self.lock().as_ref() {
            Some(current) if current.task.goes_on() => {
                // It would be said to have ended for this, however its doubt is resolved.
                if current.task.lock().phase != Phase::InDoubt {
                    current.task.cancel.ask();
                }
                Ok(())
            }
            _ => Err(ControlError::NoOperation),
        }
    }

    /// Has the migration that is in doubt end as the operator says, if it can.
    pub(super) fn resolve(&self, resolution: Resolution) -> Result<Pending, ControlError> {
        let current = self.lock();
        let task = current.as_ref().map(|current| &current.task);
        let in_doubt = task.filter(|task| task.lock().phase == Phase::InDoubt);
        let task = in_doubt.ok_or(ControlError::NothingInDoubt)?;
        let (reply, pending) = Pending::new();
        task.orders().waiting.push_back((resolution, reply));
        task.ordered.notify_all();
        Ok(pending)
    }

    /// Cancels the operation that goes on, and waits until there is none. One that is in doubt goes on until it is not.
    pub(super) fn cancel_and_wait(&self) {
        let thread = self.lock().as_mut().and_then(|current| {
            current.task.cancel.ask();
            current.thread.take()
        });
        if thread.is_some_and(|thread| thread.join().is_err()) {
            log::error!("an operation has panicked");
        }
    }

    /// As [`cancel_and_wait`](Self::cancel_and_wait), but nothing keeps an operation from its end any more.
    pub(super) fn end(&self) {
        if let Some(current) = self.lock().as_ref() {
            current.task.abandon.ask();
            current.task.ordered.notify_all();
        }
        self.cancel_and_wait();
    }

    fn lock(&self) -> MutexGuard<'_, Option<Current>> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Does what an operation asks for, on its thread.
fn execute(control: &Control, operation: &Operation, task: &Task) -> Result<(), ControlError> {
    match operation {
        Operation::Snapshot(request) => snapshots::save(&*control.machine()?, request, task),
        Operation::Restore(request) => snapshots::restore(control, request, task),
        Operation::Send(request) => migrations::send(control, request, task),
        Operation::Receive(request) => migrations::receive(control, request, task),
    }
}

/// What an operation that goes on and the rest of the VMM have in common.
#[derive(Debug)]
pub(crate) struct Task {
    kind: OperationKind,
    progress: Mutex<MigrationProgress>,
    cancel: Arc<Cancel>,
    /// The wish that it end even in doubt: the VM or the VMM ends.
    abandon: Arc<Cancel>,
    orders: Mutex<Orders>,
    ordered: Condvar,
    events: Events,
}

#[derive(Debug)]
struct Orders {
    /// Who waits for the outcome of the operation, and has not heard that it is in doubt.
    outcome: Option<Reply>,
    /// What is to become of an operation in doubt, and who wants to know whether it has.
    waiting: VecDeque<(Resolution, Reply)>,
}

/// What an operation in doubt is to do.
#[derive(Debug)]
pub(crate) enum Order {
    /// Try to find out.
    Wait,
    /// What the operator says, who waits for an answer.
    Resolve(Resolution, Reply),
    /// End, and leave it in doubt.
    Abandon,
}

impl Task {
    fn new(kind: OperationKind, events: Events, outcome: Reply) -> Self {
        Self {
            kind,
            progress: Mutex::new(MigrationProgress::new(kind)),
            cancel: Arc::default(),
            abandon: Arc::default(),
            orders: Mutex::new(Orders {
                outcome: Some(outcome),
                waiting: VecDeque::new(),
            }),
            ordered: Condvar::new(),
            events,
        }
    }

    /// Changes what is known of the operation. Not its phase: that is what [`enter`](Self::enter) is for.
    pub(crate) fn update(&self, change: impl FnOnce(&mut MigrationProgress)) {
        change(&mut self.lock());
    }

    /// Goes on to the next phase.
    pub(crate) fn enter(&self, phase: Phase) {
        self.lock().phase = phase;
        self.tell(phase);
    }

    /// Whether the operation has been asked to end.
    pub(crate) fn cancel(&self) -> &Arc<Cancel> {
        &self.cancel
    }

    /// Whether it has been asked to end even in doubt.
    pub(crate) fn abandon(&self) -> &Arc<Cancel> {
        &self.abandon
    }

    /// Nobody knows where the VM runs. Whoever waits for the outcome hears that, and why.
    pub(crate) fn enter_doubt(&self, error: ControlError) {
        self.lock().error = error.messages();
        self.enter(Phase::InDoubt);
        if let Some(outcome) = self.orders().outcome.take() {
            outcome.send(Err(error));
        }
    }

    /// What an operation in doubt is to do next; it is asked to wait after so long.
    pub(crate) fn next_order(&self, wait: Duration) -> Order {
        let nothing = |orders: &mut Orders| orders.waiting.is_empty() && !self.abandon.is_asked();
        let waited = self
            .ordered
            .wait_timeout_while(self.orders(), wait, nothing);
        let (mut orders, _) = waited.unwrap_or_else(PoisonError::into_inner);
        match orders.waiting.pop_front() {
            _ if self.abandon.is_asked() => Order::Abandon,
            Some((resolution, reply)) => Order::Resolve(resolution, reply),
            None => Order::Wait,
        }
    }

    /// An error, if the operation has been asked to end.
    pub(crate) fn check(&self) -> Result<(), ControlError> {
        if self.cancel.is_asked() {
            Err(ControlError::Cancelled(self.kind))
        } else {
            Ok(())
        }
    }

    fn end(&self, result: Result<(), ControlError>) {
        let phase = match &result {
            Ok(()) => Phase::Completed,
            Err(ControlError::Cancelled(_)) => Phase::Cancelled,
            Err(_) => Phase::Failed,
        };
        {
            let mut progress = self.lock();
            progress.tick();
            progress.phase = phase;
            progress.error = result
                .as_ref()
                .map_or_else(ControlError::messages, |()| Vec::new());
        }
        self.tell(phase);
        let mut orders = self.orders();
        for (_, reply) in orders.waiting.drain(..) {
            reply.send(Err(ControlError::NothingInDoubt));
        }
        if let Some(outcome) = orders.outcome.take() {
            outcome.send(result);
        }
    }

    fn tell(&self, phase: Phase) {
        let operation = self.kind.endpoint();
        let (id, downtime) = {
            let progress = self.lock();
            (progress.id.clone(), progress.downtime_us)
        };
        let mut properties: Vec<(_, &dyn Display)> = vec![("operation", &operation)];
        properties.extend(id.as_ref().map(|id| ("id", id as &dyn Display)));
        let downtime = downtime.as_ref().filter(|_| phase.is_end());
        properties.extend(downtime.map(|time| ("downtime_us", time as &dyn Display)));
        self.events.tell("migration", phase.name(), &properties);
        log::info!("{operation}: {}", phase.name());
    }

    /// An error, unless it has come to its end.
    fn expect_end(&self) -> Result<(), ControlError> {
        match self.lock().phase {
            Phase::InDoubt => Err(ControlError::Unresolved),
            phase if phase.is_end() => Ok(()),
            _ => Err(ControlError::Busy(self.kind)),
        }
    }

    fn goes_on(&self) -> bool {
        !self.lock().phase.is_end()
    }

    fn progress(&self) -> MigrationProgress {
        let mut progress = self.lock();
        progress.tick();
        progress.clone()
    }

    fn lock(&self) -> MutexGuard<'_, MigrationProgress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn orders(&self) -> MutexGuard<'_, Orders> {
        self.orders.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The wish that an operation end.
#[derive(Debug, Default)]
pub(crate) struct Cancel(AtomicBool);

impl Cancel {
    /// Utters it.
    pub(crate) fn ask(&self) {
        self.0.store(true, Ordering::Release);
    }

    /// Whether it has been uttered.
    pub(crate) fn is_asked(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    fn outcome(pending: Pending) -> Result<(), ControlError> {
        let runtime = tokio::runtime::Builder::new_current_thread().build();
        runtime.unwrap().block_on(pending.outcome())
    }

    #[test]
    fn one_operation_goes_on_at_a_time() {
        let operations = Operations::default();
        assert!(operations.progress().is_err());
        let (finish, told_to) = mpsc::channel::<()>();
        let events = Events::default();
        let first = operations.run(OperationKind::Send, &events, move |task| {
            task.enter(Phase::Precopy);
            task.update(|progress| progress.rounds = 3);
            let _ = told_to.recv();
            Ok(())
        });
        let second = operations.run(OperationKind::Snapshot, &events, |_| Ok(()));
        assert!(matches!(
            second,
            Err(ControlError::Busy(OperationKind::Send))
        ));
        assert!(matches!(
            operations.expect_none(),
            Err(ControlError::Busy(OperationKind::Send))
        ));
        finish.send(()).unwrap();
        outcome(first.unwrap()).unwrap();
        let progress = operations.progress().unwrap();
        assert_eq!((progress.phase, progress.rounds), (Phase::Completed, 3));
        assert!(operations.cancel().is_err());
        let third = operations.run(OperationKind::Snapshot, &events, |_| {
            Err(ControlError::Invalid("no".into()))
        });
        assert!(outcome(third.unwrap()).is_err());
        let progress = operations.progress().unwrap();
        assert_eq!(
            (progress.phase, progress.error),
            (Phase::Failed, vec!["no".to_owned()])
        );
    }

    #[test]
    fn operation_hears_that_it_is_cancelled() {
        let operations = Operations::default();
        let pending = operations.run(OperationKind::Receive, &Events::default(), |task| {
            while !task.cancel().is_asked() {
                thread::yield_now();
            }
            task.check()
        });
        operations.cancel().unwrap();
        assert!(outcome(pending.unwrap()).is_err());
        assert_eq!(operations.progress().unwrap().phase, Phase::Cancelled);
        operations.end();
    }

    #[test]
    fn doubt_is_told_and_goes_on_until_it_is_resolved() {
        let operations = Operations::default();
        let run = || {
            operations.run(OperationKind::Send, &Events::default(), |task| {
                task.enter_doubt(ControlError::Invalid("who knows".into()));
                loop {
                    match task.next_order(Duration::from_secs(60)) {
                        Order::Resolve(Resolution::Run, reply) => {
                            reply.send(Ok(()));
                            return Ok(());
                        }
                        Order::Resolve(_, reply) => reply.send(Err(ControlError::NoVm)),
                        Order::Wait => {}
                        Order::Abandon => return Err(ControlError::Ending),
                    }
                }
            })
        };
        let pending = run().unwrap();
        let error = outcome(pending).unwrap_err();
        assert_eq!(error.to_string(), "who knows");
        assert!(matches!(
            operations.expect_none(),
            Err(ControlError::Unresolved)
        ));
        assert!(matches!(run(), Err(ControlError::Unresolved)));
        let progress = operations.progress().unwrap();
        assert_eq!((progress.phase, progress.error.len()), (Phase::InDoubt, 1));
        operations.cancel().unwrap();
        let asked = operations.resolve(Resolution::Ask).unwrap();
        assert!(outcome(asked).is_err());
        outcome(operations.resolve(Resolution::Run).unwrap()).unwrap();
        operations.cancel_and_wait();
        assert_eq!(operations.progress().unwrap().phase, Phase::Completed);
        let late = operations.resolve(Resolution::Run);
        assert!(matches!(late, Err(ControlError::NothingInDoubt)));
        let pending = run().unwrap();
        assert!(outcome(pending).is_err());
        operations.end();
        assert_eq!(operations.progress().unwrap().phase, Phase::Failed);
    }
}
