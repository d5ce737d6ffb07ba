//! Devices of the host by iommufd and VFIO's character devices, which only the kernel of `make test-iommufd` has.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use rustix::io::{FdFlags, fcntl_setfd};
use tests::lab::{BOOT, Case, Mtty, Process, Report};

use crate::passthrough::{EDU, end, give};

const EDU_CHECKS: [&str; 5] = ["edu", "edu-dma", "edu-msi", "edu-intx", "edu-decode"];
const MTTY_CHECKS: [&str; 2] = ["mtty-io", "mtty-loop"];

/// Whether the lab's kernel has iommufd.
pub(crate) fn is_there() -> bool {
    Path::new("/dev/iommu").exists()
}

/// Checks by which of the two ways a VM has got at its devices.
pub(crate) fn is_used(vm: &Process, expected: bool) -> Result<()> {
    let files = vm.open_files()?;
    for (path, expected) in [("/dev/iommu", expected), ("/dev/vfio/vfio", !expected)] {
        let is_open = files.iter().any(|file| file == Path::new(path));
        ensure!(is_open == expected, "{path} is among {files:?}: {is_open}");
    }
    Ok(())
}

/// A kernel with iommufd does without it when asked to, and a device goes from one way to the other.
pub(crate) fn off_and_on(case: &mut Case<'_>) -> Result<()> {
    let _edu = give([EDU])?;
    for (how, expected) in [("off", false), ("on", true)] {
        let mut command = waiting(case);
        command.arg("--platform").arg(format!("iommufd={how}"));
        command.arg("--device").arg(format!("path={EDU}"));
        let mut vm = case.start(&mut command)?;
        Report::wait(&mut vm, BOOT)?.passed(1, &EDU_CHECKS)?;
        is_used(&vm, expected)?;
        end(&mut vm)?;
    }
    Ok(())
}

/// The VM opens nothing: it is started with the descriptors of a PCI device and of a mediated one.
pub(crate) fn descriptors(case: &mut Case<'_>) -> Result<()> {
    let [edu] = give([EDU])?;
    let mtty = Mtty::create("83b8f4f2-509f-382f-3c1e-e6bfe0fa1002")?;
    let mut command = waiting(case);
    let iommufd = inherit("/dev/iommu")?;
    let devices = [inherit(&node(edu.path())?)?, inherit(&node(mtty.path())?)?];
    command.arg("--platform");
    command.arg(format!("iommufd_fd={}", iommufd.as_raw_fd()));
    command.arg("--device");
    command.args(
        devices
            .each_ref()
            .map(|device| format!("fd={}", device.as_raw_fd())),
    );
    let mut vm = case.start(&mut command)?;
    drop((iommufd, devices));
    let report = Report::wait(&mut vm, BOOT)?;
    report.passed(1, &[&EDU_CHECKS[..], &MTTY_CHECKS].concat())?;
    end(&mut vm)
}

/// A guest that stays there when it has checked its devices.
fn waiting(case: &Case<'_>) -> Command {
    let mut command = case.linux("host", "outrigger.end=wait");
    command.args(["-vv", "--memory", "size=256M"]);
    command
}

/// The character device of a device with this folder in sysfs.
pub(crate) fn node(device: &Path) -> Result<String> {
    let mut names = fs::read_dir(device.join("vfio-dev"))?;
    let name = names.next().context("it has no character device")??;
    Ok(format!("/dev/vfio/devices/{}", name.file_name().display()))
}

/// Opens a file that programs inherit.
fn inherit(path: &str) -> Result<File> {
    let file = File::options().read(true).write(true).open(path)?;
    fcntl_setfd(&file, FdFlags::empty())?;
    Ok(file)
}
