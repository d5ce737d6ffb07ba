//! Snapshots, compared.

use std::fs;
use std::path::Path;

use serde_json::Value;

/// Expects two snapshots to be the same, but for what changes with time, in vCPUs these parts.
///
/// # Panics
/// When they are not.
pub fn expect_same(first: &Path, second: &Path, with_time: &[&str]) {
    let ram = |path: &Path| fs::read(path.join("ram")).unwrap_or_default();
    let [before, after] = [ram(first), ram(second)];
    assert!(!before.is_empty() && before == after, "RAM");
    let [before, after] = [first, second].map(|path| timeless_state(path, with_time));
    assert!(before.is_object());
    for (name, before) in before.as_object().into_iter().flatten() {
        assert!(
            after[name] == *before,
            "{name}: {before:#}, then {:#}",
            after[name]
        );
    }
}

/// What `machine.json` says, but for what changes with time.
fn timeless_state(path: &Path, with_time: &[&str]) -> Value {
    let document = fs::read(path.join("machine.json")).unwrap_or_default();
    let mut document: Value = serde_json::from_slice(&document).unwrap_or_default();
    let mut state = document["state"].take();
    state["clock"].take();
    // The timer keeps when it was started.
    state["chips"]["pit"].take();
    for vcpu in state["vcpus"].as_array_mut().into_iter().flatten() {
        for part in with_time {
            vcpu[part].take();
        }
    }
    state
}
