//! The main thread's loop: it waits for the end of the run, for signals, for input and for device servers.

use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use devices::kernel::{KernelDevice, Notices};
use devices::{Passthrough, Remote};
use event_manager::{EventManager, EventOps, Events, MutEventSubscriber, SubscriberOps};
use libc::{SIGHUP, SIGINT, SIGPWR, SIGTERM};
use std::os::fd::AsRawFd;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use crate::ending::{Ending, Endings};

/// Why the loop does not go on.
#[derive(Debug, thiserror::Error)]
pub enum LoopError {
    /// Events cannot be waited for.
    #[error("cannot wait for events")]
    Wait(#[source] event_manager::Error),
    /// Signals cannot be caught.
    #[error("cannot catch signals")]
    Signals(#[source] std::io::Error),
}

/// What the main thread waits for.
pub(crate) struct EventLoop {
    manager: EventManager<Box<dyn MutEventSubscriber + Send>>,
    endings: Arc<Endings>,
}

impl EventLoop {
    /// A loop that waits for nothing but the end of the run.
    pub(crate) fn new(endings: Arc<Endings>) -> Result<Self, LoopError> {
        let mut manager = EventManager::new_with_capacity(EVENTS).map_err(LoopError::Wait)?;
        manager.add_subscriber(Box::new(EndOfRun(endings.clone())) as Box<_>);
        Ok(Self { manager, endings })
    }

    /// Also waits for what `subscriber` is about.
    pub(crate) fn add(&mut self, subscriber: Box<dyn MutEventSubscriber + Send>) {
        self.manager.add_subscriber(subscriber);
    }

    /// Waits, and serves what comes, until the run ends.
    pub(crate) fn run(&mut self) -> Result<Ending, LoopError> {
        loop {
            if let Some(ending) = self.run_until(|| false)? {
                return Ok(ending);
            }
        }
    }

    /// Waits, and serves what comes, until the run ends, or until `done`, of which [`Endings::wake`] has to tell.
    pub(crate) fn run_until(
        &mut self,
        done: impl Fn() -> bool,
    ) -> Result<Option<Ending>, LoopError> {
        loop {
            let ending = self.endings.take();
            if ending.is_some() || done() {
                return Ok(ending);
            }
            self.manager.run().map_err(LoopError::Wait)?;
        }
    }
}

/// How many events are taken from the kernel at a time.
const EVENTS: usize = 16;

/// Wakes the loop when the run has ended.
struct EndOfRun(Arc<Endings>);

impl MutEventSubscriber for EndOfRun {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        watch(ops, self.0.event());
    }

    fn process(&mut self, _: Events, _: &mut EventOps<'_>) {}
}

/// Signals: SIGTERM, SIGINT and SIGHUP end the run, SIGPWR presses the power button.
#[derive(Debug)]
pub(crate) struct Signals {
    /// The signal handler writes a byte into the other end for each signal.
    button: UnixStream,
    quit: UnixStream,
    endings: Arc<Endings>,
}

impl Signals {
    /// Catches the signals, for the rest of the process' life.
    pub(crate) fn catch(endings: Arc<Endings>) -> Result<Self, LoopError> {
        let pipe = |signals: &[i32]| {
            let (end, handler) = UnixStream::pair()?;
            end.set_nonblocking(true)?;
            for &signal in signals {
                signal_hook::low_level::pipe::register(signal, handler.try_clone()?)?;
            }
            Ok(end)
        };
        let quit = pipe(&[SIGTERM, SIGINT, SIGHUP]).map_err(LoopError::Signals)?;
        let button = pipe(&[SIGPWR]).map_err(LoopError::Signals)?;
        Ok(Self {
            button,
            quit,
            endings,
        })
    }

    /// What a loop has to wait for. `power_button` raises the interrupt of the VM's button, if there is a VM.
    pub(crate) fn watch(self: &Arc<Self>, power_button: Option<EventFd>) -> SignalWatch {
        SignalWatch {
            signals: self.clone(),
            power_button,
        }
    }
}

/// The signals while there is a VM, or none.
pub(crate) struct SignalWatch {
    signals: Arc<Signals>,
    power_button: Option<EventFd>,
}

impl MutEventSubscriber for SignalWatch {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        watch(ops, &self.signals.button);
        watch(ops, &self.signals.quit);
    }

    fn process(&mut self, events: Events, _: &mut EventOps<'_>) {
        let mut bytes = [0; 16];
        if events.fd() == self.signals.quit.as_raw_fd() {
            let _ = (&self.signals.quit).read(&mut bytes);
            self.signals.endings.report(Ending::Quit);
            return;
        }
        let _ = (&self.signals.button).read(&mut bytes);
        match self.power_button.as_ref().map(|button| button.write(1)) {
            Some(Ok(())) => {}
            Some(Err(error)) => log::warn!("cannot press the power button: {error}"),
            None => log::info!("there is no guest whose power button could be pressed"),
        }
    }
}

/// A device server: what it sends while nobody waits for it, and its end.
pub(crate) struct Server {
    pub(crate) remote: Arc<Remote>,
    pub(crate) endpoint: Arc<Passthrough>,
}

impl MutEventSubscriber for Server {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        watch(ops, &self.remote.as_fd());
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        if let Err(loss) = self.remote.serve() {
            self.endpoint.give_up(&loss);
            if let Err(error) = ops.remove(events) {
                log::debug!("cannot stop watching a device server: {error}");
            }
        }
    }
}

/// What the host has to say of a device of its own.
pub(crate) struct HostNotices {
    pub(crate) device: Arc<KernelDevice>,
    pub(crate) endpoint: Arc<Passthrough>,
}

impl MutEventSubscriber for HostNotices {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        let Notices {
            failed,
            wanted_back,
        } = self.device.notices();
        watch(ops, failed);
        watch(ops, wanted_back);
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        let reason = if events.fd() == self.device.notices().failed.as_raw_fd() {
            "it reported an error that it does not recover from"
        } else {
            "the host wants it back, and has it now"
        };
        self.endpoint.give_up(&reason);
        // It has nothing more to say.
        let Notices {
            failed,
            wanted_back,
        } = self.device.notices();
        for event in [failed, wanted_back] {
            if let Err(error) = ops.remove(Events::empty(event)) {
                log::debug!("cannot stop watching a device of the host: {error}");
            }
        }
    }
}

/// Waits for a descriptor to be readable.
pub(crate) fn watch(ops: &mut EventOps<'_>, source: &impl AsRawFd) {
    if let Err(error) = ops.add(Events::new(source, EventSet::IN)) {
        log::error!("cannot watch a descriptor: {error}");
    }
}
