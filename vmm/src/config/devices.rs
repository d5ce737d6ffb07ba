//! The devices of a VM.

use std::os::fd::RawFd;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::ConfigError;
use crate::options::{OptionError, Options};

/// A vfio-user device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UserDeviceConfig {
    /// The name by which it is spoken of.
    pub id: String,
    /// The socket that its server listens on.
    pub socket: PathBuf,
}

/// A device of the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostDeviceConfig {
    /// The name by which it is spoken of.
    pub id: String,
    /// Which device it is.
    pub source: HostDeviceSource,
    /// Whether the guest sees its expansion ROM.
    pub rom: bool,
}

/// Where a device of the host comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub enum HostDeviceSource {
    /// A sysfs directory, a PCI address or the UUID of a mediated device.
    Path(String),
    /// A descriptor of its VFIO character device, which this process was started with.
    #[serde(skip)]
    Descriptor(RawFd),
}

/// How the host's devices get at guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub enum IommufdConfig {
    /// By iommufd if the host has it for all of them, else by VFIO's groups.
    #[default]
    Auto,
    /// By an iommufd of our own.
    On,
    /// By VFIO's groups.
    Off,
    /// By an iommufd that this process was started with.
    #[serde(skip)]
    Descriptor(RawFd),
}

impl UserDeviceConfig {
    /// Parses `socket=PATH,id=NAME`. A device without a name is called after its place among the others.
    pub fn parse(text: &str, place: usize) -> Result<Self, ConfigError> {
        let error = option_error("--user-device");
        let mut options = Options::parse(text, &["socket", "id"]).map_err(error)?;
        let socket = options.path("socket").map_err(error)?;
        Ok(Self {
            id: options
                .string("id")
                .unwrap_or_else(|| format!("user-device{place}")),
            socket: socket.ok_or_else(|| error(OptionError::Missing("socket")))?,
        })
    }
}

impl HostDeviceConfig {
    /// Parses `path=DEVICE,id=NAME,rom=on` or `fd=N,id=NAME,rom=on`. A device without a name is called after its place among the
    /// others.
    pub fn parse(text: &str, place: usize) -> Result<Self, ConfigError> {
        let error = option_error("--device");
        let mut options = Options::parse(text, &["path", "fd", "id", "rom"]).map_err(error)?;
        let path = options.string("path").filter(|path| !path.is_empty());
        let descriptor = descriptor(&mut options, "fd").map_err(error)?;
        let source = match (path, descriptor) {
            (Some(path), None) => HostDeviceSource::Path(path),
            (None, Some(descriptor)) => HostDeviceSource::Descriptor(descriptor),
            (Some(_), Some(_)) => return Err(ConfigError::PathAndDescriptor),
            (None, None) => return Err(error(OptionError::Missing("path"))),
        };
        Ok(Self {
            id: options
                .string("id")
                .unwrap_or_else(|| format!("device{place}")),
            source,
            rom: options.switch("rom").map_err(error)?,
        })
    }
}

impl IommufdConfig {
    /// Parses `iommufd=on|off|auto` or `iommufd_fd=N`.
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        let error = option_error("--platform");
        let mut options = Options::parse(text, &["iommufd", "iommufd_fd"]).map_err(error)?;
        let descriptor = descriptor(&mut options, "iommufd_fd").map_err(error)?;
        let iommufd = options.string("iommufd");
        match (iommufd.as_deref(), descriptor) {
            (None | Some("on"), Some(descriptor)) => Ok(Self::Descriptor(descriptor)),
            (Some("on"), None) => Ok(Self::On),
            (Some("off"), None) => Ok(Self::Off),
            (None | Some("auto"), None) => Ok(Self::Auto),
            (Some(value), _) => Err(error(OptionError::Value {
                key: "iommufd",
                value: value.to_owned(),
                expected: "it is on, off or auto, and on with iommufd_fd=",
            })),
        }
    }
}

/// A descriptor that this process was started with: not one of the three that it uses itself. (Flags are parsed before
/// anything is opened, so that it is not one of those either.)
fn descriptor(options: &mut Options, key: &'static str) -> Result<Option<RawFd>, OptionError> {
    let Some(number) = options.number::<u32>(key)? else {
        return Ok(None);
    };
    let is_open = |fd: &RawFd| *fd > 2 && Path::new(&format!("/proc/self/fd/{fd}")).exists();
    let descriptor = RawFd::try_from(number).ok().filter(is_open);
    descriptor.map(Some).ok_or_else(|| OptionError::Value {
        key,
        value: number.to_string(),
        expected: "an open descriptor above 2 is needed",
    })
}

pub(super) fn option_error(flag: &'static str) -> impl Fn(OptionError) -> ConfigError + Copy {
    move |source| ConfigError::Option { flag, source }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsRawFd;

    use super::*;

    fn a_descriptor() -> (File, RawFd) {
        let file = File::open("/dev/null").unwrap();
        let fd = file.as_raw_fd();
        (file, fd)
    }

    #[test]
    fn host_devices_are_called_by_path_or_descriptor() {
        let (_file, fd) = a_descriptor();
        let device = |text: &str| HostDeviceConfig::parse(text, 3);
        let config = device("path=/sys/bus/pci/devices/0000:01:00.0/").unwrap();
        assert_eq!(config.id, "device3");
        let path = "/sys/bus/pci/devices/0000:01:00.0/".to_owned();
        assert_eq!(config.source, HostDeviceSource::Path(path));
        let config = device(&format!("fd={fd},id=nic")).unwrap();
        assert_eq!(config.id, "nic");
        assert_eq!(config.source, HostDeviceSource::Descriptor(fd));
        let both = format!("path=01:00.0,fd={fd}");
        for wrong in [
            "id=nic", "path=", "fd=2", "fd=x", "fd=12345", &both, "01:00.0",
        ] {
            assert!(device(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn iommufd_is_on_off_or_given() {
        let (_file, fd) = a_descriptor();
        let given = format!("iommufd_fd={fd}");
        let on = format!("iommufd=on,iommufd_fd={fd}");
        let off = format!("iommufd=off,iommufd_fd={fd}");
        for (text, config) in [
            ("iommufd=on", IommufdConfig::On),
            ("iommufd=off", IommufdConfig::Off),
            ("iommufd=auto", IommufdConfig::Auto),
            (&given, IommufdConfig::Descriptor(fd)),
            (&on, IommufdConfig::Descriptor(fd)),
        ] {
            assert_eq!(IommufdConfig::parse(text), Ok(config), "{text}");
        }
        for wrong in [&off, "iommufd=yes", "iommufd_fd=0", "iommu=on"] {
            assert!(IommufdConfig::parse(wrong).is_err(), "{wrong}");
        }
    }
}
