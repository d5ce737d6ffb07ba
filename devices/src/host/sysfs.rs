//! Where the host shows its devices, and how one of them is found there.

use std::path::{Path, PathBuf};
use std::{fs, io};

use super::device::{HostDevice, Kind};
use super::name;

/// Why a device cannot be found.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// A text that names no device.
    #[error(
        "`{0}` names no device: give its sysfs directory (/sys/bus/pci/devices/0000:01:00.0), its PCI address \
         (0000:01:00.0 or 01:00.0), or the UUID of a mediated device"
    )]
    Form(String),
    /// A PCI device that the host does not have.
    #[error(
        "there is no PCI device {0} on this host: `outrigger vfio list --all` shows those that there are"
    )]
    NoPciDevice(String),
    /// A mediated device that the host does not have.
    #[error(
        "there is no mediated device {0} on this host: write its UUID to mdev_supported_types/TYPE/create in its \
         parent's sysfs directory to make it"
    )]
    NoMdev(String),
    /// A path that leads nowhere.
    #[error(
        "there is no {}: `outrigger vfio list --all` shows the devices that there are",
        .0.display()
    )]
    NoSuchPath(PathBuf),
    /// A path that leads to something else.
    #[error(
        "{} is not the sysfs directory of a PCI or a mediated device: give one like \
         /sys/bus/pci/devices/0000:01:00.0 or /sys/bus/mdev/devices/UUID",
        .0.display()
    )]
    NotADevice(PathBuf),
    /// A path that cannot be followed.
    #[error("cannot read {}, which has to be a directory in sysfs: is it mounted and permitted?", .path.display())]
    Read {
        /// The path.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

/// Where the host shows its devices: `/sys` and `/dev`, or folders that look like them.
#[derive(Debug, Clone)]
pub struct Sysfs {
    sys: PathBuf,
    dev: PathBuf,
}

impl Default for Sysfs {
    fn default() -> Self {
        Self::at(Path::new("/"))
    }
}

impl Sysfs {
    /// The folders `sys` and `dev` in `root`.
    pub fn at(root: &Path) -> Self {
        Self {
            sys: root.join("sys"),
            dev: root.join("dev"),
        }
    }

    /// The device that a user calls by its sysfs directory, its PCI address or its UUID.
    pub fn find(&self, text: &str) -> Result<HostDevice, HostError> {
        if text.contains('/') {
            return self.at_path(Path::new(text));
        }
        let (kind, name) = name::parse(text).ok_or_else(|| HostError::Form(text.to_owned()))?;
        let path = self.devices_of(kind).join(&name);
        self.at_path(&path).map_err(|error| match (error, kind) {
            (HostError::NoSuchPath(_), Kind::Pci) => HostError::NoPciDevice(name),
            (HostError::NoSuchPath(_), Kind::Mdev) => HostError::NoMdev(name),
            (error, _) => error,
        })
    }

    /// All PCI and mediated devices, by their names.
    pub fn devices(&self) -> Result<Vec<HostDevice>, HostError> {
        let mut devices = Vec::new();
        for kind in [Kind::Pci, Kind::Mdev] {
            let folder = self.devices_of(kind);
            let mut names = names_in(&folder).or_else(|source| match source.kind() {
                // No PCI, or the module mdev isn't loaded.
                io::ErrorKind::NotFound => Ok(Vec::new()),
                _ => Err(HostError::Read {
                    path: folder.clone(),
                    source,
                }),
            })?;
            names.sort();
            // One may have gone in the meantime.
            let found = names.iter().filter_map(|name| self.find(name).ok());
            devices.extend(found);
        }
        Ok(devices)
    }

    /// What the PCI bus has in sysfs: `devices`, `drivers`, `drivers_probe`.
    pub fn pci_bus(&self) -> PathBuf {
        self.sys.join("bus/pci")
    }

    /// Whether the kernel uses an IOMMU. Groups are no sign of one: mediated devices have some of their own.
    pub(super) fn has_iommu(&self) -> bool {
        names_in(&self.sys.join("class/iommu")).is_ok_and(|names| !names.is_empty())
    }

    /// A file in `/dev`.
    pub(super) fn node(&self, name: &str) -> PathBuf {
        self.dev.join(name)
    }

    fn devices_of(&self, kind: Kind) -> PathBuf {
        self.sys.join(match kind {
            Kind::Pci => "bus/pci/devices",
            Kind::Mdev => "bus/mdev/devices",
        })
    }

    /// The device whose directory this is, also by way of symbolic links.
    fn at_path(&self, path: &Path) -> Result<HostDevice, HostError> {
        let directory = canonical(path)?;
        let device = directory
            .starts_with(canonical(&self.sys)?)
            .then(|| HostDevice::at(directory))
            .flatten();
        device.ok_or_else(|| HostError::NotADevice(path.to_owned()))
    }
}

fn canonical(path: &Path) -> Result<PathBuf, HostError> {
    path.canonicalize().map_err(|source| match source.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => {
            HostError::NoSuchPath(path.to_owned())
        }
        _ => HostError::Read {
            path: path.to_owned(),
            source,
        },
    })
}

/// What is in a folder.
pub(super) fn names_in(folder: &Path) -> io::Result<Vec<String>> {
    let entries = fs::read_dir(folder)?.collect::<io::Result<Vec<_>>>()?;
    let names = entries
        .into_iter()
        .filter_map(|entry| entry.file_name().into_string().ok());
    Ok(names.collect())
}
