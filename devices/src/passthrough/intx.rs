//! INTx: a level-triggered line, made of events.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use pci::Cause;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::backend::{Backend, Irq, IrqInfo};
use crate::interrupts::InterruptLine;

/// The pin of a device, connected to an interrupt line. Dropping it disconnects it.
#[derive(Debug)]
pub(super) struct Intx {
    // The thread looks at the line's event, so it ends first.
    unmasker: Option<Unmasker>,
    /// What the device signals if it is unmasked by a thread; else that is the line's.
    device: Option<Arc<OwnedFd>>,
    line: Arc<dyn InterruptLine>,
    automasked: bool,
}

impl Intx {
    /// Has the device signal `line`, and be told when the guest has served the interrupt if it wants to know.
    pub(super) fn new(
        line: Box<dyn InterruptLine>,
        backend: &Arc<dyn Backend>,
        info: IrqInfo,
    ) -> Result<Self, Cause> {
        backend.arm(Irq::Intx, 0, &[line.trigger()])?;
        let mut intx = Self {
            unmasker: None,
            device: None,
            line: line.into(),
            automasked: info.automasked,
        };
        // A device that does not mask itself signals each time it has something to say.
        if info.automasked {
            if backend.unmask_on(Irq::Intx, intx.line.resample()).is_err() {
                let device = event()?;
                backend.arm(Irq::Intx, 0, &[device.as_fd()])?;
                intx.device = Some(Arc::new(device));
                intx.start_unmasker(backend)?;
            }
            // It may have masked itself for an interrupt of a line that it had before.
            backend.unmask(Irq::Intx)?;
        }
        Ok(intx)
    }

    /// The pin of a device that has its events already, disconnected. `device` is what it signals if a thread has to unmask
    /// it.
    pub(super) fn adopt(
        line: Box<dyn InterruptLine>,
        info: IrqInfo,
        device: Option<OwnedFd>,
    ) -> Result<Self, Cause> {
        line.set_connected(false)?;
        Ok(Self {
            unmasker: None,
            device: device.map(Arc::new),
            line: line.into(),
            automasked: info.automasked,
        })
    }

    /// Takes the line off the interrupt controllers.
    pub(super) fn disconnect(&mut self) -> Result<(), Cause> {
        self.unmasker = None;
        self.line.set_connected(false)
    }

    /// Connects the line again, and has it asserted if the device has something to say, or if the device is not to be asked.
    pub(super) fn connect(
        &mut self,
        backend: &Arc<dyn Backend>,
        may_ask: bool,
    ) -> Result<(), Cause> {
        self.line.set_connected(true)?;
        // A device that masks itself signals again when it is unmasked. Of any other, nobody knows whether the line was
        // asserted, so the guest has to look.
        if !self.automasked || self.device.is_some() || !may_ask {
            signal(self.line.trigger());
        }
        self.start_unmasker(backend)?;
        if self.automasked && may_ask {
            backend.unmask(Irq::Intx)?;
        }
        Ok(())
    }

    /// Has a thread unmask the device if nothing else does.
    fn start_unmasker(&mut self, backend: &Arc<dyn Backend>) -> Result<(), Cause> {
        if let (Some(device), None) = (&self.device, &self.unmasker) {
            let (line, backend, device) = (self.line.clone(), backend.clone(), device.clone());
            self.unmasker = Some(Unmasker::start(line, backend, device)?);
        }
        Ok(())
    }
}

/// A thread that unmasks a device's INTx whenever the guest has served it, for a device that cannot be told by an event.
/// (A message to the device takes its time, so this is not for the event loop.)
///
/// Such a device may also forget what it would have signalled while it was masked, as mtty of the kernel's samples does.
/// So the guest is interrupted once more when the device is unmasked. To know whose interrupt it was that the guest has
/// served, the thread gets the device's events, and passes them on.
#[derive(Debug)]
struct Unmasker {
    shared: Arc<Events>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Events {
    /// What the device signals.
    device: Arc<OwnedFd>,
    /// Wakes the thread when it is to end.
    stop: OwnedFd,
    stopped: AtomicBool,
}

impl Unmasker {
    /// Starts it for a device that signals `device`.
    fn start(
        line: Arc<dyn InterruptLine>,
        backend: Arc<dyn Backend>,
        device: Arc<OwnedFd>,
    ) -> Result<Self, Cause> {
        let shared = Arc::new(Events {
            device,
            stop: event()?,
            stopped: AtomicBool::new(false),
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

impl Events {
    fn run(&self, line: &dyn InterruptLine, backend: &dyn Backend) {
        // Whether the device has signalled the interrupt that the guest is serving. What was signalled when the line was
        // connected again counts, too: if the guest was serving one just then, as on the host that it comes from, it goes
        // with that, unseen.
        let mut is_devices = true;
        while !self.stopped.load(Ordering::Acquire) {
            let mut fds = [
                PollFd::from_borrowed_fd(line.resample(), PollFlags::IN),
                PollFd::from_borrowed_fd(self.device.as_fd(), PollFlags::IN),
                PollFd::from_borrowed_fd(self.stop.as_fd(), PollFlags::IN),
            ];
            if poll(&mut fds, None).is_err() {
                continue;
            }
            if was_signalled(line.resample()) {
                if let Err(error) = backend.unmask(Irq::Intx) {
                    log::debug!("cannot unmask INTx: {error}");
                }
                if is_devices {
                    is_devices = false;
                    signal(line.trigger());
                }
            }
            if was_signalled(self.device.as_fd()) {
                is_devices = true;
                signal(line.trigger());
            }
        }
    }
}

fn event() -> rustix::io::Result<OwnedFd> {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
}

fn was_signalled(event: BorrowedFd<'_>) -> bool {
    rustix::io::read(event, &mut [0; 8]).is_ok()
}

pub(super) fn signal(event: BorrowedFd<'_>) {
    // It fails only if it has been signalled more often than can be counted.
    let _ = rustix::io::write(event, &1_u64.to_ne_bytes());
}

impl Drop for Unmasker {
    fn drop(&mut self) {
        self.shared.stopped.store(true, Ordering::Release);
        signal(self.shared.stop.as_fd());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
