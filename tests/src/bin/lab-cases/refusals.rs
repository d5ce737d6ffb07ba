//! Devices of the host that a VM cannot have: one line says what is wrong and what to do, and no guest runs.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use tests::lab::{Case, HostDevice, NOBODY, SOON};
use tests::tiny;

use crate::iommufd;

const EDU: &str = "0000:01:00.0";
const NVME: &str = "0000:02:00.0";
const SHARED_EDU: &str = "0000:04:01.0";
const SHARED_E1000: &str = "0000:04:02.0";
const PORT: &str = "0000:00:10.0";

/// Everything that newcomers run into.
pub(crate) fn all(case: &mut Case<'_>) -> Result<()> {
    let kernel = kernel(case)?;
    names(case, &kernel).context("names")?;
    drivers(case, &kernel).context("drivers")?;
    shared_group(case, &kernel).context("a shared group")?;
    let device = HostDevice::at(EDU)?;
    device.bind("vfio-pci")?;
    no_iommufd(case, &kernel).context("iommufd")?;
    users(case, &kernel, &device).context("users")?;
    in_use(case, &kernel, &device).context("in use")
}

/// A host whose IOMMU is off.
pub(crate) fn no_iommu(case: &mut Case<'_>) -> Result<()> {
    kernel(case)?.refused(case, &[EDU], &["IOMMU is off", "intel_iommu=on"])
}

/// A host whose IOMMU lets devices interrupt it as they like.
pub(crate) fn no_remapping(case: &mut Case<'_>) -> Result<()> {
    let device = HostDevice::at(EDU)?;
    device.bind("vfio-pci")?;
    let parts = [
        "does not remap interrupts",
        "firmware",
        "allow_unsafe_interrupts=1",
    ];
    kernel(case)?.refused(case, &[EDU], &parts)
}

/// What is no device, or the same device again.
fn names(case: &Case<'_>, kernel: &Kernel) -> Result<()> {
    const ALL: &str = "`outrigger vfio list --all`";
    let refused = |path: &str, parts: &[&str]| kernel.refused(case, &[path], parts);
    refused("first", &["`first` names no device", "0000:01:00.0"])?;
    refused("0000:7f:00.0", &["no PCI device 0000:7f:00.0", ALL])?;
    refused(
        "/sys/bus/pci/devices/0000:7f:00.0/",
        &["there is no /sys/", ALL],
    )?;
    refused(
        "/sys/bus/pci",
        &["/sys/bus/pci is not the sysfs directory of"],
    )?;
    refused(PORT, &[PORT, "it is a bridge", "the devices behind it"])?;
    let device = HostDevice::at(EDU)?;
    device.bind("vfio-pci")?;
    let directory = device.path().display().to_string();
    kernel.refused(case, &["01:00.0", &directory], &[EDU, "given twice"])
}

/// A device that VFIO does not have.
fn drivers(case: &Case<'_>, kernel: &Kernel) -> Result<()> {
    let device = HostDevice::at(NVME)?;
    let remedy = format!("`outrigger vfio bind {NVME}`");
    device.bind("nvme")?;
    kernel.refused(case, &[NVME], &["bound to the host's driver nvme", &remedy])?;
    device.unbind()?;
    kernel.refused(case, &[NVME], &["bound to no driver", &remedy])
}

/// A device whose neighbour the host uses.
fn shared_group(case: &Case<'_>, kernel: &Kernel) -> Result<()> {
    let [device, neighbour] = [HostDevice::at(SHARED_EDU)?, HostDevice::at(SHARED_E1000)?];
    device.bind("vfio-pci")?;
    neighbour.bind("e1000")?;
    let group = format!("its group {}: {SHARED_E1000} (e1000)", device.group()?);
    let remedy = format!("`outrigger vfio bind {SHARED_E1000}`");
    kernel.refused(case, &[SHARED_EDU], &[&group, &remedy])
}

/// Debian's kernels have none.
fn no_iommufd(case: &Case<'_>, kernel: &Kernel) -> Result<()> {
    if iommufd::is_there() {
        return Ok(());
    }
    let mut command = kernel.command(case.outrigger(), &[EDU]);
    let command = command.args(["--platform", "iommufd=on"]);
    case.expect_refusal(
        command,
        &["no /dev/iommu", "leave --platform iommufd=on out"],
    )
}

/// A user who may not open the device, and one who may not lock as much memory as it takes.
fn users(case: &Case<'_>, kernel: &Kernel, device: &HostDevice) -> Result<()> {
    let group = device.group_file()?;
    fs::set_permissions("/dev/kvm", Permissions::from_mode(0o666))?;
    let refused = |parts: &[&str]| {
        let mut command = kernel.command(case.outrigger_as_nobody()?, &[EDU]);
        case.expect_refusal(&mut command, parts)
    };
    let file = group.display().to_string();
    refused(&["no permission", &file, "chown $USER"])?;
    chown(&group, Some(NOBODY), None)?;
    // 64 MiB; without a privilege, Linux lets a process lock 8.
    let parts = [
        "67108864 bytes of guest RAM",
        "RLIMIT_MEMLOCK",
        "ulimit -l",
        "may lock 8388608",
    ];
    refused(&parts)?;
    if !iommufd::is_there() {
        return Ok(());
    }
    chown(iommufd::node(device.path())?, Some(NOBODY), None)?;
    refused(&parts)
}

/// A device that somebody else has: a program, and another VM.
fn in_use(case: &Case<'_>, kernel: &Kernel, device: &HostDevice) -> Result<()> {
    let group = device.group_file()?;
    let file = match iommufd::is_there() {
        true => iommufd::node(device.path())?,
        false => group.display().to_string(),
    };
    let parts = [&file, "in use: by another VM", "fuser"];
    let holder = File::options().read(true).write(true).open(&group)?;
    kernel.refused(case, &[EDU], &parts)?;
    drop(holder);

    let mut vm = case.start(&mut kernel.command(case.outrigger(), &[EDU]))?;
    vm.wait_for("running", SOON)?;
    kernel.refused(case, &[EDU], &parts)?;
    vm.signal(Signal::TERM)?;
    let exit = vm.wait(SOON)?;
    ensure!(exit.status.success(), "the first VM: {}", exit.status);
    Ok(())
}

/// A kernel that does next to nothing, in a file that everybody may read.
struct Kernel(PathBuf);

fn kernel(case: &Case<'_>) -> Result<Kernel> {
    let guest = tiny::guest(|code| {
        code.print_line("running")?;
        code.halt()
    })?;
    let path = case.path("kernel");
    fs::copy(guest.path(), &path)?;
    fs::set_permissions(&path, Permissions::from_mode(0o644))?;
    Ok(Kernel(path))
}

impl Kernel {
    /// What would boot it with these devices.
    fn command(&self, mut outrigger: Command, devices: &[&str]) -> Command {
        outrigger.arg("--kernel").arg(&self.0);
        outrigger.args(["--memory", "size=64M", "--device"]);
        outrigger.args(devices.iter().map(|device| format!("path={device}")));
        outrigger
    }

    fn refused(&self, case: &Case<'_>, devices: &[&str], parts: &[&str]) -> Result<()> {
        case.expect_refusal(&mut self.command(case.outrigger(), devices), parts)
    }
}
