//! What the fuzz target does with its input. An ordinary test does the same with the corpus.

#![allow(
    clippy::unwrap_used,
    reason = "what has been restored can be saved and goes on"
)]

#[path = "../tests/support/mod.rs"]
mod support;

use devices::{EndpointState, Fingerprint};
use pci::Endpoint as _;

use self::support::{MEMORY, Rig, TABLE};

/// Takes `bytes` for a saved endpoint in JSON, and restores it. Either it is refused, and the device is as after a reset,
/// or the device is what was saved. Returns whether it was restored.
pub(crate) fn endpoint(bytes: &[u8]) -> bool {
    let rig = Rig::new();
    if let Ok(saved) = serde_json::from_slice(bytes) {
        for mismatch in Fingerprint::compare(&saved, rig.endpoint.fingerprint()) {
            assert!(mismatch.to_string().starts_with("it: "));
        }
    }
    let Ok(state) = serde_json::from_slice::<EndpointState>(bytes) else {
        return false;
    };
    let as_new = rig.endpoint.save().unwrap();
    let restored = rig.endpoint.restore(&state).is_ok();
    let expected = if restored { &state } else { &as_new };
    assert_eq!(rig.endpoint.save().unwrap(), *expected);
    rig.endpoint.resume().unwrap();
    rig.machine.delivered();
    // What a guest does next.
    for offset in (0..0x100).step_by(4) {
        let value = rig.config(offset);
        rig.endpoint.config_write(offset, &value.to_le_bytes());
    }
    rig.endpoint.bar_write(MEMORY, TABLE + 12, &[0; 4]);
    rig.endpoint.reset().unwrap();
    restored
}
