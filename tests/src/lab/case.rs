//! What a case is given: a folder of its own, device servers, and guests to boot.

use std::cell::Cell;
use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use std::{env, fs};

use anyhow::{Context, Result, bail, ensure};
use tempfile::TempDir;

use super::{Process, Stream};

/// How long a guest may take to boot and to report, on a slow machine.
pub const BOOT: Duration = Duration::from_secs(180);
/// How long anything else may take. (On a busy machine, KVM's own waits for other CPUs took 20 s.)
pub const SOON: Duration = Duration::from_secs(60);
/// How long it may take to find out that something cannot be, without a guest.
const AT_ONCE: Duration = Duration::from_secs(5);
/// A user who may do nothing.
pub const NOBODY: u32 = 65534;

/// What `tests/lab/setup.sh` has made: kernels and initramfs images.
#[derive(Clone, Debug)]
pub struct Images {
    folder: PathBuf,
}

impl Images {
    /// The images under the folder `target/lab`.
    pub fn new(folder: PathBuf) -> Self {
        Self { folder }
    }

    /// `target/lab`.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The bzImage of a kernel version.
    pub fn kernel(&self, version: &str) -> PathBuf {
        self.folder.join("kernels").join(version).join("vmlinuz")
    }

    /// The same as an ELF file with a PVH note.
    pub fn elf_kernel(&self, version: &str) -> PathBuf {
        self.folder.join(format!("images/vmlinux-{version}"))
    }

    /// The initramfs with the guest program and the modules of a kernel version.
    pub fn initramfs(&self, version: &str) -> PathBuf {
        self.folder.join(format!("images/initramfs-{version}.cpio"))
    }

    /// The unit tests of the machine.
    pub fn unit_tests(&self) -> PathBuf {
        self.folder.join("unit-tests")
    }

    /// A file of the Debian system that `tests/lab/debian-image.sh` has installed.
    pub fn debian(&self, name: &str) -> PathBuf {
        self.folder.join("debian").join(name)
    }

    /// Where logs are kept.
    pub fn logs(&self) -> PathBuf {
        self.folder.join("logs")
    }
}

/// A case that is running.
#[derive(Debug)]
pub struct Case<'a> {
    name: &'a str,
    images: &'a Images,
    folder: TempDir,
    programs: PathBuf,
    devices: Vec<Process>,
    started: Cell<usize>,
    seed: u64,
}

impl<'a> Case<'a> {
    pub(super) fn new(name: &'a str, images: &'a Images, seed: u64) -> Result<Self> {
        let programs = env::current_exe()?;
        let programs = programs.parent().context("this program is nowhere")?;
        Ok(Self {
            name,
            images,
            folder: tempfile::tempdir()?,
            programs: programs.to_owned(),
            devices: Vec::new(),
            started: Cell::new(0),
            seed,
        })
    }

    /// A path in a folder that ends with the case.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// What all that the case does by chance is to follow from.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// The kernels and initramfs images.
    pub fn images(&self) -> &Images {
        self.images
    }

    /// Starts a program, with a log of its own.
    ///
    /// # Errors
    /// When it does not start.
    pub fn start(&self, command: &mut Command) -> Result<Process> {
        self.started.set(self.started.get() + 1);
        let program = Path::new(command.get_program())
            .file_name()
            .unwrap_or_default();
        let number = self.started.get();
        let log = format!("{}.{number}-{}.log", self.name, program.display());
        Process::start(command, &self.images.logs().join(log))
    }

    /// Starts a server with a demo device that lives as long as the case, and returns the path of its socket.
    ///
    /// # Errors
    /// When it does not listen.
    pub fn device(&mut self) -> Result<PathBuf> {
        let (server, socket) = self.server()?;
        self.devices.push(server);
        Ok(socket)
    }

    /// Starts a server with a demo device, and returns it with the path of its socket.
    ///
    /// # Errors
    /// When it does not listen.
    pub fn server(&self) -> Result<(Process, PathBuf)> {
        let socket = self.path(&format!("device-{}", self.started.get()));
        let mut command = self.outrigger();
        command.args(["serve", "demo", "--socket"]);
        let mut server = self.start(command.arg(&socket))?;
        server.wait_for("listening", SOON)?;
        Ok((server, socket))
    }

    /// Outrigger, without arguments.
    pub fn outrigger(&self) -> Command {
        Process::command(&self.program("outrigger"))
    }

    /// Where a program is that was built with this one.
    pub fn program(&self, name: &str) -> PathBuf {
        self.programs.join(name)
    }

    /// Outrigger as [`NOBODY`], who may not even be allowed to look into the checkout, but can read the case's folder.
    ///
    /// # Errors
    /// When the program cannot be copied.
    pub fn outrigger_as_nobody(&self) -> Result<Command> {
        let program = self.path("outrigger");
        if !program.exists() {
            fs::set_permissions(self.folder.path(), Permissions::from_mode(0o755))?;
            fs::copy(self.program("outrigger"), &program)?;
        }
        let mut command = Process::command(&program);
        command.uid(NOBODY);
        Ok(command)
    }

    /// Runs a command that is to end at once with status 1 and one line on standard error, in which all of `parts` are.
    ///
    /// # Errors
    /// When it does something else.
    pub fn expect_refusal(&self, command: &mut Command, parts: &[&str]) -> Result<()> {
        let mut process = self.start(command)?;
        let exit = process.wait(AT_ONCE)?;
        ensure!(
            exit.status.code() == Some(1),
            "not refused: {}",
            exit.status
        );
        let [line] = process.lines() else {
            bail!("not one line: {:#?}", process.lines());
        };
        ensure!(line.stream == Stream::Error, "not an error: {}", line.text);
        let missing = parts.iter().find(|part| !line.text.contains(**part));
        ensure!(missing.is_none(), "no {missing:?} in: {}", line.text);
        Ok(())
    }

    /// Outrigger with a Debian kernel. `parameters` are added to its command line.
    pub fn linux(&self, version: &str, parameters: &str) -> Command {
        self.linux_image(&self.images.kernel(version), version, parameters)
    }

    /// Outrigger with a kernel image of version `version`.
    pub fn linux_image(&self, kernel: &Path, version: &str, parameters: &str) -> Command {
        let mut command = self.outrigger();
        command.arg("--kernel").arg(kernel);
        command
            .arg("--initramfs")
            .arg(self.images.initramfs(version));
        command
            .arg("--cmdline")
            .arg(format!("console=ttyS0 quiet panic=-1 {parameters}"));
        command
    }
}

/// The value of `--user-device` for the server at `socket`.
pub fn user_device(socket: &Path) -> String {
    format!("socket={}", socket.display())
}
