//! Operations: each on a thread of its own, one at a time, with progress, and an outcome that whoever wants waits for.

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use rustix::event::{EventfdFlags, eventfd};

use super::commands::Pending;
use super::progress::{MigrationProgress, OperationKind, Phase};
use super::request::Operation;
use super::snapshots;
use super::{Control, ControlError};
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
        if let Some(busy) = current.as_ref().filter(|current| current.task.goes_on()) {
            return Err(ControlError::Busy(busy.task.kind));
        }
        let failed = |source: io::Error| ControlError::failed("cannot start the operation", source);
        let task = Arc::new(Task::new(kind, events.clone()).map_err(failed)?);
        let (outcome, pending) = Pending::new();
        let thread = thread::Builder::new()
            .name(kind.endpoint().trim_start_matches("vm.").into())
            .spawn({
                let task = task.clone();
                move || {
                    task.tell(Phase::Preparing);
                    let result = body(&task);
                    task.end(&result);
                    outcome.send(result);
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

    /// Which operation goes on.
    pub(super) fn going_on(&self) -> Option<OperationKind> {
        let current = self.lock();
        let task = current.as_ref().map(|current| &current.task);
        task.filter(|task| task.goes_on()).map(|task| task.kind)
    }

    /// Asks the operation that goes on to end. It does so soon, or has come too far for that.
    pub(super) fn cancel(&self) -> Result<(), ControlError> {
        match self.lock().as_ref() {
            Some(current) if current.task.goes_on() => {
                current.task.cancel.ask();
                Ok(())
            }
            _ => Err(ControlError::NoOperation),
        }
    }

    /// Cancels the operation that goes on, and waits until there is none.
    pub(super) fn end(&self) {
        let thread = self.lock().as_mut().and_then(|current| {
            current.task.cancel.ask();
            current.thread.take()
        });
        if thread.is_some_and(|thread| thread.join().is_err()) {
            log::error!("an operation has panicked");
        }
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
        Operation::Send(_) | Operation::Receive(_) => {
            Err(ControlError::NotSupported(operation.kind().endpoint()))
        }
    }
}

/// What an operation that goes on and the rest of the VMM have in common.
#[derive(Debug)]
pub(crate) struct Task {
    kind: OperationKind,
    progress: Mutex<MigrationProgress>,
    cancel: Cancel,
    events: Events,
}

impl Task {
    fn new(kind: OperationKind, events: Events) -> io::Result<Self> {
        Ok(Self {
            kind,
            progress: Mutex::new(MigrationProgress::new(kind)),
            cancel: Cancel::new()?,
            events,
        })
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

    /// Whether the operation has been asked to end, and by what it hears of that while it waits for something else.
    pub(crate) fn cancel(&self) -> &Cancel {
        &self.cancel
    }

    /// An error, if the operation has been asked to end.
    pub(crate) fn check(&self) -> Result<(), ControlError> {
        if self.cancel.is_asked() {
            Err(ControlError::Cancelled(self.kind))
        } else {
            Ok(())
        }
    }

    fn end(&self, result: &Result<(), ControlError>) {
        let phase = match result {
            Ok(()) => Phase::Completed,
            Err(ControlError::Cancelled(_)) => Phase::Cancelled,
            Err(_) => Phase::Failed,
        };
        let mut progress = self.lock();
        progress.tick();
        // Only the operation itself knows that it does not know.
        if progress.phase != Phase::InDoubt {
            progress.phase = phase;
        }
        if let Err(error) = result {
            progress.error = error.messages();
        }
        let phase = progress.phase;
        drop(progress);
        self.tell(phase);
    }

    fn tell(&self, phase: Phase) {
        let operation = self.kind.endpoint();
        self.events
            .tell("migration", phase.name(), &[("operation", &operation)]);
        log::info!("{operation}: {}", phase.name());
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
}

/// The wish that an operation end.
#[derive(Debug)]
pub(crate) struct Cancel {
    asked: AtomicBool,
    event: OwnedFd,
}

impl Cancel {
    fn new() -> io::Result<Self> {
        Ok(Self {
            asked: AtomicBool::new(false),
            event: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        })
    }

    fn ask(&self) {
        self.asked.store(true, Ordering::Release);
        if let Err(error) = rustix::io::write(&self.event, &1u64.to_ne_bytes()) {
            log::error!("cannot wake an operation: {error}");
        }
    }

    /// Whether it has been uttered.
    pub(crate) fn is_asked(&self) -> bool {
        self.asked.load(Ordering::Acquire)
    }

    #[cfg_attr(not(test), expect(dead_code, reason = "for operations to come"))]
    /// Is readable from then on.
    pub(crate) fn event(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use rustix::event::{PollFd, PollFlags, poll};
    use rustix::io::retry_on_intr;

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
        assert_eq!(operations.going_on(), Some(OperationKind::Send));
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
            let mut fds = [PollFd::from_borrowed_fd(
                task.cancel().event(),
                PollFlags::IN,
            )];
            retry_on_intr(|| poll(&mut fds, None)).unwrap();
            task.check()
        });
        operations.cancel().unwrap();
        assert!(outcome(pending.unwrap()).is_err());
        assert_eq!(operations.progress().unwrap().phase, Phase::Cancelled);
        operations.end();
    }
}
