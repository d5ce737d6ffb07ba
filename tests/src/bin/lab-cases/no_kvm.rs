//! A machine without KVM: one line that names what is wrong, and exit status 1.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use tests::lab::{Case, Process, SOON, Stream};

/// /dev/kvm that is missing, and that may not be opened.
pub(crate) fn refused(case: &mut Case<'_>) -> Result<()> {
    is_refused(case, &mut as_nobody(case)?, "/dev/kvm").context("without permission")?;

    let (device, away) = (Path::new("/dev/kvm"), Path::new("/dev/kvm.away"));
    fs::rename(device, away)?;
    let result = is_refused(case, &mut case.linux("6.12", ""), "/dev/kvm");
    fs::rename(away, device)?;
    result.context("without the device")
}

/// Outrigger as a user who may do nothing, and who may not even be allowed to look into the checkout.
fn as_nobody(case: &Case<'_>) -> Result<Command> {
    const NOBODY: u32 = 65534;
    let (program, kernel) = (case.path("outrigger"), case.path("kernel"));
    fs::set_permissions(case.path(""), Permissions::from_mode(0o755))?;
    fs::copy(case.outrigger().get_program(), &program)?;
    fs::copy(case.images().kernel("6.12"), &kernel)?;
    let mut command = Process::command(&program);
    command.arg("--kernel").arg(kernel).uid(NOBODY);
    Ok(command)
}

fn is_refused(case: &Case<'_>, command: &mut Command, named: &str) -> Result<()> {
    let mut vm = case.start(command)?;
    let exit = vm.wait(SOON)?;
    ensure!(
        exit.status.code() == Some(1),
        "{}, not exit status 1",
        exit.status
    );
    match vm.lines() {
        [line] => {
            ensure!(
                line.stream == Stream::Error,
                "it is not on standard error: {}",
                line.text
            );
            ensure!(
                line.text.contains(named),
                "it does not name {named}: {}",
                line.text
            );
            Ok(())
        }
        lines => bail!("{} lines, not one: {lines:#?}", lines.len()),
    }
}
