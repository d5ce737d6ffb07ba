//! `--disk`.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::ConfigError;
use super::devices::option_error;
use crate::options::{OptionError, Options};

/// A disk: a file or a block device of the host, served by a process of its own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// The name by which it is spoken of.
    pub id: String,
    /// The image: a raw file, or a block device.
    pub path: PathBuf,
    /// Whether the guest may only read it.
    pub readonly: bool,
    /// Whether the host's page cache is passed by.
    pub direct: bool,
    /// How many queues it has, unless as many as usual.
    pub num_queues: Option<u16>,
    /// How many descriptors each of them has, unless as many as usual.
    pub queue_size: Option<u16>,
    /// The serial number that the guest sees.
    pub serial: Option<String>,
}

impl DiskConfig {
    /// Parses `path=PATH,readonly=on,direct=on,num_queues=N,queue_size=N,serial=TEXT,id=NAME`. A disk without a name is
    /// called after its place among the others. What it can be is for its server to say.
    pub fn parse(text: &str, place: usize) -> Result<Self, ConfigError> {
        const KEYS: &[&str] = &[
            "path",
            "readonly",
            "direct",
            "num_queues",
            "queue_size",
            "serial",
            "id",
        ];
        let error = option_error("--disk");
        let mut options = Options::parse(text, KEYS).map_err(error)?;
        let path = options.path("path").map_err(error)?;
        Ok(Self {
            path: path.ok_or_else(|| error(OptionError::Missing("path")))?,
            readonly: options.switch("readonly").map_err(error)?,
            direct: options.switch("direct").map_err(error)?,
            num_queues: options.number("num_queues").map_err(error)?,
            queue_size: options.number("queue_size").map_err(error)?,
            serial: options.string("serial"),
            id: options
                .string("id")
                .unwrap_or_else(|| format!("disk{place}")),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_are_as_in_cloud_hypervisor() {
        let disk = DiskConfig::parse("path=focal.raw", 1).unwrap();
        let usual = DiskConfig {
            id: "disk1".into(),
            path: "focal.raw".into(),
            readonly: false,
            direct: false,
            num_queues: None,
            queue_size: None,
            serial: None,
        };
        assert_eq!(disk, usual);
        let text = "path=/a=b,readonly=on,direct=on,num_queues=4,queue_size=256,serial=S 1,id=root";
        let all = DiskConfig {
            id: "root".into(),
            path: "/a=b".into(),
            readonly: true,
            direct: true,
            num_queues: Some(4),
            queue_size: Some(256),
            serial: Some("S 1".into()),
        };
        assert_eq!(DiskConfig::parse(text, 1), Ok(all));
        for wrong in [
            "",
            "focal.raw",
            "path=",
            "readonly=on",
            "path=a,readonly=yes",
            "path=a,num_queues=65536",
            "path=a,queue_size=-1",
            "path=a,qcow2=on",
        ] {
            assert!(DiskConfig::parse(wrong, 0).is_err(), "{wrong}");
        }
    }
}
