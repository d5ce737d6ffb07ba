//! INTx: a level-triggered line, made of events.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use pci::Cause;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use std::os::fd::{AsFd, OwnedFd};

use crate::backend::{Backend, Irq, IrqInfo};
use crate::interrupts::InterruptLine;

/// The pin of a device, connected to an interrupt line. Dropping it disconnects it.
#[derive(Debug)]
pub(super) struct Intx {
    // The thread looks at the line's event, so it ends first.
    _unmasker: Option<Unmasker>,
    _line: Arc<dyn InterruptLine>,
}

impl Intx {
    /// Has the device signal `line`, and be told when the guest has served the interrupt if it wants to know.
    pub(super) fn new(
        line: Box<dyn InterruptLine>,
        backend: &Arc<dyn Backend>,
        info: IrqInfo,
    ) -> Result<Self, Cause> {
        let line: Arc<dyn InterruptLine> = line.into();
        backend.arm(Irq::Intx, 0, &[line.trigger()])?;
        // A device that does not mask itself signals each time it has something to say.
        let mut unmasker = None;
        if info.automasked {
            if backend.unmask_on(Irq::Intx, line.resample()).is_err() {
                unmasker = Some(Unmasker::start(line.clone(), backend.clone())?);
            }
            // It may have masked itself for an interrupt of a line that it had before.
            backend.unmask(Irq::Intx)?;
        }
        Ok(Self {
            _unmasker: unmasker,
            _line: line,
        })
    }
}

/// A thread that unmasks a device's INTx whenever the guest has served it, for a device that cannot be told by an event.
/// (A message to the device takes its time, so this is not for the event loop.)
#[derive(Debug)]
struct Unmasker {
    shared: Arc<Stop>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Stop {
    event: OwnedFd,
    wanted: AtomicBool,
}

impl Unmasker {
    fn start(line: Arc<dyn InterruptLine>, backend: Arc<dyn Backend>) -> io::Result<Self> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let shared = Arc::new(Stop {
            event,
            wanted: AtomicBool::new(false),
        });
        let thread = thread::Builder::new().name("intx".into()).spawn({
            let shared = shared.clone();
            move || shared.run(line.as_ref(), backend.as_ref())
        })?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }
}

impl Stop {
    fn run(&self, line: &dyn InterruptLine, backend: &dyn Backend) {
        while !self.wanted.load(Ordering::Acquire) {
            let resample = line.resample();
            let mut fds = [
                PollFd::from_borrowed_fd(resample, PollFlags::IN),
                PollFd::from_borrowed_fd(self.event.as_fd(), PollFlags::IN),
            ];
            if poll(&mut fds, None).is_err() {
                continue;
            }
            let mut count = [0; 8];
            if rustix::io::read(resample, &mut count).is_ok()
                && let Err(error) = backend.unmask(Irq::Intx)
            {
                log::debug!("cannot unmask INTx: {error}");
            }
        }
    }
}

impl Drop for Unmasker {
    fn drop(&mut self) {
        self.shared.wanted.store(true, Ordering::Release);
        let _ = rustix::io::write(&self.shared.event, &1u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
