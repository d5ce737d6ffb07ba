//! The built-in devices, as their servers are told of them.

use std::ffi::{OsStr, OsString};

use crate::config::{DiskConfig, NetConfig};

/// A device that is to have a server.
#[derive(Debug)]
pub(super) struct BuiltIn {
    pub(super) id: String,
    /// The flag that asks for it, as far as it tells this device from others.
    pub(super) flag: String,
    /// What it is on: an image or a tap.
    pub(super) resource: Option<String>,
    /// What comes behind `outrigger serve`.
    pub(super) arguments: Vec<OsString>,
}

impl BuiltIn {
    /// The flag that is to blame for what its server says. An image or tap that this names is not named twice.
    pub(super) fn flag_for(&self, reason: &str) -> String {
        let resource = self.resource.as_ref();
        let flag = match resource.filter(|resource| reason.contains(resource.as_str())) {
            Some(_) => self.flag.split(' ').next().unwrap_or_default(),
            None => &self.flag,
        };
        flag.to_owned()
    }
}

impl BuiltIn {
    /// A disk, which is still in use elsewhere if it is `incoming`.
    pub(super) fn of_disk(disk: &DiskConfig, incoming: bool) -> Self {
        // Each field has to be passed on.
        let DiskConfig {
            id,
            path,
            readonly,
            direct,
            num_queues,
            queue_size,
            serial,
        } = disk;
        let mut arguments = vec!["disk".into()];
        arguments.push(argument("--id", id));
        arguments.push(argument("--path", path));
        arguments.extend(readonly.then(|| "--readonly".into()));
        arguments.extend(direct.then(|| "--direct".into()));
        arguments.extend(incoming.then(|| "--incoming".into()));
        arguments.extend(number("--num-queues", *num_queues));
        arguments.extend(number("--queue-size", *queue_size));
        arguments.extend(serial.as_ref().map(|serial| argument("--serial", serial)));
        Self {
            id: id.clone(),
            flag: format!("--disk path={}", path.display()),
            resource: Some(path.display().to_string()),
            arguments,
        }
    }
}

impl From<&NetConfig> for BuiltIn {
    fn from(net: &NetConfig) -> Self {
        // Each field has to be passed on.
        let NetConfig {
            id,
            tap,
            mac,
            mtu,
            num_queues,
            queue_size,
        } = net;
        let mut arguments = vec!["net".into()];
        arguments.push(argument("--id", id));
        arguments.extend(tap.as_ref().map(|tap| argument("--tap", tap)));
        arguments.extend(mac.map(|mac| argument("--mac", mac.to_string())));
        arguments.extend(number("--mtu", *mtu));
        arguments.extend(number("--num-queues", *num_queues));
        arguments.extend(number("--queue-size", *queue_size));
        Self {
            id: id.clone(),
            flag: match tap {
                Some(tap) => format!("--net tap={tap}"),
                None => format!("--net id={id}"),
            },
            resource: tap.clone(),
            arguments,
        }
    }
}

/// What follows the `=` cannot be taken for another flag.
fn argument(flag: &str, value: impl AsRef<OsStr>) -> OsString {
    let mut argument = OsString::from(flag);
    argument.push("=");
    argument.push(value);
    argument
}

fn number(flag: &str, value: Option<u16>) -> Option<OsString> {
    value.map(|value| argument(flag, value.to_string()))
}
