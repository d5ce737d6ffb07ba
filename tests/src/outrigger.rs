//! The program under test.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};
use std::{env, io, thread};

use crate::lab::{Process, SOON};
use crate::skipped::skip;

/// The `outrigger` binary, built in the profile of the test that asks for it.
pub fn binary() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| {
        let mut build = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        build.args(["build", "--quiet", "--package", "vmm"]);
        let profile = if cfg!(debug_assertions) {
            "dev"
        } else {
            "release"
        };
        build.args(["--profile", profile]);
        let status = build.status();
        assert!(
            status.is_ok_and(|status| status.success()),
            "cannot build outrigger"
        );
        // The test is target/PROFILE/deps/NAME.
        let test = env::current_exe().unwrap_or_default();
        let folder = test.ancestors().nth(2).unwrap_or_else(|| Path::new("."));
        folder.join("outrigger")
    })
}

/// Runs `outrigger` without input until it ends.
///
/// # Errors
/// When it cannot be started, or does not end within a minute.
pub fn run(arguments: &[&str]) -> io::Result<Output> {
    let child = start(arguments)?;
    wait(child)
}

/// Runs a tiny guest with the device behind a socket until it ends.
///
/// # Errors
/// As of [`run`].
pub fn run_with_device(kernel: &Path, socket: &Path) -> io::Result<Output> {
    let socket = format!("socket={}", socket.display());
    let kernel = kernel.to_string_lossy();
    run(&[
        "--kernel",
        &kernel,
        "--memory",
        "size=64M",
        "--user-device",
        &socket,
    ])
}

/// Starts a server of the demo device in a process of its own, and waits until it listens.
///
/// # Errors
/// When it cannot be started, or does not listen.
pub fn serve_demo(socket: &Path) -> anyhow::Result<Process> {
    let mut command = Process::command(binary());
    command.args(["serve", "demo", "--socket"]).arg(socket);
    let mut server = Process::start(&mut command, Path::new("/dev/null"))?;
    server.wait_for("listening", SOON)?;
    Ok(server)
}

/// Starts `outrigger` without input, its output kept.
///
/// # Errors
/// When it cannot be started.
pub fn start(arguments: &[&str]) -> io::Result<Child> {
    Command::new(binary())
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
}

/// Waits for it to end.
///
/// # Errors
/// When it does not within a minute; it is killed then.
pub fn wait(mut child: Child) -> io::Result<Output> {
    wait_status(&mut child)?;
    child.wait_with_output()
}

fn wait_status(child: &mut Child) -> io::Result<ExitStatus> {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        if Instant::now() > deadline {
            child.kill()?;
            return Err(io::ErrorKind::TimedOut.into());
        }
        thread::sleep(Duration::from_millis(2));
    }
}

/// Whether this machine can run guests at all. If not, the test that asks is [skipped](skip).
pub fn has_kvm() -> bool {
    let mut options = File::options();
    let available = options.read(true).write(true).open("/dev/kvm").is_ok();
    if !available {
        skip("/dev/kvm cannot be opened for reading and writing");
    }
    available
}
