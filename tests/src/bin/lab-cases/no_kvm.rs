//! A machine without KVM: one line that names what is wrong, and exit status 1.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use tests::lab::Case;

/// /dev/kvm that is missing, and that may not be opened.
pub(crate) fn refused(case: &mut Case<'_>) -> Result<()> {
    let mut command = case.outrigger_as_nobody()?;
    let kernel = case.path("kernel");
    fs::copy(case.images().kernel("6.12"), &kernel)?;
    case.expect_refusal(command.arg("--kernel").arg(kernel), &["/dev/kvm"])
        .context("without permission")?;

    let (device, away) = (Path::new("/dev/kvm"), Path::new("/dev/kvm.away"));
    fs::rename(device, away)?;
    let result = case.expect_refusal(&mut case.linux("6.12", ""), &["/dev/kvm"]);
    fs::rename(away, device)?;
    result.context("without the device")
}
