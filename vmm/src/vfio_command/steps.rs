//! Writes to sysfs, which can be shown instead of done.

use std::fmt;
use std::fs::File;
use std::io::{self, ErrorKind, Write as _};
use std::path::PathBuf;

use anyhow::Error;
use devices::host::{HostDevice, Sysfs};

/// What is to be written for one device, in this order.
#[derive(Debug, Default)]
pub(super) struct Steps(Vec<Step>);

/// A line that is written to a file, shown as the command that would do it.
#[derive(Debug)]
struct Step {
    value: String,
    path: PathBuf,
}

impl Steps {
    /// Lets no driver but this one have the device; `""` lets any that fits.
    pub(super) fn allow_only(&mut self, driver: &str, device: &HostDevice, sysfs: &Sysfs) {
        let folder = sysfs.pci_bus().join("devices").join(device.name());
        self.push(driver, folder.join("driver_override"));
    }

    /// Takes the device from its driver.
    pub(super) fn take_from(&mut self, driver: &str, device: &HostDevice, sysfs: &Sysfs) {
        let folder = sysfs.pci_bus().join("drivers").join(driver);
        self.push(device.name(), folder.join("unbind"));
    }

    /// Has the kernel look for a driver.
    pub(super) fn probe(&mut self, device: &HostDevice, sysfs: &Sysfs) {
        self.push(device.name(), sysfs.pci_bus().join("drivers_probe"));
    }

    /// Whether there is nothing to do.
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Does it.
    pub(super) fn perform(&self, device: &str) -> anyhow::Result<()> {
        for (done, step) in self.0.iter().enumerate() {
            step.perform().map_err(|error| {
                let who = match error.kind() {
                    ErrorKind::PermissionDenied => ", which takes root",
                    _ => "",
                };
                let state = match done {
                    0 => format!("{device} is left as it was"),
                    _ => format!(
                        "{device} is left half way, and `outrigger vfio unbind {device}` gives it back"
                    ),
                };
                let Step { value, path } = step;
                let path = path.display();
                Error::new(error).context(format!("cannot write `{value}` to {path}{who}; {state}"))
            })?;
        }
        Ok(())
    }

    fn push(&mut self, value: &str, path: PathBuf) {
        let value = value.to_owned();
        self.0.push(Step { value, path });
    }
}

impl fmt::Display for Steps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_empty() {
            return writeln!(f, "# nothing to do");
        }
        self.0.iter().try_for_each(|step| writeln!(f, "{step}"))
    }
}

impl Step {
    fn perform(&self) -> io::Result<()> {
        // Not created: a file that sysfs does not have is an error of its own.
        let mut file = File::options().write(true).open(&self.path)?;
        // In one call, which is one command to the kernel.
        file.write_all(format!("{}\n", self.value).as_bytes())
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { value, path } = self;
        let space = if value.is_empty() { "" } else { " " };
        write!(f, "echo{space}{value} >{}", path.display())
    }
}
