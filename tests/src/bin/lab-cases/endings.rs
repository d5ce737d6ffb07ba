//! How guests and VMMs end.

use anyhow::{Result, ensure};
use rustix::process::Signal;
use tests::lab::{BOOT, Case, Report, SOON, user_device};

/// A reset starts the guest again in the same process, with the device as new.
pub(crate) fn reset_restarts(case: &mut Case<'_>) -> Result<()> {
    let device = case.device()?;
    let parameters = "outrigger.checks=registers,ram,dma,msix outrigger.end=reboot";
    let mut command = case.linux("6.12", parameters);
    let mut vm = case.start(command.arg("--user-device").arg(user_device(&device)))?;
    let first = Report::wait(&mut vm, BOOT)?;
    let second = Report::wait(&mut vm, BOOT)?;
    vm.signal(Signal::TERM)?;
    vm.wait(SOON)?;

    first.devices_are_well(1)?;
    second.devices_are_well(1)?;
    let resets = [first.number("resets")?, second.number("resets")?];
    ensure!(
        resets[0] + 1 == resets[1],
        "the device was not reset once: {resets:?}"
    );
    Ok(())
}

/// With `--no-reboot` a reset is an exit, with a status of its own.
pub(crate) fn no_reboot(case: &mut Case<'_>) -> Result<()> {
    let mut command = case.linux("6.12", "outrigger.end=reboot");
    let mut vm = case.start(command.args(["--memory", "size=128M", "--no-reboot"]))?;
    vm.wait_for("GUEST DONE", BOOT)?;
    let exit = vm.wait(SOON)?;
    ensure!(
        exit.status.code() == Some(3),
        "after a reset: {}",
        exit.status
    );
    Ok(())
}

/// A kernel that panics resets the machine.
pub(crate) fn panic_resets(case: &mut Case<'_>) -> Result<()> {
    let mut command = case.linux("6.12", "outrigger.end=panic");
    let mut vm = case.start(command.args(["--memory", "size=128M", "--no-reboot"]))?;
    vm.wait_for("Kernel panic", BOOT)?;
    let exit = vm.wait(SOON)?;
    ensure!(
        exit.status.code() == Some(3),
        "after a panic: {}",
        exit.status
    );
    Ok(())
}

/// SIGTERM ends the VMM whatever the guest does.
pub(crate) fn sigterm(case: &mut Case<'_>) -> Result<()> {
    let device = case.device()?;
    let mut command = case.linux("6.12", "outrigger.checks=registers outrigger.end=wait");
    let mut vm = case.start(command.arg("--user-device").arg(user_device(&device)))?;
    Report::wait(&mut vm, BOOT)?.devices_are_well(1)?;
    vm.signal(Signal::TERM)?;
    let exit = vm.wait(SOON)?;
    ensure!(exit.status.success(), "after SIGTERM: {}", exit.status);
    Ok(())
}

/// The power button, as SIGPWR presses it, reaches the guest, which powers off.
pub(crate) fn power_button(case: &mut Case<'_>) -> Result<()> {
    let mut vm = case.start(&mut case.linux("6.12", "outrigger.end=button"))?;
    vm.wait_for("waiting for the power button", BOOT)?;
    vm.signal(Signal::POWER)?;
    vm.wait_for("Power down", SOON)?;
    let exit = vm.wait(SOON)?;
    ensure!(exit.status.success(), "after power off: {}", exit.status);
    Ok(())
}
