//! Where sources call: a thread that hears what each connection is for, hands on those of the migration that is under way,
//! and answers questions about how others ended.

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::fd::OwnedFd;
use rustix::io::retry_on_intr;

use super::commit::{DestinationAction, DestinationInput};
use super::record::Record;
use super::stream::{ConnectError, Incoming, Listener, Stream};
use super::wire::{self, Kind, MigrationId, Role, WireError};
use crate::control::ReceiveRequest;

/// How many callers are heard at a time.
const CALLERS: usize = 64;
/// How long a caller may take to say what it wants.
const INTRODUCTION: Duration = Duration::from_secs(10);

/// A place where sources call, until it is dropped.
#[derive(Debug)]
pub(crate) struct Reception {
    calls: Mutex<Receiver<Call>>,
    stop: OwnedFd,
    thread: Option<JoinHandle<()>>,
}

/// A connection of the migration that is under way.
#[derive(Debug)]
pub(super) struct Call {
    pub(super) role: Role,
    pub(super) id: MigrationId,
    pub(super) stream: Stream,
}

/// What those know who hear callers.
#[derive(Debug)]
struct Desk {
    record: Arc<Record>,
    /// The migration that is under way here.
    current: Mutex<Option<MigrationId>>,
    calls: SyncSender<Call>,
    callers: AtomicUsize,
}

impl Reception {
    /// Opens one. What has been decided is in `record`.
    pub(crate) fn open(
        request: &ReceiveRequest,
        record: Arc<Record>,
    ) -> Result<Self, ConnectError> {
        let failed = |source| ConnectError::Listen {
            url: request.receiver.clone(),
            source,
        };
        let tls_dir = request.tls_dir.as_deref();
        let listener = Listener::bind(&request.receiver, tls_dir, request.insecure)?;
        let (sender, calls) = sync_channel(CALLERS);
        let desk = Arc::new(Desk {
            record,
            current: Mutex::default(),
            calls: sender,
            callers: AtomicUsize::new(0),
        });
        let stop = eventfd(0, EventfdFlags::CLOEXEC).map_err(|error| failed(error.into()))?;
        let stopped = stop.try_clone().map_err(failed)?;
        let thread = thread::Builder::new()
            .name("reception".into())
            .spawn(move || desk.sit(&listener, &stopped));
        Ok(Self {
            calls: Mutex::new(calls),
            stop,
            thread: Some(thread.map_err(failed)?),
        })
    }

    /// The next connection of the migration that is under way, or else the one that begins it; none if there is none for
    /// so long.
    pub(super) fn next_call(&self, wait: Duration) -> io::Result<Option<Call>> {
        let calls = self.calls.lock().unwrap_or_else(PoisonError::into_inner);
        match calls.recv_timeout(wait) {
            Ok(call) => Ok(Some(call)),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => Err(io::ErrorKind::NotConnected.into()),
        }
    }
}

impl Drop for Reception {
    fn drop(&mut self) {
        if let Err(error) = rustix::io::write(&self.stop, &1_u64.to_ne_bytes()) {
            log::error!("cannot stop waiting for migrations: {error}");
            return;
        }
        if self
            .thread
            .take()
            .is_some_and(|thread| thread.join().is_err())
        {
            log::error!("the thread that waits for migrations has panicked");
        }
    }
}

impl Desk {
    fn sit(self: &Arc<Self>, listener: &Listener, stopped: &OwnedFd) {
        loop {
            let mut fds = [
                PollFd::new(listener, PollFlags::IN),
                PollFd::new(stopped, PollFlags::IN),
            ];
            let polled = retry_on_intr(|| poll(&mut fds, None));
            let [_, stop] = &fds;
            if polled.is_err() || !stop.revents().is_empty() {
                return;
            }
            match listener.accept() {
                Ok(incoming) => self.hear(incoming),
                Err(error) => {
                    // Too many open files, most likely. It gets better when somebody goes.
                    log::warn!("a migration's connection cannot be accepted: {error}");
                    thread::sleep(Duration::from_millis(100));
                }
            }
        }
    }

    /// Hears a caller, without keeping others waiting.
    fn hear(self: &Arc<Self>, incoming: Incoming) {
        if self.callers.fetch_add(1, Ordering::Relaxed) >= CALLERS {
            self.callers.fetch_sub(1, Ordering::Relaxed);
            log::warn!("too many connections want to migrate something here: one is dropped");
            return;
        }
        let desk = Arc::clone(self);
        let heard = thread::Builder::new().name("caller".into()).spawn(move || {
            if let Err(error) = desk.answer(incoming) {
                let error: &dyn std::error::Error = &*error;
                let cause = error.source().map(|cause| format!(": {cause}"));
                log::warn!(
                    "a migration's connection is dropped: {error}{}",
                    cause.unwrap_or_default()
                );
            }
            desk.callers.fetch_sub(1, Ordering::Relaxed);
        });
        if let Err(error) = heard {
            self.callers.fetch_sub(1, Ordering::Relaxed);
            log::warn!("a migration's connection cannot be heard: {error}");
        }
    }

    fn answer(&self, incoming: Incoming) -> Result<(), pci::Cause> {
        let mut stream = incoming.open()?;
        stream.set_patience(Some(INTRODUCTION));
        let (role, id) = match wire::hear_hello(&mut stream) {
            Err(error @ WireError::Version { .. }) => {
                wire::refuse(&mut stream, &error)?;
                return Err(error.into());
            }
            hello => hello?,
        };
        match role {
            Role::Question => self.tell(&mut stream, id)?,
            // An old friend, or somebody who has listened to one.
            Role::Control if self.record.state(id).is_some() => {
                wire::refuse(&mut stream, &"this migration has ended")?;
            }
            Role::Control if !self.claim(id) => {
                wire::refuse(&mut stream, &"another VM is on its way here")?;
            }
            Role::Memory if *self.current() != Some(id) => {
                return Err("it belongs to no migration that is under way".into());
            }
            Role::Control | Role::Memory => {
                let call = Call { role, id, stream };
                self.calls
                    .try_send(call)
                    .map_err(|_| "nobody waits for it")?;
            }
        }
        Ok(())
    }

    /// Tells how a migration stands. One that has not been committed never will be.
    fn tell(&self, stream: &mut Stream, id: MigrationId) -> io::Result<()> {
        match self.record.on(id, DestinationInput::Asked) {
            Some(DestinationAction::SayCommitted) => wire::send(stream, Kind::Committed, &[]),
            Some(DestinationAction::Discard | DestinationAction::SayRefused) => {
                wire::refuse(stream, &"the VM does not run there, and never will")
            }
            _ => wire::send(stream, Kind::Unknown, &[]),
        }
    }

    /// Whether this is the first migration.
    fn claim(&self, id: MigrationId) -> bool {
        let mut current = self.current();
        let is_first = current.is_none();
        if is_first {
            *current = Some(id);
        }
        is_first
    }

    fn current(&self) -> std::sync::MutexGuard<'_, Option<MigrationId>> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
