//! What a VM is to be: the values behind the command line, checked as far as they can be without a host.

mod devices;
mod disk;
mod net;
mod restore;

use std::collections::BTreeSet;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub use self::devices::{HostDeviceConfig, HostDeviceSource, IommufdConfig, UserDeviceConfig};
pub use self::disk::DiskConfig;
pub use self::net::NetConfig;

use crate::layout::PAGE_SIZE;
use crate::options::{OptionError, Options};

/// The least RAM that a VM has: the first MiB and room for a kernel.
const MIN_MEMORY: u64 = 64 << 20;
/// The most: what the 52 address bits of x86 leave below the PCI window.
const MAX_MEMORY: u64 = 1 << 50;
/// What a VM has that is not told.
const DEFAULT_MEMORY: u64 = 512 << 20;
/// RAM is made of pages of 4 KiB, or of huge ones.
const HUGE_PAGE: u64 = 2 << 20;
/// The most vCPUs: APIC ids up to 254 need no extensions of interrupt messages.
const MAX_VCPUS: u32 = 254;

/// The devices of a bus, less the host bridge.
const MAX_DEVICES: usize = 31;

/// A value that no VM can have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// A flag that cannot be understood.
    #[error("{flag}")]
    Option {
        /// The flag.
        flag: &'static str,
        /// What is wrong with it.
        source: OptionError,
    },
    /// Too little or too much RAM.
    #[error("--memory: size={0} is not between 64M and 1024T")]
    MemorySize(u64),
    /// RAM that is not made of whole pages.
    #[error("--memory: size={size} is no multiple of {page} bytes, the size of a page")]
    MemoryPages {
        /// The size asked for.
        size: u64,
        /// The size of a page.
        page: u64,
    },
    /// Too few or too many vCPUs.
    #[error("--cpus: a VM has between 1 and {MAX_VCPUS} vCPUs, not {0}")]
    Vcpus(u32),
    /// Two devices of the same name.
    #[error("two devices have the id `{0}`: give each its own with id=")]
    SameId(String),
    /// More devices than the bus has room for.
    #[error(
        "--disk, --net, --device, --user-device: there is room for {MAX_DEVICES} devices, not {0}"
    )]
    TooManyDevices(usize),
    /// A device of the host that is called in two ways.
    #[error("--device: give either path= or fd=")]
    PathAndDescriptor,
    /// A descriptor that is two things.
    #[error("--device, --platform: descriptor {0} is given twice")]
    SameDescriptor(std::os::fd::RawFd),
    /// A device's descriptor without an iommufd.
    #[error("--device: fd= of {0} needs the iommufd, too: --platform iommufd_fd=N")]
    NoIommufd(String),
    /// A way to connect the serial port that there is not.
    #[error("--serial: `{0}` is none of tty, off, file=PATH and socket=PATH")]
    Serial(String),
}

/// A VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// What it boots.
    pub payload: PayloadConfig,
    /// How many vCPUs it has.
    pub vcpus: u32,
    /// Whether these can run VMs of their own, if the host's CPUs can.
    #[serde(default = "nested_if_not_said")]
    pub nested: bool,
    /// Its RAM.
    pub memory: MemoryConfig,
    /// Its serial port.
    pub serial: SerialConfig,
    /// Its disks, in the order of their places on the bus.
    pub disks: Vec<DiskConfig>,
    /// Its network cards, which come behind them.
    pub nets: Vec<NetConfig>,
    /// The host's devices that it has, which come behind those.
    pub devices: Vec<HostDeviceConfig>,
    /// How these get at guest memory.
    pub iommufd: IommufdConfig,
    /// Its vfio-user devices, which come last.
    pub user_devices: Vec<UserDeviceConfig>,
}

/// Whether a VM can run VMs of its own that is not told.
pub(crate) fn nested_if_not_said() -> bool {
    true
}

/// What a VM boots.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PayloadConfig {
    /// A bzImage, or an ELF file with a PVH note.
    pub kernel: PathBuf,
    /// The initramfs.
    pub initramfs: Option<PathBuf>,
    /// The kernel's command line.
    pub cmdline: String,
}

/// RAM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryConfig {
    /// Its size in bytes.
    pub size: u64,
    /// Whether it is made of huge pages of 2 MiB.
    pub hugepages: bool,
    /// Whether the host's memory is taken at the start, and not when it is used.
    pub prefault: bool,
}

/// The other end of the serial port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub enum SerialConfig {
    /// There is no port.
    Off,
    /// The terminal.
    Tty,
    /// A file that the guest's output is written to.
    File(PathBuf),
    /// A Unix socket that one at a time can connect to.
    Socket(PathBuf),
}

impl VmConfig {
    /// Checks what can be checked without a host.
    pub fn validate(&self) -> Result<(), ConfigError> {
        self.memory.validate()?;
        if !(1..=MAX_VCPUS).contains(&self.vcpus) {
            return Err(ConfigError::Vcpus(self.vcpus));
        }
        let count = self.ids().count();
        if count > MAX_DEVICES {
            return Err(ConfigError::TooManyDevices(count));
        }
        let mut ids = BTreeSet::new();
        if let Some(id) = self.ids().find(|id| !ids.insert(*id)) {
            return Err(ConfigError::SameId(id.clone()));
        }
        self.validate_descriptors()
    }

    /// The names of all devices.
    fn ids(&self) -> impl Iterator<Item = &String> {
        let disks = self.disks.iter().map(|disk| &disk.id);
        let nets = self.nets.iter().map(|net| &net.id);
        let host = self.devices.iter().map(|device| &device.id);
        let user = self.user_devices.iter().map(|device| &device.id);
        disks.chain(nets).chain(host).chain(user)
    }

    /// Whoever takes a descriptor owns it, so it can be named once.
    fn validate_descriptors(&self) -> Result<(), ConfigError> {
        let mut taken = BTreeSet::new();
        if let IommufdConfig::Descriptor(fd) = self.iommufd {
            taken.insert(fd);
        }
        for device in &self.devices {
            let HostDeviceSource::Descriptor(fd) = device.source else {
                continue;
            };
            if taken.is_empty() {
                return Err(ConfigError::NoIommufd(device.id.clone()));
            }
            if !taken.insert(fd) {
                return Err(ConfigError::SameDescriptor(fd));
            }
        }
        Ok(())
    }
}

impl MemoryConfig {
    /// Parses `size=512M,hugepages=on,prefault=on`; `shared=on` is always so and may be said.
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        const KEYS: &[&str] = &["size", "hugepages", "prefault", "shared"];
        let error = |source| ConfigError::Option {
            flag: "--memory",
            source,
        };
        let mut options = Options::parse(text, KEYS).map_err(error)?;
        let config = Self {
            size: options
                .size("size")
                .map_err(error)?
                .unwrap_or(DEFAULT_MEMORY),
            hugepages: options.switch("hugepages").map_err(error)?,
            prefault: options.switch("prefault").map_err(error)?,
        };
        // Guest RAM is a file that devices share in any case.
        match options.string("shared").as_deref() {
            None | Some("on") => Ok(config),
            Some(value) => Err(error(OptionError::Value {
                key: "shared",
                value: value.to_owned(),
                expected: "guest memory is always shared with the devices",
            })),
        }
    }

    fn validate(&self) -> Result<(), ConfigError> {
        if !(MIN_MEMORY..=MAX_MEMORY).contains(&self.size) {
            return Err(ConfigError::MemorySize(self.size));
        }
        let page = if self.hugepages { HUGE_PAGE } else { PAGE_SIZE };
        if !self.size.is_multiple_of(page) {
            return Err(ConfigError::MemoryPages {
                size: self.size,
                page,
            });
        }
        Ok(())
    }
}

impl Default for MemoryConfig {
    fn default() -> Self {
        Self {
            size: DEFAULT_MEMORY,
            hugepages: false,
            prefault: false,
        }
    }
}

/// Parses what `--cpus` says, how many vCPUs there are and whether they can run VMs: `4` or `boot=4,nested=off`.
pub fn parse_cpus(text: &str) -> Result<(u32, bool), ConfigError> {
    let error = |source| ConfigError::Option {
        flag: "--cpus",
        source,
    };
    if let Ok(count) = text.parse() {
        return Ok((count, nested_if_not_said()));
    }
    let mut options = Options::parse(text, &["boot", "nested"]).map_err(error)?;
    let count = options.number("boot").map_err(error)?;
    let count = count.ok_or_else(|| error(OptionError::Missing("boot")))?;
    let nested = options.given_switch("nested").map_err(error)?;
    Ok((count, nested.unwrap_or_else(nested_if_not_said)))
}

impl SerialConfig {
    /// Parses `tty`, `off`, `file=PATH` or `socket=PATH`.
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        match (text, text.split_once('=')) {
            ("tty", _) => Ok(Self::Tty),
            ("off" | "null", _) => Ok(Self::Off),
            (_, Some(("file", path))) if !path.is_empty() => Ok(Self::File(path.into())),
            (_, Some(("socket", path))) if !path.is_empty() => Ok(Self::Socket(path.into())),
            _ => Err(ConfigError::Serial(text.to_owned())),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// The least that a VM needs.
    pub(crate) fn config() -> VmConfig {
        VmConfig {
            payload: PayloadConfig {
                kernel: "vmlinuz".into(),
                initramfs: None,
                cmdline: String::new(),
            },
            vcpus: 1,
            nested: true,
            memory: MemoryConfig::default(),
            serial: SerialConfig::Off,
            disks: Vec::new(),
            nets: Vec::new(),
            devices: Vec::new(),
            iommufd: IommufdConfig::Auto,
            user_devices: Vec::new(),
        }
    }

    #[test]
    fn absurd_sizes_are_refused() {
        let memory = |text: &str| {
            let memory = MemoryConfig::parse(text).unwrap();
            VmConfig { memory, ..config() }.validate()
        };
        assert_eq!(memory("size=64M"), Ok(()));
        assert_eq!(memory("size=512G,prefault=on,shared=on"), Ok(()));
        assert_eq!(memory("size=63M"), Err(ConfigError::MemorySize(63 << 20)));
        assert_eq!(
            memory("size=4000000T"),
            Err(ConfigError::MemorySize(4_000_000 << 40))
        );
        assert!(memory("size=67108865").is_err());
        assert!(memory("size=65M,hugepages=on").is_err());
        assert_eq!(memory("size=66M,hugepages=on"), Ok(()));
    }

    #[test]
    fn memory_is_never_private() {
        assert!(MemoryConfig::parse("size=1G,shared=off").is_err());
    }

    #[test]
    fn vcpus_are_a_number_or_an_option() {
        assert_eq!(parse_cpus("4"), Ok((4, true)));
        assert_eq!(parse_cpus("boot=4"), Ok((4, true)));
        assert_eq!(parse_cpus("boot=4,nested=on"), Ok((4, true)));
        assert_eq!(parse_cpus("nested=off,boot=4"), Ok((4, false)));
        for wrong in ["max=4", "four", "", "nested=off", "boot=4,nested=no"] {
            assert!(parse_cpus(wrong).is_err(), "{wrong}");
        }
        for vcpus in [0, 255] {
            assert_eq!(
                VmConfig { vcpus, ..config() }.validate(),
                Err(ConfigError::Vcpus(vcpus))
            );
        }
    }

    #[test]
    fn devices_have_names_of_their_own() {
        let device = |text, place| UserDeviceConfig::parse(text, place).unwrap();
        let devices = |user_devices| {
            VmConfig {
                user_devices,
                ..config()
            }
            .validate()
        };
        assert_eq!(device("socket=/a", 1).id, "user-device1");
        let twice = vec![
            device("socket=/a,id=d", 0),
            device("socket=/b", 1),
            device("socket=/c,id=d", 2),
        ];
        assert_eq!(devices(twice), Err(ConfigError::SameId("d".into())));
        let many = (0..32).map(|place| device("socket=/a", place)).collect();
        assert_eq!(devices(many), Err(ConfigError::TooManyDevices(32)));
        let given = |id: &str, fd| HostDeviceConfig {
            id: id.to_owned(),
            source: HostDeviceSource::Descriptor(fd),
            rom: false,
        };
        let mixed = VmConfig {
            devices: vec![given("d", 7)],
            user_devices: vec![device("socket=/a,id=d", 0)],
            ..config()
        };
        assert_eq!(mixed.validate(), Err(ConfigError::SameId("d".into())));
        let mixed = VmConfig {
            disks: vec![DiskConfig::parse("path=a,id=d", 0).unwrap()],
            nets: vec![NetConfig::parse("id=d", 0).unwrap()],
            ..config()
        };
        assert_eq!(mixed.validate(), Err(ConfigError::SameId("d".into())));
        assert!(UserDeviceConfig::parse("id=d", 0).is_err());
        assert!(UserDeviceConfig::parse("socket=", 0).is_err());
    }

    #[test]
    fn descriptors_are_named_once_and_with_an_iommufd() {
        let given = |id: &str, fd| HostDeviceConfig {
            id: id.to_owned(),
            source: HostDeviceSource::Descriptor(fd),
            rom: false,
        };
        let devices = vec![given("a", 7), given("b", 8)];
        let with = |iommufd| {
            let devices = devices.clone();
            VmConfig {
                devices,
                iommufd,
                ..config()
            }
            .validate()
        };
        let alone = with(IommufdConfig::Auto);
        assert_eq!(alone, Err(ConfigError::NoIommufd("a".into())));
        let twice = with(IommufdConfig::Descriptor(8));
        assert_eq!(twice, Err(ConfigError::SameDescriptor(8)));
        assert_eq!(with(IommufdConfig::Descriptor(9)), Ok(()));
    }

    #[test]
    fn serial_port_has_four_other_ends() {
        assert_eq!(SerialConfig::parse("tty"), Ok(SerialConfig::Tty));
        assert_eq!(SerialConfig::parse("off"), Ok(SerialConfig::Off));
        assert_eq!(
            SerialConfig::parse("file=/a=b"),
            Ok(SerialConfig::File("/a=b".into()))
        );
        assert_eq!(
            SerialConfig::parse("socket=/s"),
            Ok(SerialConfig::Socket("/s".into()))
        );
        for wrong in ["", "pty", "file", "file=", "socket="] {
            assert!(SerialConfig::parse(wrong).is_err(), "{wrong}");
        }
    }
}
