//! A Debian system on a disk (`tests/lab/debian-image.sh`), used as a person does: by logging in at the terminal.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tests::lab::{Case, Process};

use crate::terminal::Terminal;

/// How long all of Debian's services may take to start, or to stop.
const SERVICES: Duration = Duration::from_secs(600);
/// How long anything that is typed may take.
const TYPED: Duration = Duration::from_secs(120);

/// Cloud Hypervisor's command with the kernel of the system on the disk. In Debian's kernels the driver for virtio disks is
/// a module, so the initramfs that Debian has made for that system goes with it.
pub(crate) fn with_initramfs(case: &mut Case<'_>) -> Result<()> {
    let mut command = case.outrigger();
    command.arg("--kernel").arg(case.images().debian("vmlinuz"));
    command
        .arg("--initramfs")
        .arg(case.images().debian("initrd.img"));
    session(case, &mut command)
}

/// Cloud Hypervisor's command as it is: this kernel has everything in it.
pub(crate) fn without_initramfs(case: &mut Case<'_>) -> Result<()> {
    let mut command = case.outrigger();
    command.arg("--kernel").arg(case.images().kernel("iommufd"));
    session(case, &mut command)
}

/// Somebody logs in, works, reboots, finds the work again, and powers off. The file system is in order then.
fn session(case: &Case<'_>, outrigger: &mut Command) -> Result<()> {
    let disk = case.path("focal.raw");
    fs::copy(case.images().debian("disk.img"), &disk)?;
    outrigger.arg("--disk");
    outrigger.arg(format!("path={}", disk.display()));
    outrigger.args(["--console", "off", "--serial", "tty", "--cmdline"]);
    outrigger.arg("console=ttyS0 root=/dev/vda1 rw");
    outrigger.args(["--cpus", "4", "--memory", "size=512M"]);

    let terminal = Terminal::open()?;
    let vm = terminal.start(case, outrigger)?;
    let mut session = Session { terminal, vm };
    session.log_in()?;
    session.ask(
        "echo $(nproc) CPUs, root $(findmnt -no SOURCE,FSTYPE,OPTIONS /)",
        "4 CPUs, root /dev/vda1 ext4 rw",
    )?;
    let size = fs::metadata(&disk)?.len();
    session.ask("lsblk -bdno SIZE,RO /dev/vda", &format!("{size}  0"))?;
    session.type_line("dd if=/dev/urandom of=work bs=1M count=16 conv=fsync")?;
    let checksum = session.checksum()?;

    session.type_line("reboot")?;
    session.vm.wait_for("reboot: Restarting system", SERVICES)?;
    session.log_in().context("after the reboot")?;
    ensure!(
        session.checksum()? == checksum,
        "what was written before the reboot has changed"
    );

    session.type_line("poweroff")?;
    let exit = session.vm.wait(SERVICES)?;
    ensure!(exit.status.success(), "after power off: {}", exit.status);
    session.terminal.is_as_before()?;
    let output = tool("e2fsck", &["-fn"], &disk)?;
    ensure!(!output.contains("recover"), "e2fsck: {output}");
    Ok(())
}

/// Someone at the terminal of a guest.
struct Session {
    terminal: Terminal,
    vm: Process,
}

impl Session {
    fn log_in(&mut self) -> Result<()> {
        self.vm.wait_for_prompt("debian login: ", SERVICES)?;
        self.type_line("root")?;
        self.vm.wait_for_prompt("Password: ", TYPED)?;
        self.type_line("outrigger")?;
        self.vm.wait_for_prompt("root@debian:~# ", TYPED)
    }

    fn type_line(&mut self, line: &str) -> Result<()> {
        Ok(writeln!(self.terminal.keyboard(), "{line}")?)
    }

    /// Types a command and waits for a line with `answer`, which is not in the command.
    fn ask(&mut self, command: &str, answer: &str) -> Result<String> {
        self.type_line(command)?;
        let line = self.vm.wait_for(answer, TYPED);
        Ok(line.with_context(|| command.to_owned())?.text)
    }

    /// The checksum of the file `work`.
    fn checksum(&mut self) -> Result<String> {
        let line = self.ask("sha256sum work", "  work")?;
        let checksum = line.split_whitespace().find(|word| word.len() == 64);
        Ok(checksum.with_context(|| line.clone())?.to_owned())
    }
}

/// What a program says about the file system in the first partition.
fn tool(program: &str, arguments: &[&str], disk: &Path) -> Result<String> {
    let file_system = format!("{}?offset=1048576", disk.display());
    let output = Command::new(program)
        .args(arguments)
        .arg(file_system)
        .output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(output.status.success(), "{program}: {text}");
    Ok(text)
}
