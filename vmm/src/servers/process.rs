//! The process of a server: started, watched and reaped.

use std::io::{self, PipeWriter};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::process::{Child, Command, ExitStatus};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Once, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use event_manager::{EventOps, Events, MutEventSubscriber};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::retry_on_intr;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::built_in::BuiltIn;
use crate::event_loop::watch;

/// This program, even if its file has been replaced since it was started.
const THIS_PROGRAM: &str = "/proc/self/exe";

/// How long the kernel may take to end a process that is killed: it finishes what it has begun with the host's storage.
const KILLED: Duration = Duration::from_secs(1);

/// A server's process. It is killed, if it still runs, when this is dropped, unless it has been [left](Self::leave).
#[derive(Debug)]
pub(crate) struct Process {
    id: String,
    /// None if it was started by the process that had the VM before.
    child: Mutex<Option<Child>>,
    /// A pidfd: readable when the process has ended.
    ended: Arc<OwnedFd>,
    is_left: AtomicBool,
    reported: Once,
}

/// How a process has ended.
#[derive(Debug, Clone, Copy)]
enum End {
    /// As its parent hears.
    Status(ExitStatus),
    /// Only its parent hears.
    Unknown,
}

impl Process {
    /// Starts the server of `device` with these as its standard input and output.
    pub(super) fn spawn(
        device: &BuiltIn,
        input: UnixStream,
        output: PipeWriter,
    ) -> io::Result<Self> {
        let mut command = Command::new(THIS_PROGRAM);
        command.arg0("outrigger").arg("serve");
        command.args(&device.arguments);
        command.arg(format!("--vm={}", std::process::id()));
        command.args(verbosity());
        command.stdin(OwnedFd::from(input)).stdout(output);
        let mut child = command.spawn()?;
        // Its ends have to be its alone, so that they are closed when it has ended.
        drop(command);
        match pidfd_open(Pid::from_child(&child), PidfdFlags::empty()) {
            Ok(ended) => Ok(Self::new(device.id.clone(), Some(child), Arc::new(ended))),
            Err(errno) => {
                child.kill()?;
                child.wait()?;
                Err(errno.into())
            }
        }
    }

    /// The server of a device that another process has started, of which this is the pidfd.
    pub(crate) fn inherit(id: &str, pidfd: Arc<OwnedFd>) -> Self {
        Self::new(id.to_owned(), None, pidfd)
    }

    fn new(id: String, child: Option<Child>, ended: Arc<OwnedFd>) -> Self {
        Self {
            id,
            child: Mutex::new(child),
            ended,
            is_left: AtomicBool::new(false),
            reported: Once::new(),
        }
    }

    /// What another process has to know it by.
    pub(crate) fn pidfd(&self) -> &Arc<OwnedFd> {
        &self.ended
    }

    /// Leaves it to another process, which goes on with it. It is not ended here any more, and forgotten when it ends.
    pub(super) fn leave(&self) {
        self.is_left.store(true, Ordering::Release);
        let Some(mut child) = self.child().take() else {
            return;
        };
        let reaper = thread::Builder::new().name("reaper".into());
        let reaping = reaper.spawn(move || child.wait());
        if let Err(error) = reaping {
            log::debug!("{}: nobody waits for its server to end: {error}", self.id);
        }
    }

    /// What its device is called.
    pub(crate) fn id(&self) -> &str {
        &self.id
    }

    /// Waits until `deadline` for the process to end by itself. After that, it is killed.
    pub(super) fn finish(&self, deadline: Instant) {
        match self.wait(deadline) {
            Ok(Some(End::Unknown)) => {}
            Ok(Some(End::Status(status))) if status.success() => {}
            Ok(None) => log::warn!("{}: its server does not end, and is killed", self.id),
            _ => self.report_end(),
        }
        self.kill();
    }

    /// Waits until `deadline` for the process to end, and says how it did, if it has.
    pub(super) fn end(&self, deadline: Instant) -> Option<String> {
        match self.wait(deadline) {
            Ok(Some(End::Status(status))) if status.signal() == Some(libc::SIGSYS) => {
                Some(format!(
                    "{status}, for a system call that its sandbox forbids; the kernel's log has its number"
                ))
            }
            Ok(Some(End::Status(status))) => Some(status.to_string()),
            Ok(Some(End::Unknown)) => Some("it was started by another process".to_owned()),
            Ok(None) => None,
            // Whoever started this process made it ignore SIGCHLD, and the kernel has forgotten.
            Err(error) => Some(error.to_string()),
        }
    }

    /// As [`report_end`](Self::report_end), when its connection has gone: that goes a moment before the process, which
    /// this waits for.
    pub(crate) fn report_end_soon(&self) {
        let _ = is_readable(&self.ended, Instant::now() + Duration::from_millis(100));
        self.report_end();
    }

    /// Says in the log, once, how the process ended, if it has.
    pub(crate) fn report_end(&self) {
        if let Some(end) = self.end(Instant::now()) {
            self.reported
                .call_once(|| log::warn!("{}: its server has ended: {end}", self.id));
        }
    }

    fn wait(&self, deadline: Instant) -> io::Result<Option<End>> {
        let has_ended = is_readable(&self.ended, deadline)?;
        match self.child().as_mut() {
            Some(child) => Ok(child.try_wait()?.map(End::Status)),
            None => Ok(has_ended.then_some(End::Unknown)),
        }
    }

    fn kill(&self) {
        if self.is_left.load(Ordering::Acquire) {
            return;
        }
        // This fails only if the process is no more. Its number may be another's by then.
        let _ = pidfd_send_signal(&self.ended, Signal::KILL);
        if let Ok(None) = self.wait(Instant::now() + KILLED) {
            log::warn!(
                "{}: its server was killed and has not ended yet: the host's storage or network does not answer",
                self.id
            );
        }
    }

    fn child(&self) -> MutexGuard<'_, Option<Child>> {
        self.child.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Waits until a descriptor is readable, or `deadline` has passed, and returns whether it is readable.
pub(super) fn is_readable(fd: &impl AsFd, deadline: Instant) -> io::Result<bool> {
    let limit = deadline.saturating_duration_since(Instant::now());
    let limit = Timespec::try_from(limit).map_err(io::Error::other)?;
    let ready = retry_on_intr(|| poll(&mut [PollFd::new(fd, PollFlags::IN)], Some(&limit)))?;
    Ok(ready > 0)
}

/// As verbose as this process is.
fn verbosity() -> Option<&'static str> {
    match log::max_level() {
        log::LevelFilter::Info => Some("-v"),
        log::LevelFilter::Debug => Some("-vv"),
        log::LevelFilter::Trace => Some("-vvv"),
        _ => None,
    }
}

/// Hears of the end of a server that should have gone on.
pub(crate) struct Exit(pub(crate) Arc<Process>);

impl MutEventSubscriber for Exit {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        watch(ops, &self.0.ended);
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        self.0.report_end();
        if let Err(error) = ops.remove(events) {
            log::debug!("cannot stop watching a server's process: {error}");
        }
    }
}
