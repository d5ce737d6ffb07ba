//! Fields of Cloud Hypervisor's that say nothing here.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;

/// The fields of an object that have no meaning here. They are accepted if they ask for nothing: if they are null, false
/// or empty, or what Cloud Hypervisor has when they are not given.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(transparent)]
pub struct Rest(BTreeMap<String, Value>);

impl Rest {
    /// Adds the names of the fields that ask for something, with the name of the object that they are in, if it has one.
    pub(super) fn refuse(&self, object: &str, wrong: &mut Vec<String>) {
        for (name, value) in &self.0 {
            if !asks_for_nothing(name, value) {
                let dot = if object.is_empty() { "" } else { "." };
                wrong.push(format!("{object}{dot}{name}"));
            }
        }
    }
}

fn asks_for_nothing(name: &str, value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(values) => values.is_empty(),
        Value::Object(fields) => fields
            .iter()
            .all(|(name, value)| asks_for_nothing(name, value)),
        Value::Bool(true) => USUALLY_ON.contains(&name),
        Value::Number(number) => {
            let is = |usual: &(&str, u64)| usual.0 == name && number.as_u64() == Some(usual.1);
            USUAL_NUMBERS.iter().any(is)
        }
        Value::String(text) => USUAL_TEXTS.contains(&(name, text)),
    }
}

/// What is on if it is not said to be off.
const USUALLY_ON: &[&str] = &[
    "offload_csum",
    "offload_tso",
    "offload_ufo",
    "sparse",
    "thp",
    "vfio_p2p_dma",
];

/// What numbers are if they are not given.
const USUAL_NUMBERS: &[(&str, u64)] = &[
    ("iommu_address_width_bits", 64),
    ("max_phys_bits", 46),
    ("num_pci_segments", 1),
    ("pci_segment", 0),
];

/// What texts are if they are not given, or say the same.
const USUAL_TEXTS: &[(&str, &str)] = &[
    ("core_scheduling", "Vm"),
    ("hotplug_method", "Acpi"),
    ("image_type", "Raw"),
    ("image_type", "Unknown"),
    ("lock_granularity", "ByteRange"),
    ("mode", "Off"),
    ("profile", "Host"),
    // Guests of Cloud Hypervisor's have a virtio-rng even if nobody asks for one.
    ("src", "/dev/urandom"),
    ("vhost_mode", "Client"),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_refused_unless_they_ask_for_nothing() {
        let text = r#"{
            "balloon": null, "iommu": false, "fs": [], "features": {"amx": false},
            "rng": {"src": "/dev/urandom", "iommu": false}, "thp": true, "pci_segment": 0,
            "tpm": {"socket": "/t"}, "watchdog": true, "vsock": {}, "max_phys_bits": 40,
            "core_scheduling": "Vcpu"
        }"#;
        let rest: Rest = serde_json::from_str(text).unwrap();
        let mut wrong = Vec::new();
        rest.refuse("", &mut wrong);
        assert_eq!(
            wrong,
            ["core_scheduling", "max_phys_bits", "tpm", "watchdog"]
        );
        wrong.clear();
        rest.refuse("disks[1]", &mut wrong);
        assert_eq!(wrong[0], "disks[1].core_scheduling");
    }
}
