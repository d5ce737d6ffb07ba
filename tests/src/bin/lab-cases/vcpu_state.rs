//! The unit tests of what is saved of vCPUs, on a KVM that has the CPU run its guests: with SSE, with a time stamp counter
//! of the guest's own, and with the model specific registers of a real one.

use anyhow::{Result, ensure};
use tests::lab::{BOOT, Case, Process};

pub(crate) fn unit_tests(case: &mut Case<'_>) -> Result<()> {
    let program = case.images().unit_tests();
    let mut command = Process::command(&program);
    let mut tests = case.start(command.args(["vcpu::", "cpu_profile::"]))?;
    let exit = tests.wait(BOOT)?;
    ensure!(exit.status.success(), "the tests: {}", exit.status);
    let passed = |line: &str| line.contains("guest_goes_on_in_another_vm ... ok");
    ensure!(
        tests.lines().iter().any(|line| passed(&line.text)),
        "not the tests that were expected"
    );
    Ok(())
}
