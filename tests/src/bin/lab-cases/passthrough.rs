//! Devices of the host in the guest, by the kernel's VFIO.

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use tests::lab::{BOOT, Case, HostDevice, Mtty, Process, Report, SOON, join_wire};

use crate::iommufd;

pub(crate) const EDU: &str = "0000:01:00.0";
pub(crate) const NVME: &str = "0000:02:00.0";
pub(crate) const E1000E: &str = "0000:03:00.0";
const SHARED_EDU: &str = "0000:04:01.0";
const SHARED_E1000: &str = "0000:04:02.0";

/// A device of each kind, in one container, before and after a reset of the guest.
pub(crate) fn all_kinds(case: &mut Case<'_>) -> Result<()> {
    const CHECKS: [&str; 13] = [
        "edu",
        "edu-dma",
        "edu-msi",
        "edu-intx",
        "edu-decode",
        "nvme-sleep",
        "nvme",
        "e1000e-rom",
        "e1000e-io",
        "e1000e-msix",
        "e1000e-intx",
        "mtty-io",
        "mtty-loop",
    ];
    let devices = give([EDU, NVME, E1000E])?;
    let mtty = Mtty::create("83b8f4f2-509f-382f-3c1e-e6bfe0fa1001")?;
    join_wire()?;
    let mut command = case.linux("host", "outrigger.end=reboot");
    command.args(["--cpus", "2", "--device"]);
    for device in &devices {
        let rom = if device.address() == E1000E {
            "on"
        } else {
            "off"
        };
        command.arg(format!("path={}/,rom={rom}", device.path().display()));
    }
    command.arg(format!("path={}", mtty.path().display()));

    let mut vm = case.start(&mut command)?;
    let first = Report::wait(&mut vm, BOOT)?;
    iommufd::is_used(&vm, iommufd::is_there())?;
    let second = Report::wait(&mut vm, BOOT)?;
    end(&mut vm)?;
    first.passed(1, &CHECKS)?;
    second.passed(1, &CHECKS)?;
    let kept = [first.fact("nvme-kept")?, second.fact("nvme-kept")?];
    ensure!(kept == ["false", "true"], "the file was kept: {kept:?}");
    Ok(())
}

/// Both devices of a group go to a VM, before and after a reset of the guest; then one of them.
pub(crate) fn shared_group(case: &mut Case<'_>) -> Result<()> {
    const CHECKS: [&str; 5] = ["edu", "edu-dma", "edu-msi", "edu-intx", "edu-decode"];
    let devices = give([SHARED_EDU, SHARED_E1000])?;
    let [edu, e1000] = devices
        .each_ref()
        .map(|device| format!("path={}", device.address()));

    let mut command = case.linux("host", "outrigger.end=reboot");
    command.args(["-vv", "--memory", "size=256M"]);
    let mut vm = case.start(command.args(["--device", &edu, &e1000]))?;
    let first = Report::wait(&mut vm, BOOT)?;
    let second = Report::wait(&mut vm, BOOT)?;
    end(&mut vm)?;
    first.passed(1, &CHECKS).context("both")?;
    second.passed(1, &CHECKS).context("both, after a reset")?;

    let mut command = case.linux("host", "");
    command.args(["-vv", "--memory", "size=256M"]);
    let mut vm = case.start(command.args(["--device", &edu]))?;
    let report = Report::wait(&mut vm, BOOT)?;
    let exit = vm.wait(SOON)?;
    ensure!(exit.status.success(), "after power off: {}", exit.status);
    report.passed(1, &CHECKS).context("one")
}

/// Gives devices to VFIO.
pub(crate) fn give<const N: usize>(addresses: [&str; N]) -> Result<[HostDevice; N]> {
    let mut devices = Vec::with_capacity(N);
    for address in addresses {
        let device = HostDevice::at(address)?;
        device.bind("vfio-pci")?;
        devices.push(device);
    }
    devices.try_into().ok().context("as many as there were")
}

/// Ends a VM, which has nothing to complain about when it takes everything apart.
pub(crate) fn end(vm: &mut Process) -> Result<()> {
    vm.signal(Signal::TERM)?;
    let exit = vm.wait(SOON)?;
    ensure!(exit.status.success(), "after SIGTERM: {}", exit.status);
    let is_complaint = |text: &str| text.contains(": warn: ") || text.contains(": debug: ");
    let complaint = vm.lines().iter().find(|line| is_complaint(&line.text));
    ensure!(complaint.is_none(), "{complaint:?}");
    Ok(())
}
