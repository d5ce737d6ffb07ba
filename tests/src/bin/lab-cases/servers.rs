//! Device servers: one that nobody here wrote, and those that misbehave.

use anyhow::{Result, ensure};
use tests::foreign::ForeignDevice;
use tests::lab::{BOOT, Case, Report, SOON, user_device};
use tests::truncator;

/// A server truncates the file behind a BAR: KVM_RUN fails when the guest touches it, and the guest goes on without it.
pub(crate) fn truncated_bar(case: &mut Case<'_>) -> Result<()> {
    let server = truncator::serve()?;
    let kernel = truncator::guest()?;
    let mut command = case.outrigger();
    command.arg("--kernel").arg(kernel.path());
    command
        .arg("--user-device")
        .arg(user_device(server.socket()));
    let mut vm = case.start(command.args(["--memory", "size=64M"]))?;
    vm.wait_for("was truncated", SOON)?;
    let exit = vm.wait(SOON)?;
    ensure!(exit.status.success(), "after power off: {}", exit.status);
    let printed = vm.lines().iter().any(|line| line.text == "AB");
    ensure!(printed, "the guest did not read all-ones: {:?}", vm.lines());
    Ok(())
}

/// A device behind a server that nobody here wrote.
pub(crate) fn foreign_device(case: &mut Case<'_>) -> Result<()> {
    let device = ForeignDevice::start()?;
    let checks = "outrigger.checks=registers,ram,io,decode,dma,msix,msix-mask,intx";
    let mut command = case.linux("6.12", checks);
    command
        .arg("--user-device")
        .arg(user_device(device.socket()));
    let mut vm = case.start(&mut command)?;
    let report = Report::wait(&mut vm, BOOT)?;
    let exit = vm.wait(SOON)?;
    ensure!(exit.status.success(), "after power off: {}", exit.status);
    report.devices_are_well(1)
}
