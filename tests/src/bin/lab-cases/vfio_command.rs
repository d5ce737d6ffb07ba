//! `outrigger vfio` and a kernel that does what it writes.

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use tests::lab::{Case, SOON};

/// The devices of the lab that these cases need: see `tests/lab/devices.cfg`.
const NVME: &str = "0000:02:00.0";
const EDU: &str = "0000:04:01.0";
const E1000: &str = "0000:04:02.0";

/// A device goes from its driver to VFIO and back, and stays where it is when that cannot be.
pub(crate) fn there_and_back(case: &mut Case<'_>) -> Result<()> {
    with_drivers(&["nvme"], || {
        expect(case, &["list"], &[NVME, "1b36:0010", "host's driver nvme"])?;
        expect_failure(case, &["bind", NVME, "00:00.0"], &["it is a bridge"])?;
        expect(case, &["bind", "--dry-run", NVME], &["nvme/unbind"])?;
        is_with(NVME, Some("nvme"))?;

        expect(
            case,
            &["bind", "02:00.0"],
            &["with vfio-pci, and was with nvme"],
        )?;
        is_with(NVME, Some("vfio-pci"))?;
        ensure!(line_of(case, outrigger(case), NVME)?.ends_with("  yes"));
        let denied = line_of(case, as_nobody(case)?, NVME)?;
        ensure!(denied.contains("no permission"), "{denied}");

        let group = group(NVME)?;
        let user = File::options().read(true).write(true).open(&group)?;
        expect_failure(case, &["unbind", NVME], &["in use", &group])?;
        is_with(NVME, Some("vfio-pci"))?;
        drop(user);
        expect(case, &["unbind", NVME], &["with nvme"])?;
        is_with(NVME, Some("nvme"))?;
        expect(case, &["bind", "--dry-run", NVME], &["nvme/unbind"])
    })
}

/// A device in a group with another that the host uses.
pub(crate) fn shared_group(case: &mut Case<'_>) -> Result<()> {
    with_drivers(&["e1000"], || {
        is_with(EDU, None)?;
        let also = format!("vfio bind {E1000}`");
        expect(
            case,
            &["bind", EDU],
            &["and was with no driver", "(e1000)", &also],
        )?;
        is_with(E1000, Some("e1000"))?;
        let line = line_of(case, outrigger(case), EDU)?;
        ensure!(line.contains("no: ") && line.contains(E1000), "{line}");

        expect(case, &["bind", E1000], &["and was with e1000"])?;
        ensure!(line_of(case, outrigger(case), EDU)?.ends_with("  yes"));
        expect(
            case,
            &["unbind", EDU, E1000],
            &["with no driver", "with e1000"],
        )?;
        is_with(EDU, None)?;
        is_with(E1000, Some("e1000"))
    })
}

/// Does something while VFIO and these drivers are there. Other cases want the devices without drivers.
fn with_drivers(drivers: &[&str], act: impl FnOnce() -> Result<()>) -> Result<()> {
    modprobe("-a", &["vfio-pci"])?;
    modprobe("-a", drivers)?;
    let result = act();
    modprobe("-r", drivers)?;
    result
}

fn modprobe(how: &str, modules: &[&str]) -> Result<()> {
    let status = Command::new("modprobe").arg(how).args(modules).status()?;
    ensure!(status.success(), "modprobe {how} {modules:?}: {status}");
    Ok(())
}

fn outrigger(case: &Case<'_>) -> Command {
    let mut command = case.outrigger();
    command.arg("vfio");
    command
}

fn as_nobody(case: &Case<'_>) -> Result<Command> {
    let mut command = case.outrigger_as_nobody()?;
    command.arg("vfio");
    Ok(command)
}

/// Expects that the command succeeds, and that each of `parts` is in what it says.
fn expect(case: &Case<'_>, arguments: &[&str], parts: &[&str]) -> Result<()> {
    says(case, outrigger(case).args(arguments), 0, parts)
}

/// The same of a failure.
fn expect_failure(case: &Case<'_>, arguments: &[&str], parts: &[&str]) -> Result<()> {
    says(case, outrigger(case).args(arguments), 1, parts)
}

fn says(case: &Case<'_>, command: &mut Command, status: i32, parts: &[&str]) -> Result<()> {
    let (exit, said) = run(case, command)?;
    ensure!(exit == Some(status), "{command:?}: status {exit:?}: {said}");
    let missing = parts.iter().find(|part| !said.contains(**part));
    ensure!(missing.is_none(), "{command:?}: no {missing:?} in: {said}");
    Ok(())
}

fn run(case: &Case<'_>, command: &mut Command) -> Result<(Option<i32>, String)> {
    let mut process = case.start(command)?;
    let exit = process.wait(SOON)?;
    let lines = process.lines().iter().map(|line| line.text.as_str());
    let said = lines.collect::<Vec<_>>().join("\n");
    Ok((exit.status.code(), said))
}

/// The line of the list that is about a device.
fn line_of(case: &Case<'_>, mut command: Command, device: &str) -> Result<String> {
    let (_, said) = run(case, command.arg("list"))?;
    let mut lines = said.lines();
    let line = lines.find(|line| line.starts_with(device));
    Ok(line
        .with_context(|| format!("no {device} in: {said}"))?
        .to_owned())
}

/// Checks which driver has a device.
fn is_with(device: &str, driver: Option<&str>) -> Result<()> {
    let now = fs::read_link(sysfs(device, "driver")).ok();
    let now = now.as_deref().and_then(Path::file_name);
    ensure!(
        now == driver.map(AsRef::as_ref),
        "{device} is with {now:?}, not {driver:?}"
    );
    Ok(())
}

/// The file of the group that a device is in.
fn group(device: &str) -> Result<String> {
    let group = fs::read_link(sysfs(device, "iommu_group"))?;
    let number = group.file_name().context("no number")?;
    Ok(format!("/dev/vfio/{}", number.display()))
}

fn sysfs(device: &str, name: &str) -> String {
    format!("/sys/bus/pci/devices/{device}/{name}")
}
