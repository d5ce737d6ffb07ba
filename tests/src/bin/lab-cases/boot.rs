//! Debian's kernels boot, and find and use the devices.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tests::lab::{BOOT, Case, Exit, Process, Report, SOON, user_device};

/// Everything, on the smallest machine, and how quickly the VMM follows its guest.
pub(crate) fn linux_6_12(case: &mut Case<'_>) -> Result<()> {
    let device = case.device()?;
    let mut command = case.linux("6.12", "");
    command.args(["--cpus", "boot=1,nested=off"]);
    let mut vm = case.start(command.arg("--user-device").arg(user_device(&device)))?;
    let report = Report::wait(&mut vm, BOOT)?;
    let exit = power_off(&mut vm)?;
    let last = vm.lines().last().context("no lines")?;
    let delay = exit.at.saturating_duration_since(last.at);

    report.devices_are_well(1)?;
    ensure!(report.fact("kernel")?.starts_with("6.12."));
    ensure!(report.number("cpus")? == 1);
    ensure!(report.number("nested")? == 0, "the guest could run VMs");
    ensure!(
        (440 << 10..512 << 10).contains(&report.number("memory-kib")?),
        "not 512 MiB of memory"
    );
    ensure!(
        delay < Duration::from_secs(1),
        "{delay:?} from the guest's last line to the end"
    );
    Ok(())
}

/// The other kernel, on a machine in huge pages that are taken at the start.
pub(crate) fn linux_6_1_huge_pages(case: &mut Case<'_>) -> Result<()> {
    const POOL: &str = "/proc/sys/vm/nr_hugepages";
    fs::write(POOL, "128")?;
    ensure!(
        fs::read_to_string(POOL)?.trim() == "128",
        "the lab has no huge pages to give"
    );

    let device = case.device()?;
    let mut command = case.linux("6.1", "");
    command.args([
        "--cpus",
        "2",
        "--memory",
        "size=256M,hugepages=on,prefault=on",
    ]);
    let mut vm = case.start(command.arg("--user-device").arg(user_device(&device)))?;
    let report = Report::wait(&mut vm, BOOT)?;
    let memory = fs::read_to_string("/proc/meminfo")?;
    power_off(&mut vm)?;
    fs::write(POOL, "0")?;

    report.devices_are_well(1)?;
    ensure!(report.fact("kernel")?.starts_with("6.1."));
    ensure!(report.number("cpus")? == 2);
    ensure!(report.number("nested")? == 1, "the guest could not run VMs");
    let free = memory
        .lines()
        .find_map(|line| line.strip_prefix("HugePages_Free:"));
    ensure!(
        free.map(str::trim) == Some("0"),
        "huge pages are left: {free:?}"
    );
    Ok(())
}

/// RAM on both sides of the hole below 4 GiB, and two devices that are not mixed up.
pub(crate) fn four_cpus_4g_two_devices(case: &mut Case<'_>) -> Result<()> {
    let devices = [case.device()?, case.device()?];
    let mut command = case.linux("6.12", "");
    command.args(["--cpus", "boot=4", "--memory", "size=4G", "--user-device"]);
    let mut vm = case.start(command.args(devices.iter().map(|socket| user_device(socket))))?;
    let report = Report::wait(&mut vm, BOOT)?;
    power_off(&mut vm)?;

    report.devices_are_well(2)?;
    ensure!(report.number("cpus")? == 4);
    ensure!(
        report.number("memory-kib")? > 3900 << 10,
        "not 4 GiB of memory"
    );
    let mut ram = report
        .facts("e820")
        .filter_map(|range| range.strip_suffix(" System RAM"));
    ensure!(
        ram.any(|range| range.starts_with("0x100000000-")),
        "no RAM at 4 GiB"
    );
    let high = report.facts("dma-pages-above-4g").map(str::parse::<u64>);
    ensure!(high.flatten().all(|pages| pages > 0), "no DMA above 4 GiB");
    Ok(())
}

/// The ELF kernel by its PVH entry point.
pub(crate) fn elf_kernel_pvh(case: &mut Case<'_>) -> Result<()> {
    let device = case.device()?;
    let kernel = case.images().elf_kernel("6.12");
    let mut command = case.linux_image(&kernel, "6.12", "outrigger.checks=registers,dma,msix");
    let mut vm = case.start(command.arg("--user-device").arg(user_device(&device)))?;
    let report = Report::wait(&mut vm, BOOT)?;
    power_off(&mut vm)?;
    report.devices_are_well(1)
}

/// The guest powers off, and the VMM ends with status 0.
fn power_off(vm: &mut Process) -> Result<Exit> {
    vm.wait_for("Power down", SOON)?;
    let exit = vm.wait(SOON)?;
    ensure!(exit.status.success(), "after power off: {}", exit.status);
    Ok(exit)
}
