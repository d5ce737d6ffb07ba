//! A device, and what sysfs says of it.

use std::fs;
use std::path::{Path, PathBuf};

use super::group::Group;
use super::sysfs::{Sysfs, names_in};

/// The base class of bridges (PCI Code and ID Assignment Specification).
const BRIDGE: u32 = 6;

/// What a device is to the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A PCI function, also an SR-IOV virtual one.
    Pci,
    /// A mediated device: a part of a device that its driver passes on.
    Mdev,
}

/// A device of the host. It is asked anew each time: drivers come and go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostDevice {
    kind: Kind,
    name: String,
    directory: PathBuf,
}

/// The character device by which a VFIO device is opened together with iommufd.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceNode {
    /// Where it is.
    pub path: PathBuf,
    /// Its major and minor number. The file has to have them: it may be an old one.
    pub number: (u32, u32),
}

impl HostDevice {
    /// The device with this directory, which is free of symbolic links.
    pub(super) fn at(directory: PathBuf) -> Option<Self> {
        let kind = match link_name(&directory, "subsystem")?.as_str() {
            "pci" => Kind::Pci,
            "mdev" => Kind::Mdev,
            _ => return None,
        };
        let name = directory.file_name()?.to_str()?.to_owned();
        Some(Self {
            kind,
            name,
            directory,
        })
    }

    /// What it is.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The whole PCI address, or the UUID: what VFIO calls it, too.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its directory in sysfs, free of symbolic links.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The driver that it is bound to.
    pub fn driver(&self) -> Option<String> {
        driver(&self.directory)
    }

    /// The only driver that it may be bound to, if one has been set.
    pub fn driver_override(&self) -> Option<String> {
        text(&self.directory, "driver_override").filter(|name| name != "(null)" && !name.is_empty())
    }

    /// The vendor's and the device's id.
    pub fn ids(&self) -> Option<(u16, u16)> {
        let id = |file| u16::try_from(hex(&self.directory, file)?).ok();
        Some((id("vendor")?, id("device")?))
    }

    /// The base class, the subclass and the programming interface, from the highest of 24 bits to the lowest.
    pub fn class(&self) -> Option<u32> {
        hex(&self.directory, "class")
    }

    /// The type that a mediated device was made as.
    pub fn mdev_type(&self) -> Option<String> {
        link_name(&self.directory, "mdev_type")
    }

    /// Whether it leads to other devices.
    pub fn is_bridge(&self) -> bool {
        is_bridge(&self.directory)
    }

    /// How many SR-IOV virtual functions it has at present.
    pub fn virtual_functions(&self) -> u32 {
        let count = text(&self.directory, "sriov_numvfs");
        count.and_then(|count| count.parse().ok()).unwrap_or(0)
    }

    /// The IOMMU group that it is in.
    pub fn group(&self) -> Option<Group> {
        Group::of(&self.directory)
    }

    /// Whether VFIO has it.
    pub fn is_with_vfio(&self) -> bool {
        is_with_vfio(&self.directory)
    }

    /// The character device, if this kernel makes them.
    pub fn device_node(&self, sysfs: &Sysfs) -> Option<DeviceNode> {
        let folder = self.directory.join("vfio-dev");
        let name = names_in(&folder).ok()?.into_iter().next()?;
        // Without the file `dev` it has no number: then there is a sysfs directory, and nothing in /dev.
        let number = text(&folder.join(&name), "dev")?;
        let (major, minor) = number.split_once(':')?;
        Some(DeviceNode {
            path: sysfs.node(&format!("vfio/devices/{name}")),
            number: (major.parse().ok()?, minor.parse().ok()?),
        })
    }
}

/// The driver of the device with this directory.
pub(super) fn driver(directory: &Path) -> Option<String> {
    link_name(directory, "driver")
}

/// Whether the device with this directory is a bridge.
pub(super) fn is_bridge(directory: &Path) -> bool {
    hex(directory, "class").is_some_and(|class| class >> 16 == BRIDGE)
}

/// Whether the device with this directory is with VFIO. vfio-pci is not the only driver that gives it there: some
/// vendors' own can also migrate their devices, and mediated devices have others again. The directory `vfio-dev` says
/// so of any driver since Linux 6.1; before, it is the driver's name that tells (mlx5_vfio_pci, vfio_mdev).
pub(super) fn is_with_vfio(directory: &Path) -> bool {
    directory.join("vfio-dev").is_dir()
        || driver(directory).is_some_and(|driver| driver.contains("vfio"))
}

/// The last part of what a symbolic link points at.
fn link_name(directory: &Path, link: &str) -> Option<String> {
    let target = fs::read_link(directory.join(link)).ok()?;
    Some(target.file_name()?.to_str()?.to_owned())
}

/// The content of a file, without the end of its line.
pub(super) fn text(directory: &Path, file: &str) -> Option<String> {
    let text = fs::read_to_string(directory.join(file)).ok()?;
    Some(text.trim_end().to_owned())
}

/// The content of a file with a hexadecimal number.
fn hex(directory: &Path, file: &str) -> Option<u32> {
    let text = text(directory, file)?;
    u32::from_str_radix(text.strip_prefix("0x")?, 16).ok()
}
