//! A server for the VM that started it: the connection is standard input.
//!
//! Standard output leads to that VM too, which reads there that the server is [ready](vmm::SERVER_READY), or why there is
//! none. From then on, both are nothing.
#![expect(
    unsafe_code,
    reason = "descriptors that the process was started with have only numbers"
)]

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::ExitCode;

use anyhow::Context as _;
use rustix::process::setsid;
use rustix::stdio::{dup2_stdin, dup2_stdout};
use rustix::thread::set_name;
use vfio_user_server::{Device, Ended, Server};

/// Serves the device that `server` makes until the VM has ended. Not the process that is the VM now: a VM takes its
/// connections along when it moves to another.
pub(super) fn serve<D: Device>(
    name: &str,
    server: impl FnOnce() -> anyhow::Result<Server<D>>,
) -> anyhow::Result<ExitCode> {
    close_strangers().context("cannot close what others have left open")?;
    let (stream, mut report) =
        take_standard().context("cannot take over what it is started with")?;
    detach(name)?;
    let mut server = match server() {
        Ok(server) => server,
        Err(error) => {
            write!(report, "{error:#}")?;
            return Ok(ExitCode::FAILURE);
        }
    };
    report.write_all(vmm::SERVER_READY)?;
    drop(report);
    match server.serve(stream)? {
        Ended::Closed => Ok(ExitCode::SUCCESS),
        ended => {
            log::warn!("lost the VM: {ended}");
            Ok(ExitCode::FAILURE)
        }
    }
}

/// Closes all descriptors but the standard ones. A VM has files of its own, and such as it was started with itself, which
/// are no business of a server's.
fn close_strangers() -> io::Result<()> {
    // SAFETY: this process has opened nothing yet; whatever has these numbers was open when it was started, and nothing
    // in it owns that.
    let result = unsafe { libc::close_range(3, libc::c_uint::MAX, 0) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Takes the connection and the report, and puts nothing in their places.
fn take_standard() -> io::Result<(UnixStream, File)> {
    let stream: OwnedFd = io::stdin().as_fd().try_clone_to_owned()?;
    let report: OwnedFd = io::stdout().as_fd().try_clone_to_owned()?;
    let null = File::options().read(true).write(true).open("/dev/null")?;
    dup2_stdin(&null)?;
    dup2_stdout(&null)?;
    Ok((stream.into(), report.into()))
}

/// Leaves the session of the VM, whose terminal's signals are not for its servers, and takes a name in place of that of
/// the link by which it was started.
fn detach(name: &str) -> anyhow::Result<()> {
    setsid().context("cannot have a session of its own")?;
    set_name(&CString::new(name)?).context("cannot take a name")?;
    Ok(())
}
