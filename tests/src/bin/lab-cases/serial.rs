//! Where the serial port leads. The guests here end in a shell, to which the test speaks.

use std::fs;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use tests::lab::{BOOT, Case, Process, SOON};

use crate::terminal::{Terminal, poll};

const SHELL: &str = "outrigger.end=shell";
/// The kernel talks from its first moment.
const EARLY: &str = "earlyprintk=serial,ttyS0 loglevel=7";

/// All output lands in the file, and none elsewhere.
pub(crate) fn file(case: &mut Case<'_>) -> Result<()> {
    let path = case.path("serial");
    let mut command = case.linux("6.12", "");
    let mut vm = case.start(
        command
            .arg("--serial")
            .arg(format!("file={}", path.display())),
    )?;
    let exit = vm.wait(BOOT)?;
    ensure!(exit.status.success(), "after power off: {}", exit.status);
    ensure!(
        fs::read_to_string(path)?.contains("GUEST DONE"),
        "the file is not complete"
    );
    ensure!(
        vm.lines().is_empty(),
        "something was printed: {:?}",
        vm.lines()
    );
    Ok(())
}

/// Who connects to the socket sees what the guest prints and types what it reads. The socket ends with the VMM.
pub(crate) fn socket(case: &mut Case<'_>) -> Result<()> {
    let path = case.path("serial");
    let mut command = case.linux("6.12", SHELL);
    let mut vm = case.start(
        command
            .arg("--serial")
            .arg(format!("socket={}", path.display())),
    )?;
    let mut stream = connect(&path)?;
    vm.follow(stream.try_clone()?);
    vm.wait_for("GUEST DONE", BOOT)?;
    talk(&mut vm, &mut stream)?;
    ensure!(!path.exists(), "the socket is still there");
    Ok(())
}

/// Output and input by a terminal, which is as it was after the guest has powered off.
pub(crate) fn terminal_poweroff(case: &mut Case<'_>) -> Result<()> {
    let mut terminal = Terminal::open()?;
    let mut vm = terminal.start(case, &case.linux("6.12", SHELL))?;
    vm.wait_for("GUEST DONE", BOOT)?;
    talk(&mut vm, terminal.keyboard())?;
    terminal.is_as_before()
}

/// The terminal is as it was after SIGTERM.
pub(crate) fn terminal_sigterm(case: &mut Case<'_>) -> Result<()> {
    let terminal = Terminal::open()?;
    let mut vm = terminal.start(case, &case.linux("6.12", EARLY))?;
    vm.wait_for("Hypervisor detected: KVM", BOOT)?;
    vm.signal(Signal::TERM)?;
    let exit = vm.wait(SOON)?;
    ensure!(exit.status.success(), "after SIGTERM: {}", exit.status);
    terminal.is_as_before()
}

/// Ctrl-A x leaves, and the terminal is as it was.
pub(crate) fn terminal_escape(case: &mut Case<'_>) -> Result<()> {
    let mut terminal = Terminal::open()?;
    let mut vm = terminal.start(case, &case.linux("6.12", EARLY))?;
    vm.wait_for("Hypervisor detected: KVM", BOOT)?;
    terminal.keyboard().write_all(b"\x01x")?;
    let exit = vm.wait(SOON)?;
    ensure!(exit.status.success(), "after Ctrl-A x: {}", exit.status);
    terminal.is_as_before()
}

/// Has the guest's shell calculate something, so that the answer is not an echo, and power off.
fn talk(vm: &mut Process, input: &mut impl Write) -> Result<()> {
    input.write_all(b"echo answer $((6 * 7))\n")?;
    vm.wait_for("answer 42", SOON)?;
    input.write_all(b"poweroff -f\n")?;
    let exit = vm.wait(SOON)?;
    ensure!(exit.status.success(), "after power off: {}", exit.status);
    Ok(())
}

/// Connects to a socket that is about to be there.
pub(crate) fn connect(path: &Path) -> Result<UnixStream> {
    let mut stream = None;
    poll("the serial socket", || {
        stream = UnixStream::connect(path).ok();
        Ok(stream.is_some())
    })?;
    stream.context("no connection")
}
