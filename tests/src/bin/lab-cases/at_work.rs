//! Devices of the host that a guest works with: what that costs, and what happens when they go meanwhile.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tests::lab::{BOOT, Case, Counters, HostDevice, Monitor, Process, Report, SOON, Stream};

use crate::passthrough::{E1000E, EDU, NVME, end, give};
use crate::work::{Work, are_lost, await_work};

/// One of three devices is pulled out of the host, and one reports an error; the third goes on. Then another VM has all
/// of them.
pub(crate) fn lost(case: &mut Case<'_>) -> Result<()> {
    {
        // In the order in which the guest numbers them.
        let devices = give([EDU, E1000E, NVME])?;
        let mut command = case.linux("host", "outrigger.checks=none outrigger.end=work");
        command.args(["-vv", "--cpus", "2", "--memory", "size=256M", "--device"]);
        command.args(
            devices
                .iter()
                .map(|device| format!("path={0},id={0}", device.address())),
        );
        let mut vm = case.start(&mut command)?;
        Report::wait(&mut vm, BOOT)?;
        show_times(&vm);
        await_work(&mut vm, [1, 1, 1]).context("before")?;
        no_trips(&mut vm)?;
        let [edu, _, nvme] = &devices;
        pulled(&mut vm, edu).context("pulled")?;
        failed(&mut vm).context("failed")?;
        end(&mut vm)?;
        let pulled = format!("{EDU}: the host wants it back, and has it now");
        let failed = format!("{E1000E}: it reported an error that it does not recover from");
        are_lost(&vm, &[&pulled, &failed])?;
        used_by_host(nvme)?;
    }
    let devices = give([EDU, E1000E, NVME])?;
    let checks = ["edu", "edu-dma", "edu-msi", "e1000e-io", "nvme"];
    let mut command = case.linux("host", &format!("outrigger.checks={}", checks.join(",")));
    command.args(["--memory", "size=256M", "--device"]);
    command.args(
        devices
            .iter()
            .map(|device| format!("path={}", device.address())),
    );
    let mut vm = case.start(&mut command)?;
    let report = Report::wait(&mut vm, BOOT)?;
    let exit = vm.wait(SOON)?;
    ensure!(exit.status.success(), "after power off: {}", exit.status);
    report.passed(1, &checks)
}

/// How long it took to have the devices.
fn show_times(vm: &Process) {
    let lines = vm.lines().iter().map(|line| line.text.as_str());
    for line in lines.filter(|line| line.contains("opened in") || line.contains("pinned")) {
        println!("  {line}");
    }
}

/// Neither accesses to what is mapped nor interrupts make the VMM do anything.
fn no_trips(vm: &mut Process) -> Result<()> {
    const ACCESSES: u64 = 5_000;
    const INTERRUPTS: u64 = 500;
    let counters = Counters::of(vm)?;
    let [edu, e1000e, nvme] = Work::next(vm)?.map(|work| work.count);
    let (before, printed_before) = (counters.read()?, printed(vm));
    let enough = [edu + ACCESSES, e1000e + ACCESSES, nvme + INTERRUPTS];
    let now = await_work(vm, enough)?;
    let trips = counters.read()? - before;
    // A register is written and read each time. The disk interrupts at the end of each read.
    let accesses = 2 * (now[0] - edu + now[1] - e1000e);
    let interrupts = now[2] - nvme;
    println!("  {accesses} accesses and {interrupts} interrupts: {trips:?}");
    // What the guest prints goes by the VMM, a byte at a time.
    let most = 4 * (printed(vm) - printed_before) + interrupts / 2;
    let made = trips.to_vmm + trips.system_calls;
    ensure!(
        made < most.min(accesses),
        "{made} trips, not less than {most}"
    );
    Ok(())
}

/// How many bytes a guest has printed.
fn printed(vm: &Process) -> u64 {
    let lines = vm.lines().iter();
    let printed = lines.filter(|line| line.stream == Stream::Output);
    printed.map(|line| line.text.len() as u64 + 2).sum()
}

/// The host takes a device out, and has it at once.
fn pulled(vm: &mut Process, device: &HostDevice) -> Result<()> {
    let started = Instant::now();
    let pulled = pull(device);
    vm.wait_for("STATE 0 dead ffffffff", SOON)?;
    pulled
        .recv_timeout(SOON)
        .context("the host waits for it")??;
    println!("  pulled in {:?}", started.elapsed());
    // The kernel asks again after ten seconds.
    ensure!(started.elapsed() < Duration::from_secs(5));
    let [_, e1000e, nvme] = Work::next(vm)?;
    await_work(vm, [0, e1000e.count + 1, nvme.count + 1]).map(drop)
}

/// Pulls a device out of the machine, which waits until whoever uses it has let it go, and then tells.
fn pull(device: &HostDevice) -> Receiver<io::Result<()>> {
    let file = device.path().join("remove");
    let (sender, pulled) = mpsc::channel();
    thread::spawn(move || sender.send(fs::write(file, "1")));
    pulled
}

/// The port that a device is at reports an error.
fn failed(vm: &mut Process) -> Result<()> {
    Monitor::open()?.inject_fatal_error("port3")?;
    vm.wait_for("STATE 1 dead ffffffff", SOON)?;
    let [_, _, nvme] = Work::next(vm)?;
    await_work(vm, [0, 0, nvme.count + 1]).map(drop)
}

/// The disk works with the host's own driver.
fn used_by_host(nvme: &HostDevice) -> Result<()> {
    nvme.bind("nvme")?;
    let disk = Path::new("/dev/nvme0n1");
    let deadline = Instant::now() + SOON;
    while !disk.exists() {
        ensure!(Instant::now() < deadline, "the host finds no disk");
        thread::sleep(Duration::from_millis(2));
    }
    Ok(File::open(disk)?.read_exact(&mut [0; 4096])?)
}
