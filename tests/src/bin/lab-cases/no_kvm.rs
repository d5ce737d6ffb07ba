//! A machine without KVM: one line that names what is wrong, and exit status 1.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use tests::lab::{Case, SOON, Stream};

/// /dev/kvm that is missing, and that may not be opened.
pub(crate) fn refused(case: &mut Case<'_>) -> Result<()> {
    const NOBODY: u32 = 65534;
    let mut command = case.linux("6.12", "");
    is_refused(case, command.uid(NOBODY), "/dev/kvm").context("without permission")?;

    let (device, away) = (Path::new("/dev/kvm"), Path::new("/dev/kvm.away"));
    fs::rename(device, away)?;
    let result = is_refused(case, &mut case.linux("6.12", ""), "/dev/kvm");
    fs::rename(away, device)?;
    result.context("without the device")
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
