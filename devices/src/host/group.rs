//! IOMMU groups: the devices that can reach each other past the IOMMU, and so go to a VM together or not at all.

use std::path::{Path, PathBuf};

use super::device::{self, text};
use super::sysfs::{Sysfs, names_in};

/// The drivers that touch no memory by DMA, and so may keep a device while its group is a VM's (those in the kernel
/// that set `driver_managed_dma`, besides VFIO's own).
const HARMLESS: [&str; 2] = ["pci-stub", "pcieport"];

/// A group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group {
    number: u32,
    directory: PathBuf,
}

/// A device in a group. Not every one is a PCI device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// What its bus calls it.
    pub name: String,
    /// The driver that it is bound to.
    pub driver: Option<String>,
    /// Whether the others can't be passed through as long as it has that driver.
    pub hinders: bool,
}

impl Group {
    /// The group of the device with this directory.
    pub(super) fn of(device: &Path) -> Option<Self> {
        let directory = device.join("iommu_group").canonicalize().ok()?;
        let number = directory.file_name()?.to_str()?.parse().ok()?;
        Some(Self { number, directory })
    }

    /// Its number.
    pub fn number(&self) -> u32 {
        self.number
    }

    /// What is special about it, in one word: for most nothing.
    pub fn name(&self) -> Option<String> {
        text(&self.directory, "name")
    }

    /// The devices in it, by their names.
    pub fn members(&self) -> Vec<Member> {
        let folder = self.directory.join("devices");
        let mut names = names_in(&folder).unwrap_or_default();
        names.sort();
        let member = |name: String| Member::at(&folder.join(&name), name);
        names.into_iter().map(member).collect()
    }

    /// The file by which it is opened.
    pub fn path(&self, sysfs: &Sysfs) -> PathBuf {
        sysfs.node(&format!("vfio/{}", self.number))
    }
}

impl Member {
    fn at(directory: &Path, name: String) -> Self {
        let driver = device::driver(directory);
        let is_harmless = |driver: &String| HARMLESS.contains(&driver.as_str());
        let hinders = driver.as_ref().is_some_and(|driver| !is_harmless(driver))
            && !device::is_with_vfio(directory)
            && !device::is_bridge(directory);
        Self {
            name,
            driver,
            hinders,
        }
    }
}
