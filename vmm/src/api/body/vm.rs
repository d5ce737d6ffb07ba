//! What a VM is to be: the body of `vm.create`, and a part of that of `vm.info`.

use serde::{Deserialize, Serialize};
#[cfg(test)]
use utoipa::ToSchema;

use super::rest::Rest;
use crate::config::nested_if_not_said;

/// A VM. Fields of Cloud Hypervisor's that are not listed here are accepted with their usual values only.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
#[cfg_attr(test, derive(ToSchema))]
pub struct VmConfig {
    /// What it boots.
    pub payload: Payload,
    /// Its vCPUs.
    #[serde(default)]
    pub cpus: Cpus,
    /// Its RAM.
    #[serde(default)]
    pub memory: Memory,
    /// Its disks, in the order of their places on the bus.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disks: Option<Vec<Disk>>,
    /// Its network cards, which come behind them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub net: Option<Vec<Net>>,
    /// The host's devices that it has, which come behind those.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub devices: Option<Vec<Device>>,
    /// Its vfio-user devices, which come last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user_devices: Option<Vec<UserDevice>>,
    /// Its serial port; none if it is not given.
    #[serde(default)]
    pub serial: Console,
    /// There is no console but the serial port, so this is Off or Null.
    #[serde(default)]
    pub console: Console,
    /// How the host's devices get at guest memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<Platform>,
    #[serde(flatten, skip_serializing)]
    #[cfg_attr(test, schema(ignore))]
    pub(super) rest: Rest,
}

/// What a VM boots.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
#[cfg_attr(test, derive(ToSchema))]
pub struct Payload {
    /// A bzImage, or an ELF file with a PVH note.
    pub kernel: String,
    /// The initramfs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initramfs: Option<String>,
    /// The kernel's command line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cmdline: Option<String>,
    #[serde(flatten, skip_serializing)]
    #[cfg_attr(test, schema(ignore))]
    pub(super) rest: Rest,
}

/// vCPUs.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
#[cfg_attr(test, derive(ToSchema))]
pub struct Cpus {
    /// How many there are.
    #[cfg_attr(test, schema(minimum = 1, maximum = 254))]
    pub boot_vcpus: u32,
    /// The same.
    pub max_vcpus: u32,
    /// Whether they can run VMs of their own, if the host's CPUs can.
    #[serde(default = "nested_if_not_said")]
    #[cfg_attr(test, schema(default = true))]
    pub nested: bool,
    #[serde(flatten, skip_serializing)]
    #[cfg_attr(test, schema(ignore))]
    pub(super) rest: Rest,
}

/// RAM. It is always shared with the devices, whatever `shared` says.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
#[cfg_attr(test, derive(ToSchema))]
pub struct Memory {
    /// Its size in bytes.
    pub size: u64,
    /// Always so, and false is accepted.
    #[serde(default)]
    pub shared: bool,
    /// Whether it is made of huge pages.
    #[serde(default)]
    pub hugepages: bool,
    /// Their size in bytes: 2 MiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hugepage_size: Option<u64>,
    /// Whether the host's memory is taken at the start, and not when it is used.
    #[serde(default)]
    pub prefault: bool,
    #[serde(flatten, skip_serializing)]
    #[cfg_attr(test, schema(ignore))]
    pub(super) rest: Rest,
}

/// A disk.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
#[cfg_attr(test, derive(ToSchema))]
pub struct Disk {
    /// The name by which it is spoken of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// The image: a raw file, or a block device.
    pub path: String,
    /// Whether the guest may only read it.
    #[serde(default)]
    pub readonly: bool,
    /// Whether the host's page cache is passed by.
    #[serde(default)]
    pub direct: bool,
    /// How many queues it has; 1 if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub num_queues: Option<u16>,
    /// How many descriptors each of them has; 256 if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queue_size: Option<u16>,
    /// The serial number that the guest sees.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
    #[serde(flatten, skip_serializing)]
    #[cfg_attr(test, schema(ignore))]
    pub(super) rest: Rest,
}

/// A network card.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
#[cfg_attr(test, derive(ToSchema))]
pub struct Net {
    /// The name by which it is spoken of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// The tap, unless one is to be made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tap: Option<String>,
    /// The MAC address of the guest's end, unless it is left to chance.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<String>,
    /// The MTU in bytes, unless that of the tap.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u16>,
    /// How many queues it has, those that receive and those that transmit; 2 if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub num_queues: Option<u16>,
    /// How many descriptors each of them has; 256 if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queue_size: Option<u16>,
    #[serde(flatten, skip_serializing)]
    #[cfg_attr(test, schema(ignore))]
    pub(super) rest: Rest,
}

/// A device of the host.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
#[cfg_attr(test, derive(ToSchema))]
pub struct Device {
    /// The name by which it is spoken of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// Its sysfs directory, its PCI address or a mediated device's UUID. One that the VMM was started with as a
    /// descriptor has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// Whether the guest sees its expansion ROM.
    #[serde(default)]
    pub rom: bool,
    #[serde(flatten, skip_serializing)]
    #[cfg_attr(test, schema(ignore))]
    pub(super) rest: Rest,
}

/// A vfio-user device.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
#[cfg_attr(test, derive(ToSchema))]
pub struct UserDevice {
    /// The name by which it is spoken of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// The socket that its server listens on.
    pub socket: String,
    #[serde(flatten, skip_serializing)]
    #[cfg_attr(test, schema(ignore))]
    pub(super) rest: Rest,
}

/// The other end of the serial port.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
#[cfg_attr(test, derive(ToSchema))]
pub struct Console {
    /// What it is.
    pub mode: ConsoleMode,
    /// The file that the guest's output is written to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<String>,
    /// The Unix socket that one at a time can connect to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket: Option<String>,
    #[serde(flatten, skip_serializing)]
    #[cfg_attr(test, schema(ignore))]
    pub(super) rest: Rest,
}

/// What the other end of a port is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[cfg_attr(test, derive(ToSchema))]
pub enum ConsoleMode {
    /// There is no port.
    Off,
    /// As Off.
    Null,
    /// The terminal.
    Tty,
    /// A file.
    File,
    /// A Unix socket.
    Socket,
}

/// How the host's devices get at guest memory.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
#[cfg_attr(test, derive(ToSchema))]
pub struct Platform {
    /// By iommufd; else it is used if the host has it for all of them.
    #[serde(default)]
    pub iommufd: bool,
    #[serde(flatten, skip_serializing)]
    #[cfg_attr(test, schema(ignore))]
    pub(super) rest: Rest,
}

impl Default for Cpus {
    fn default() -> Self {
        Self {
            boot_vcpus: 1,
            max_vcpus: 1,
            nested: nested_if_not_said(),
            rest: Rest::default(),
        }
    }
}

impl Default for Memory {
    fn default() -> Self {
        Self {
            size: crate::config::MemoryConfig::default().size,
            shared: true,
            hugepages: false,
            hugepage_size: None,
            prefault: false,
            rest: Rest::default(),
        }
    }
}

impl Default for Console {
    fn default() -> Self {
        Self {
            mode: ConsoleMode::Null,
            file: None,
            socket: None,
            rest: Rest::default(),
        }
    }
}
