//! A terminal at which a test sits.

use std::fs::{File, OpenOptions};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Termios, tcgetattr};
use tests::lab::{Case, Process, SOON};

/// A pseudo-terminal: the end that a user would sit at, and the end that programs get.
#[derive(Debug)]
pub(crate) struct Terminal {
    user: File,
    program: File,
    before: Termios,
}

impl Terminal {
    /// A new one, as a terminal is for a program that has not set it.
    pub(crate) fn open() -> Result<Self> {
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

    /// Starts a guest on the terminal, of which the test sees what it says, and waits until that is in raw mode.
    pub(crate) fn start(&self, case: &Case<'_>, outrigger: &Command) -> Result<Process> {
        // A session of its own, whose terminal this is, as a login has it.
        let mut command = Command::new("setsid");
        command.arg("--ctty").arg(outrigger.get_program());
        command
            .args(outrigger.get_args())
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

    /// What the user types on.
    pub(crate) fn keyboard(&mut self) -> &mut File {
        &mut self.user
    }

    /// Whether the program has left it as it was.
    pub(crate) fn is_as_before(&self) -> Result<()> {
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

/// Waits for something that nothing reports.
pub(crate) fn poll(what: &str, mut condition: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + SOON;
    while !condition()? {
        if Instant::now() > deadline {
            bail!("waited in vain for {what}");
        }
        thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}
