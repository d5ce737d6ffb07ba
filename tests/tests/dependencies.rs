//! What the crates depend upon: in one direction only, each in one version, and under licences that go with ours.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

use serde_json::Value;

/// Licences under which a dependency may be.
const LICENCES: &[&str] = &[
    "Apache-2.0",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "ISC",
    "MIT",
    "Unicode-3.0",
    "Unlicense",
    "Zlib",
];

/// Crates that the program has in more than one version, and why.
const TWICE: &[(&str, &str)] = &[
    ("bitflags", "vmm-sys-util has 1, everything else 2"),
    ("syn", "derive macros only: nothing of it is in the program"),
];

/// What each crate may depend upon directly. Ours are told by their names, others only where they matter.
const ROOMS: &[(&str, &[&str])] = &[
    ("pci", &[]),
    ("vfio-user-protocol", &[]),
    ("vfio-user-client", &["vfio-user-protocol"]),
    ("vfio-user-server", &["vfio-user-protocol"]),
    ("device-servers", &["vfio-user-server"]),
    ("devices", &["pci", "vfio-user-client", "vfio-bindings"]),
    (
        "vmm",
        &[
            "pci",
            "vfio-user-client",
            "vfio-user-server",
            "devices",
            "device-servers",
            "kvm-ioctls",
            "kvm-bindings",
        ],
    ),
];

/// Crates that not everyone may use.
const GUARDED: &[&str] = &[
    "kvm-ioctls",
    "kvm-bindings",
    "vfio-ioctls",
    "vfio-bindings",
    "vfio_user",
];

fn metadata() -> Value {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args([
            "metadata",
            "--format-version",
            "1",
            "--locked",
            "--filter-platform",
            "x86_64-unknown-linux-gnu",
        ])
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    serde_json::from_slice(&output.stdout).unwrap()
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or_default()
}

fn list<'a>(value: &'a Value, key: &str) -> &'a [Value] {
    value[key].as_array().map_or(&[], Vec::as_slice)
}

/// The packages that the program is built of: what `vmm` reaches without development dependencies.
fn in_program(metadata: &Value) -> Vec<&Value> {
    let packages: BTreeMap<_, _> = list(metadata, "packages")
        .iter()
        .map(|package| (text(package, "id"), package))
        .collect();
    let nodes: BTreeMap<_, _> = list(&metadata["resolve"], "nodes")
        .iter()
        .map(|node| (text(node, "id"), node))
        .collect();
    let root = packages
        .values()
        .find(|package| text(package, "name") == "vmm")
        .unwrap();
    let mut reached = BTreeSet::new();
    let mut next = vec![text(root, "id")];
    while let Some(id) = next.pop() {
        if reached.insert(id) {
            let built_in = |dependency: &&Value| {
                list(dependency, "dep_kinds")
                    .iter()
                    .any(|kind| kind["kind"] != "dev")
            };
            next.extend(
                list(nodes[id], "deps")
                    .iter()
                    .filter(built_in)
                    .map(|dependency| text(dependency, "pkg")),
            );
        }
    }
    reached.into_iter().map(|id| packages[id]).collect()
}

#[test]
fn licences_go_with_ours() {
    let metadata = metadata();
    for package in list(&metadata, "packages") {
        let licence = text(package, "license");
        // Cargo still takes the old way to write "or".
        let expression = spdx::Expression::parse_mode(licence, spdx::ParseMode::LAX);
        let allowed = |requirement: &spdx::LicenseReq| {
            requirement
                .license
                .id()
                .is_some_and(|id| LICENCES.contains(&id.name))
        };
        let is_allowed = expression.is_ok_and(|expression| expression.evaluate(allowed));
        assert!(is_allowed, "{} is under `{licence}`", text(package, "name"));
    }
}

#[test]
fn each_crate_is_there_once() {
    let metadata = metadata();
    let mut versions: BTreeMap<_, BTreeSet<_>> = BTreeMap::new();
    for package in in_program(&metadata) {
        versions
            .entry(text(package, "name"))
            .or_default()
            .insert(text(package, "version"));
    }
    let allowed: BTreeSet<_> = TWICE.iter().map(|(name, _)| *name).collect();
    versions.retain(|name, versions| versions.len() > 1 && !allowed.contains(name));
    assert!(versions.is_empty(), "{versions:?}");
}

#[test]
fn dependencies_point_one_way() {
    let metadata = metadata();
    let members: BTreeSet<_> = list(&metadata, "workspace_members")
        .iter()
        .filter_map(Value::as_str)
        .collect();
    let is_member = |package: &&Value| members.contains(text(package, "id"));
    let ours: Vec<_> = list(&metadata, "packages")
        .iter()
        .filter(is_member)
        .collect();
    let names: BTreeSet<_> = ours.iter().map(|package| text(package, "name")).collect();
    for (name, allowed) in ROOMS {
        let package = ours
            .iter()
            .find(|package| text(package, "name") == *name)
            .unwrap();
        for dependency in list(package, "dependencies") {
            let dependency_name = text(dependency, "name");
            let matters = names.contains(dependency_name) || GUARDED.contains(&dependency_name);
            if dependency["kind"] != "dev" && matters {
                assert!(
                    allowed.contains(&dependency_name),
                    "{name} may not depend upon {dependency_name}"
                );
            }
        }
    }
}
