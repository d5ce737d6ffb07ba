//! Device servers that misbehave.

use anyhow::{Result, ensure};
use tests::lab::{Case, SOON, user_device};
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
