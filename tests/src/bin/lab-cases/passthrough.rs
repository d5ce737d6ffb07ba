//! Devices of the host in the guest, by the kernel's VFIO.

use anyhow::{Result, ensure};
use rustix::process::Signal;
use tests::lab::{BOOT, Case, HostDevice, Mtty, Report, SOON, join_wire};

const EDU: &str = "0000:01:00.0";
const NVME: &str = "0000:02:00.0";
const E1000E: &str = "0000:03:00.0";

/// A device of each kind, in one container, before and after a reset of the guest.
pub(crate) fn all_kinds(case: &mut Case<'_>) -> Result<()> {
    const CHECKS: [&str; 10] = [
        "edu",
        "edu-dma",
        "edu-msi",
        "edu-intx",
        "nvme",
        "e1000e-io",
        "e1000e-msix",
        "e1000e-intx",
        "mtty-io",
        "mtty-loop",
    ];
    let devices = [EDU, NVME, E1000E].map(HostDevice::at);
    let mtty = Mtty::create("83b8f4f2-509f-382f-3c1e-e6bfe0fa1001")?;
    join_wire()?;
    let mut command = case.linux("host", "outrigger.end=reboot");
    command.args(["--cpus", "2", "--device"]);
    let mut given = Vec::new();
    for device in devices {
        let device = device?;
        device.bind("vfio-pci")?;
        command.arg(format!("path={}/", device.path().display()));
        given.push(device);
    }
    command.arg(format!("path={}", mtty.path().display()));

    let mut vm = case.start(&mut command)?;
    let first = Report::wait(&mut vm, BOOT)?;
    let second = Report::wait(&mut vm, BOOT)?;
    vm.signal(Signal::TERM)?;
    let exit = vm.wait(SOON)?;
    ensure!(exit.status.success(), "after SIGTERM: {}", exit.status);
    first.passed(1, &CHECKS)?;
    second.passed(1, &CHECKS)?;
    let kept = [first.fact("nvme-kept")?, second.fact("nvme-kept")?];
    ensure!(kept == ["false", "true"], "the file was kept: {kept:?}");
    Ok(())
}
