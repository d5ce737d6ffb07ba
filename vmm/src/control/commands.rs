//! What other threads ask the main thread to do, which owns the VM.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

use super::ControlError;
use crate::config::VmConfig;
use crate::ending::Endings;
use crate::vm::Vm;

/// Something that only the main thread can do.
#[derive(Debug)]
pub(crate) enum Request {
    /// Makes the VM that has been created, and starts it.
    Boot,
    /// Ends the VM's run; what was created stays.
    Shutdown,
    /// Ends the VM's run, if it runs, and forgets it.
    Delete,
    /// Resets the VM and starts it again.
    Reboot,
    /// Runs a VM that has been made elsewhere, or has it stand still if it is not to `resume`.
    Adopt {
        /// The VM, whose devices run.
        vm: Box<Vm>,
        /// What it is.
        config: Arc<VmConfig>,
        /// Whether its vCPUs go on, too.
        resume: bool,
    },
    /// Ends a VM that was adopted, and is not to run here after all.
    Discard,
    /// Ends the VM: it runs elsewhere.
    Depart,
    /// Ends the VMM.
    Quit,
}

/// A request, and who waits for its outcome.
#[derive(Debug)]
pub(crate) struct Command {
    pub(crate) request: Request,
    pub(crate) reply: Reply,
}

/// Who waits for an outcome, if somebody still does.
#[derive(Debug)]
pub(crate) struct Reply(oneshot::Sender<Result<(), ControlError>>);

impl Reply {
    /// Tells the outcome.
    pub(crate) fn send(self, outcome: Result<(), ControlError>) {
        let _ = self.0.send(outcome);
    }
}

/// An outcome that is still to come.
#[derive(Debug)]
pub struct Pending(oneshot::Receiver<Result<(), ControlError>>);

impl Pending {
    /// An outcome, and where it is to be told.
    pub(super) fn new() -> (Reply, Self) {
        let (sender, receiver) = oneshot::channel();
        (Reply(sender), Self(receiver))
    }

    /// Waits for it.
    pub async fn outcome(self) -> Result<(), ControlError> {
        self.0.await.unwrap_or(Err(ControlError::Ending))
    }

    /// As [`outcome`](Self::outcome), for a thread that has nothing else to do.
    pub(crate) fn wait(self) -> Result<(), ControlError> {
        self.0.blocking_recv().unwrap_or(Err(ControlError::Ending))
    }
}

/// The commands that the main thread has not come to yet.
#[derive(Debug)]
pub(crate) struct Commands {
    /// None when no more are taken.
    queue: Mutex<Option<VecDeque<Command>>>,
    /// Wakes the main thread.
    endings: Arc<Endings>,
}

impl Commands {
    pub(super) fn new(endings: Arc<Endings>) -> Self {
        Self {
            queue: Mutex::new(Some(VecDeque::new())),
            endings,
        }
    }

    pub(super) fn send(&self, request: Request) -> Pending {
        let (reply, pending) = Pending::new();
        if let Some(queue) = self.lock().as_mut() {
            queue.push_back(Command { request, reply });
            self.endings.wake();
        }
        pending
    }

    /// Whether there is something for the main thread to do.
    pub(crate) fn is_empty(&self) -> bool {
        self.lock().as_ref().is_none_or(VecDeque::is_empty)
    }

    /// What the main thread is to do next.
    pub(crate) fn next(&self) -> Option<Command> {
        self.lock().as_mut()?.pop_front()
    }

    /// Takes no more commands, and does none of those that wait: whoever asked hears that the VMM ends.
    pub(crate) fn close(&self) {
        *self.lock() = None;
    }

    fn lock(&self) -> MutexGuard<'_, Option<VecDeque<Command>>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
