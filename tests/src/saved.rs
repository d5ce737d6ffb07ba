//! Snapshots, compared.

use std::fs;
use std::ops::Range;
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
    expect_same_value("state", &before, &after);
}

fn expect_same_value(name: &str, before: &Value, after: &Value) {
    match (before, after) {
        (Value::Object(before), Value::Object(after)) if before.len() == after.len() => {
            for (key, value) in before {
                let other = after.get(key).unwrap_or(&Value::Null);
                expect_same_value(&format!("{name}.{key}"), value, other);
            }
        }
        (Value::Array(before), Value::Array(after)) if before.len() == after.len() => {
            for (index, pair) in before.iter().zip(after).enumerate() {
                expect_same_value(&format!("{name}.{index}"), pair.0, pair.1);
            }
        }
        _ => assert!(before == after, "{name}: {before:#}, then {after:#}"),
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
        // Whether registers that are as at reset count as in use, XSTATE_BV tells now so and now so (Intel SDM, volume 1,
        // 13.6). It is in the 64 bits behind the first 512 bytes.
        cut(vcpu, "xsave", 512..520);
        // The processor's priority follows from the task's and from what is in service (Intel SDM, volume 3, 11.8.3.1). KVM
        // works it out anew when it is given the rest, and may tell an old one before that.
        cut(vcpu, "lapic", 0xa0..0xa4);
    }
    state
}

/// Takes these bytes, each of which has two digits, out of a part of a vCPU's state.
fn cut(vcpu: &mut Value, part: &str, bytes: Range<usize>) {
    let digits = bytes.start * 2..bytes.end * 2;
    if let Some(text) = vcpu[part]
        .as_str()
        .filter(|text| text.is_ascii() && text.len() > digits.end)
    {
        let mut text = text.to_owned();
        text.drain(digits);
        vcpu[part] = text.into();
    }
}
