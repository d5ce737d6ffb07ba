//! The bodies of requests and responses, for the server and its clients. Names and defaults are Cloud Hypervisor's.

mod convert;
mod migration;
mod rest;
mod vm;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
#[cfg(test)]
use utoipa::ToSchema;

pub use self::migration::{
    DeviceOverride, MemoryMode, MemoryRestoreMode, MigrationOutcome, ReceiveMigrationData,
    ResolveMigrationData, RestoreConfig, SendMigrationData, SnapshotConfig, TimeoutStrategy,
};
pub use self::rest::Rest;
pub use self::vm::{
    Console, ConsoleMode, Cpus, Device, Disk, Memory, Net, Payload, Platform, UserDevice, VmConfig,
};
use crate::control;

/// What the VMM is.
#[derive(Debug, Serialize, Deserialize)]
#[cfg_attr(test, derive(ToSchema))]
pub struct VmmPing {
    /// As `version`.
    pub build_version: String,
    /// The version of the program.
    pub version: String,
    /// The number of its process.
    pub pid: u32,
    /// None.
    pub features: Vec<String>,
}

impl VmmPing {
    /// What this VMM is.
    pub(super) fn here() -> Self {
        let version = concat!("v", env!("CARGO_PKG_VERSION")).to_owned();
        Self {
            build_version: version.clone(),
            version,
            pid: std::process::id(),
            features: Vec::new(),
        }
    }
}

/// What a VM does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(ToSchema))]
pub enum VmState {
    /// It has been described, and does not run.
    Created,
    /// Its vCPUs run, or one of them has not stopped yet.
    Running,
    /// Its vCPUs stand still.
    Paused,
}

impl From<control::VmState> for VmState {
    fn from(state: control::VmState) -> Self {
        match state {
            control::VmState::Created => Self::Created,
            control::VmState::Running => Self::Running,
            control::VmState::Paused => Self::Paused,
        }
    }
}

/// What is known of a VM.
#[derive(Debug, Serialize, Deserialize)]
#[cfg_attr(test, derive(ToSchema))]
pub struct VmInfo {
    /// What it is to be.
    pub config: VmConfig,
    /// What it does.
    pub state: VmState,
    /// Its RAM in bytes.
    pub memory_actual_size: u64,
    /// Its devices, by their ids, while it runs.
    pub device_tree: BTreeMap<String, DeviceNode>,
}

/// A device of a VM.
#[derive(Debug, Serialize, Deserialize)]
#[cfg_attr(test, derive(ToSchema))]
pub struct DeviceNode {
    /// Its id.
    pub id: String,
    /// Where it is: `SSSS:BB:DD.F`.
    pub pci_bdf: String,
    /// None.
    pub children: Vec<String>,
    /// None.
    #[cfg_attr(test, schema(value_type = Vec<Object>))]
    pub resources: Vec<serde_json::Value>,
}

impl From<control::VmInfo> for VmInfo {
    fn from(info: control::VmInfo) -> Self {
        let node = |(id, bdf): (String, pci::Bdf)| {
            let node = DeviceNode {
                id: id.clone(),
                pci_bdf: format!("0000:{bdf}"),
                children: Vec::new(),
                resources: Vec::new(),
            };
            (id, node)
        };
        Self {
            config: info.config.as_ref().into(),
            state: info.state.into(),
            memory_actual_size: info.config.memory.size,
            device_tree: info.devices.into_iter().map(node).collect(),
        }
    }
}

/// Counts by what is counted, by device or part of the machine.
#[derive(Debug, Serialize, Deserialize)]
#[cfg_attr(test, derive(ToSchema))]
#[serde(transparent)]
pub struct VmCounters(pub control::Counters);
