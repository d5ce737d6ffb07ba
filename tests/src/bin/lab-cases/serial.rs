//! Where the serial port leads. The guests here end in a shell, to which the test speaks.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::Signal;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Termios, tcgetattr};
use tests::lab::{BOOT, Case, Process, SOON};

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
    let mut vm = terminal.start(case, SHELL)?;
    vm.wait_for("GUEST DONE", BOOT)?;
    talk(&mut vm, &mut terminal.user)?;
    terminal.is_as_before()
}

/// The terminal is as it was after SIGTERM.
pub(crate) fn terminal_sigterm(case: &mut Case<'_>) -> Result<()> {
    let terminal = Terminal::open()?;
    let mut vm = terminal.start(case, EARLY)?;
    vm.wait_for("Hypervisor detected: KVM", BOOT)?;
    vm.signal(Signal::TERM)?;
    let exit = vm.wait(SOON)?;
    ensure!(exit.status.success(), "after SIGTERM: {}", exit.status);
    terminal.is_as_before()
}

/// Ctrl-A x leaves, and the terminal is as it was.
pub(crate) fn terminal_escape(case: &mut Case<'_>) -> Result<()> {
    let mut terminal = Terminal::open()?;
    let mut vm = terminal.start(case, EARLY)?;
    vm.wait_for("Hypervisor detected: KVM", BOOT)?;
    terminal.user.write_all(b"\x01x")?;
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

/// A pseudo-terminal: the end that a user would sit at, and the end that programs get.
struct Terminal {
    user: File,
    program: File,
    before: Termios,
}

impl Terminal {
    fn open() -> Result<Self> {
        let user = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY)?;
        grantpt(&user)?;
        unlockpt(&user)?;
        let name = ptsname(&user, Vec::new())?;
        let program = OpenOptions::new()
            .read(true)
            .write(true)
            .open(name.to_str()?)?;
        let before = tcgetattr(&program)?;
        Ok(Self {
            user: user.into(),
            program,
            before,
        })
    }

    /// Starts a guest on the terminal and waits until that is in raw mode.
    fn start(&self, case: &Case<'_>, parameters: &str) -> Result<Process> {
        let linux = case.linux("6.12", parameters);
        // A session of its own, whose terminal this is, as a login has it.
        let mut command = Command::new("setsid");
        command.arg("--ctty").arg(linux.get_program());
        command
            .args(linux.get_args())
            .stdin(self.program.try_clone()?)
            .stdout(self.program.try_clone()?);
        let vm = case.start(command.stderr(Stdio::piped()))?;
        vm.follow(self.user.try_clone()?);
        poll("raw mode", || {
            Ok(!tcgetattr(&self.program)?
                .local_modes
                .contains(LocalModes::ICANON))
        })?;
        Ok(vm)
    }

    fn is_as_before(&self) -> Result<()> {
        let now = tcgetattr(&self.program)?;
        let modes = |t: &Termios| {
            (
                t.input_modes,
                t.output_modes,
                t.control_modes,
                t.local_modes,
            )
        };
        ensure!(
            modes(&now) == modes(&self.before),
            "the terminal is left as {now:?}"
        );
        Ok(())
    }
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

/// Waits for something that nothing reports.
fn poll(what: &str, mut condition: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + SOON;
    while !condition()? {
        if Instant::now() > deadline {
            bail!("waited in vain for {what}");
        }
        thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}
