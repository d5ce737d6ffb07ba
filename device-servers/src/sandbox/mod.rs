//! What a server takes from itself before it serves anybody: whoever takes it over, a guest above all, has the device's
//! own files and the connection, and nothing else.
//!
//! A server opens what it needs, enters the sandbox, and then starts its threads, which are in it from their first
//! instruction. In there
//!
//! * there are no capabilities, and no program that is executed could get any;
//! * no file can be opened, no socket connected to, and nobody outside be sent a signal (Landlock, as far as the kernel
//!   has it);
//! * a system call that the server does not need ends it (seccomp, `SIGSYS`);
//! * there are no core dumps, which would have guest memory in them.
//!
//! io_uring does what it is told to without seccomp's being asked. What it could do more than the server itself is
//! refused by Landlock only, so that a server with a ring does well to restrict it (`IORING_REGISTER_RESTRICTIONS`).

mod capabilities;
mod files;
mod system_calls;

use std::io;

use rustix::process::{Resource, Rlimit, chdir, setrlimit};
use rustix::thread::set_no_new_privs;

/// Why a server is not in its sandbox.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// The server has threads that would stay outside.
    #[error("a server has to enter its sandbox before it starts threads, and has {0} of them")]
    Threads(usize),
    /// The kernel refused a step.
    #[error("the sandbox cannot {step}")]
    Step {
        /// What was to be done.
        step: &'static str,
        /// Why it was not.
        #[source]
        source: io::Error,
    },
    /// The kernel does not take Landlock's rules.
    #[error("the sandbox cannot keep files out")]
    Files(#[from] landlock::RulesetError),
    /// The kernel does not take the filter.
    #[error("the sandbox cannot filter system calls (has this kernel seccomp?)")]
    SystemCalls(#[from] seccompiler::Error),
}

/// What kind of server it is, which tells what it needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The [demo](crate::demo) device.
    Demo,
    /// A [disk](crate::disk): a file or a block device, and io_uring.
    Disk,
    /// A [network card](crate::net): a tap, and what tells whether it is up.
    Net,
}

impl Role {
    /// What its process is called.
    pub fn name(self) -> &'static str {
        match self {
            Self::Demo => "outrigger-demo",
            Self::Disk => "outrigger-disk",
            Self::Net => "outrigger-net",
        }
    }
}

/// Locks this process in, for good.
///
/// # Errors
///
/// [`SandboxError`] if it has threads already, or the kernel cannot do this. An old kernel's lack of Landlock, or of a
/// part of it, is no error.
pub fn enter(role: Role) -> Result<(), SandboxError> {
    be_alone()?;
    let no_core = Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    setrlimit(Resource::Core, no_core).map_err(step("forbid core dumps"))?;
    // The folder that it was started in is not to be held.
    chdir("/").map_err(step("leave the current folder"))?;
    capabilities::drop_all().map_err(step("drop capabilities"))?;
    set_no_new_privs(true).map_err(step("forbid new privileges"))?;
    files::keep_out()?;
    // The last step: the filter takes none of these.
    system_calls::allow_only(role)?;
    Ok(())
}

/// Capabilities and Landlock are each thread's own, so there must be but one.
fn be_alone() -> Result<(), SandboxError> {
    let threads = std::fs::read_dir("/proc/self/task");
    match threads.map(Iterator::count) {
        Ok(1) => Ok(()),
        Ok(count) => Err(SandboxError::Threads(count)),
        Err(source) => Err(step("count threads in /proc/self/task")(source)),
    }
}

fn step<E: Into<io::Error>>(step: &'static str) -> impl Fn(E) -> SandboxError {
    move |source| SandboxError::Step {
        step,
        source: source.into(),
    }
}
