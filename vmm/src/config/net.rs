//! `--net`.

use device_servers::net::MacAddress;
use serde::{Deserialize, Serialize};

use super::ConfigError;
use super::devices::option_error;
use crate::options::{OptionError, Options};

/// A network card on a tap of the host, served by a process of its own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetConfig {
    /// The name by which it is spoken of.
    pub id: String,
    /// The tap, unless one is to be made.
    pub tap: Option<String>,
    /// The MAC address of the guest's end, unless it is left to chance.
    #[serde(with = "mac_as_text")]
    pub mac: Option<MacAddress>,
    /// The MTU in bytes, unless that of the tap.
    pub mtu: Option<u16>,
    /// How many queues it has, those that receive and those that transmit, unless as many as usual.
    pub num_queues: Option<u16>,
    /// How many descriptors each of them has, unless as many as usual.
    pub queue_size: Option<u16>,
}

impl NetConfig {
    /// Parses `tap=NAME,mac=MAC,mtu=N,num_queues=N,queue_size=N,id=NAME`, or nothing. A card without a name is called
    /// after its place among the others. What it can be is for its server to say.
    pub fn parse(text: &str, place: usize) -> Result<Self, ConfigError> {
        const KEYS: &[&str] = &["tap", "mac", "mtu", "num_queues", "queue_size", "id"];
        let error = option_error("--net");
        let mut options = match text {
            "" => Options::default(),
            text => Options::parse(text, KEYS).map_err(error)?,
        };
        Ok(Self {
            tap: options.string("tap").filter(|name| !name.is_empty()),
            mac: mac(&mut options).map_err(error)?,
            mtu: options.number("mtu").map_err(error)?,
            num_queues: options.number("num_queues").map_err(error)?,
            queue_size: options.number("queue_size").map_err(error)?,
            id: options
                .string("id")
                .unwrap_or_else(|| format!("net{place}")),
        })
    }
}

fn mac(options: &mut Options) -> Result<Option<MacAddress>, OptionError> {
    let parse = |value: String| {
        let expected =
            "the address of a card is needed, like 52:54:00:12:34:56, the first byte even";
        value.parse().map_err(|_| OptionError::Value {
            key: "mac",
            value,
            expected,
        })
    };
    options.string("mac").map(parse).transpose()
}

/// MAC addresses in saved configurations look as they do elsewhere.
mod mac_as_text {
    use device_servers::net::MacAddress;
    use serde::de::Error as _;
    use serde::{Deserialize as _, Deserializer, Serialize as _, Serializer};

    #[expect(clippy::ref_option, reason = "serde calls it so")]
    pub(super) fn serialize<S: Serializer>(
        mac: &Option<MacAddress>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        mac.map(|mac| mac.to_string()).serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<MacAddress>, D::Error> {
        let text = Option::<String>::deserialize(deserializer)?;
        text.map(|text| text.parse().map_err(D::Error::custom))
            .transpose()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cards_are_as_in_cloud_hypervisor() {
        let usual = NetConfig {
            id: "net1".into(),
            tap: None,
            mac: None,
            mtu: None,
            num_queues: None,
            queue_size: None,
        };
        for text in ["", "tap="] {
            assert_eq!(NetConfig::parse(text, 1), Ok(usual.clone()), "{text}");
        }
        let text = "tap=vm0,mac=52:54:00:12:34:56,mtu=9000,num_queues=4,queue_size=512,id=lan";
        let all = NetConfig {
            id: "lan".into(),
            tap: Some("vm0".into()),
            mac: MacAddress::new([0x52, 0x54, 0, 0x12, 0x34, 0x56]),
            mtu: Some(9000),
            num_queues: Some(4),
            queue_size: Some(512),
        };
        assert_eq!(NetConfig::parse(text, 1), Ok(all));
        for wrong in [
            "vm0",
            "mac=",
            "mac=53:54:00:12:34:56",
            "mtu=65536",
            "ip=10.0.0.1",
        ] {
            assert!(NetConfig::parse(wrong, 0).is_err(), "{wrong}");
        }
    }
}
