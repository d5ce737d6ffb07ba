//! Whether a device can be passed through, and what to do if not.

use std::path::{Path, PathBuf};

use rustix::fs::{Access, AtFlags, CWD, accessat};
use rustix::io::Errno;

use super::device::{DeviceNode, HostDevice, Kind};
use super::group::{Group, Member};
use super::sysfs::Sysfs;

/// The name of the groups that VFIO makes itself, without an IOMMU.
const OF_VFIO: &str = "vfio-noiommu";

/// How a device can be opened: in one of these ways at least.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ready {
    /// By its group, with a container.
    pub group: Option<GroupNode>,
    /// By its own character device, with iommufd.
    pub device: Option<DeviceNode>,
}

/// The file by which a group is opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupNode {
    /// The group's number.
    pub number: u32,
    /// Where the file is.
    pub path: PathBuf,
}

/// A device that cannot be passed through as things are.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{device} cannot be passed through: {obstacle}; {}", .obstacle.remedy(.device))]
pub struct NotReady {
    /// The device's name.
    pub device: String,
    /// What stands in the way.
    pub obstacle: Obstacle,
}

/// What stands in a passthrough's way.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Obstacle {
    /// Bridges belong to the host.
    #[error("it is a bridge")]
    Bridge,
    /// The kernel uses no IOMMU.
    #[error("the host's IOMMU is off")]
    IommuOff,
    /// There is an IOMMU, but not for this device.
    #[error("it is in no IOMMU group")]
    NoGroup,
    /// VFIO would let the device reach all of the host's memory.
    #[error("VFIO has it without an IOMMU, so it could reach all of the host's memory")]
    NoIommuMode,
    /// The host uses it.
    #[error("it is bound to the host's driver {0}")]
    HostDriver(String),
    /// It is with no driver.
    #[error("it is bound to no driver")]
    NoDriver,
    /// A mediated device that is not with VFIO.
    #[error("no VFIO driver has this mediated device")]
    MdevDriver,
    /// The host uses other devices in its group.
    #[error("the host uses others in its group {group}: {}", list(.others))]
    SharedGroup {
        /// The group's number.
        group: u32,
        /// The others, less those that do not matter.
        others: Vec<Member>,
    },
    /// A file that VFIO has in `/dev`.
    #[error("there is no {}", .0.display())]
    NoNode(PathBuf),
    /// The same, for those who may not open it.
    #[error("no permission to read and write {}", .0.display())]
    Permission(PathBuf),
}

impl HostDevice {
    /// Whether it could be passed through now, and how it would be opened. Nothing is opened to find out.
    pub fn check(&self, sysfs: &Sysfs) -> Result<Ready, NotReady> {
        self.obstacles(sysfs)
            .map_err(|obstacle| self.not_ready(obstacle))
    }

    /// What would stand in the way even if VFIO had it.
    pub fn check_isolation(&self, sysfs: &Sysfs) -> Result<(), NotReady> {
        self.isolation(sysfs)
            .map_err(|obstacle| self.not_ready(obstacle))
    }

    fn not_ready(&self, obstacle: Obstacle) -> NotReady {
        NotReady {
            device: self.name().to_owned(),
            obstacle,
        }
    }

    fn obstacles(&self, sysfs: &Sysfs) -> Result<Ready, Obstacle> {
        self.isolation(sysfs)?;
        if !self.is_with_vfio() {
            return Err(match (self.kind(), self.driver()) {
                (Kind::Mdev, _) => Obstacle::MdevDriver,
                (Kind::Pci, Some(driver)) => Obstacle::HostDriver(driver),
                (Kind::Pci, None) => Obstacle::NoDriver,
            });
        }
        let group = self.group();
        if let Some(group) = &group {
            alone(self.name(), group)?;
        }
        nodes(group.as_ref(), self.device_node(sysfs), sysfs)
    }

    fn isolation(&self, sysfs: &Sysfs) -> Result<(), Obstacle> {
        // A mediated device needs no IOMMU: its parent's driver sees to it that it reaches the VM's memory only. VFIO
        // gives it a group with the same name as to devices that are without one.
        if self.kind() == Kind::Mdev {
            return Ok(());
        }
        if self.is_bridge() {
            return Err(Obstacle::Bridge);
        }
        match self.group() {
            Some(group) if group.name().as_deref() == Some(OF_VFIO) => Err(Obstacle::NoIommuMode),
            Some(_) => Ok(()),
            None if sysfs.has_iommu() => Err(Obstacle::NoGroup),
            None => Err(Obstacle::IommuOff),
        }
    }
}

impl Obstacle {
    /// What to do about it.
    pub fn remedy(&self, device: &str) -> String {
        const IOMMU_ON: &str = "turn the IOMMU (VT-d, AMD-Vi) on in the firmware's settings, and start the host's \
            kernel with intel_iommu=on, or without amd_iommu=off";
        match self {
            Self::Bridge => "pass the devices behind it through".to_owned(),
            Self::IommuOff => IOMMU_ON.to_owned(),
            Self::NoGroup => "the firmware leaves it out: look for DMAR or AMD-Vi in `dmesg`, or \
                put the device into another slot"
                .to_owned(),
            Self::NoIommuMode => {
                format!("{IOMMU_ON}, and without vfio.enable_unsafe_noiommu_mode")
            }
            Self::HostDriver(_) | Self::NoDriver => {
                format!("`outrigger vfio bind {device}` gives it to VFIO")
            }
            Self::MdevDriver => "load the module of its VFIO driver (up to Linux 5.15, that is \
                `modprobe vfio_mdev`)"
                .to_owned(),
            Self::SharedGroup { others, .. } => {
                let names: Vec<_> = others.iter().map(|other| other.name.as_str()).collect();
                format!(
                    "a group goes to a VM as a whole: `outrigger vfio bind {}` gives these to VFIO too, or put the \
                     device into another slot",
                    names.join(" ")
                )
            }
            Self::NoNode(path) if path.ends_with("dev/iommu") => {
                "`modprobe iommufd` makes it".to_owned()
            }
            Self::NoNode(path) => format!(
                "`modprobe -a vfio-pci vfio_iommu_type1` makes it; in a container, pass {} into it",
                path.display()
            ),
            Self::Permission(path) => format!(
                "`sudo chown $USER {}` gives it to you until the host restarts, and a udev rule for good: \
                 SUBSYSTEM==\"vfio\", GROUP=\"kvm\", MODE=\"0660\"",
                path.display()
            ),
        }
    }
}

/// Checks that the host uses nothing else in the group of `device`.
fn alone(device: &str, group: &Group) -> Result<(), Obstacle> {
    let mut others = group.members();
    others.retain(|member| member.hinders && member.name != device);
    if others.is_empty() {
        return Ok(());
    }
    Err(Obstacle::SharedGroup {
        group: group.number(),
        others,
    })
}

/// The ways to open a device, which has the files that a kernel may make without the others.
fn nodes(
    group: Option<&Group>,
    device: Option<DeviceNode>,
    sysfs: &Sysfs,
) -> Result<Ready, Obstacle> {
    let by_group = group.map(|group| {
        usable(&sysfs.node("vfio/vfio"))?;
        let path = group.path(sysfs);
        usable(&path)?;
        Ok(GroupNode {
            number: group.number(),
            path,
        })
    });
    let by_device = device.map(|device| {
        usable(&sysfs.node("iommu"))?;
        usable(&device.path)?;
        Ok(device)
    });
    match (by_group, by_device) {
        // This kernel has no groups' files, so the others are what is wanted.
        (Some(Err(Obstacle::NoNode(_))) | None, Some(Err(obstacle))) => Err(obstacle),
        (Some(Err(obstacle)), Some(Err(_)) | None) => Err(obstacle),
        // What is isolated by an IOMMU is in a group, so this is a mediated device.
        (None, None) => Err(Obstacle::MdevDriver),
        (group, device) => Ok(Ready {
            group: group.and_then(Result::ok),
            device: device.and_then(Result::ok),
        }),
    }
}

/// Checks that a file in `/dev` can be opened by this process.
fn usable(path: &Path) -> Result<(), Obstacle> {
    let both = Access::READ_OK | Access::WRITE_OK;
    match accessat(CWD, path, both, AtFlags::EACCESS) {
        Ok(()) => Ok(()),
        Err(Errno::NOENT | Errno::NOTDIR) => Err(Obstacle::NoNode(path.to_owned())),
        Err(_) => Err(Obstacle::Permission(path.to_owned())),
    }
}

/// The others with their drivers.
fn list(others: &[Member]) -> String {
    let other = |other: &Member| match &other.driver {
        Some(driver) => format!("{} ({driver})", other.name),
        None => other.name.clone(),
    };
    let others: Vec<_> = others.iter().map(other).collect();
    others.join(", ")
}
