//! Device servers: one that nobody here wrote, and those that misbehave.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use tests::foreign::ForeignDevice;
use tests::lab::{BOOT, Case, Report, SOON, user_device};
use tests::truncator;

use crate::work::{Work, are_lost, await_work};

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

/// How long a guest's access to a device may take.
const DEADLINE: Duration = Duration::from_secs(2);

/// One of three servers is killed and one is stopped while the guest works with all of them. The others' devices go on,
/// at no slower pace, and so does the control of the machine; the one that was stopped works again when it goes on.
pub(crate) fn killed_and_stopped(case: &mut Case<'_>) -> Result<()> {
    let (mut killed, killed_socket) = case.server()?;
    let (mut stopped, stopped_socket) = case.server()?;
    let well_socket = case.device()?;
    let mut command = case.linux("6.12", "outrigger.checks=registers outrigger.end=work");
    // The device that is going to be stopped has a vCPU for itself.
    command.args(["--cpus", "2", "--user-device"]).args([
        format!("id=killed,{}", user_device(&killed_socket)),
        format!("id=stopped,{}", user_device(&stopped_socket)),
        format!("id=well,{}", user_device(&well_socket)),
    ]);
    let mut vm = case.start(&mut command)?;
    Report::wait(&mut vm, BOOT)?.devices_are_well(3)?;
    await_work(&mut vm, [1, 1, 1]).context("before")?;

    killed.signal(Signal::KILL)?;
    vm.wait_for("STATE 0 dead ffffffff", SOON)?;
    let [_, one, two] = Work::next(&mut vm)?;
    await_work(&mut vm, [0, one.count + 1, two.count + 1]).context("one server was killed")?;

    stopped.signal(Signal::STOP)?;
    vm.wait_for("STATE 1 dead", SOON)?;
    let [before, hung, later]: [[Work; 3]; 3] = [
        Work::next(&mut vm)?,
        Work::next(&mut vm)?,
        Work::next(&mut vm)?,
    ];
    ensure!(
        before[1].count == later[1].count && later[1].longest < 2 * DEADLINE,
        "a stopped device answers, or never: {later:?}"
    );
    let slowest = hung[2].longest.max(later[2].longest);
    ensure!(
        later[2].count > hung[2].count && slowest < DEADLINE / 2,
        "another device is held up: {hung:?}, {later:?}"
    );

    stopped.signal(Signal::CONT)?;
    vm.wait_for("STATE 1 alive", SOON)?;
    let [_, one, two] = Work::next(&mut vm)?;
    await_work(&mut vm, [0, one.count + 1, two.count + 1]).context("the server goes on")?;

    stopped.signal(Signal::STOP)?;
    vm.wait_for("STATE 1 dead", SOON)?;
    vm.signal(Signal::POWER)?;
    vm.wait_for("Power down", SOON)?;
    let exit = vm.wait(SOON)?;
    ensure!(exit.status.success(), "after power off: {}", exit.status);
    are_lost(&vm, &["killed: "])
}
