//! What is known of an operation while it goes on, and of the last one that has ended: the body of `vm.migration`.

use std::collections::BTreeMap;
use std::time::Instant;

use serde::{Deserialize, Serialize};
#[cfg(test)]
use utoipa::ToSchema;

/// An operation that takes a VM's state out, puts it back, or moves it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(ToSchema))]
pub enum OperationKind {
    /// `vm.snapshot`
    Snapshot,
    /// `vm.restore`
    Restore,
    /// `vm.send-migration`
    Send,
    /// `vm.receive-migration`
    Receive,
}

impl OperationKind {
    /// The endpoint that starts it.
    pub fn endpoint(self) -> &'static str {
        match self {
            Self::Snapshot => "vm.snapshot",
            Self::Restore => "vm.restore",
            Self::Send => "vm.send-migration",
            Self::Receive => "vm.receive-migration",
        }
    }
}

/// How far an operation has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(ToSchema))]
pub enum Phase {
    /// It checks what there is against what will be needed.
    Preparing,
    /// It waits for a VM to be sent.
    Listening,
    /// Memory and what devices give away early are copied while the guest runs.
    Precopy,
    /// The guest stands still, and the rest is copied.
    StopAndCopy,
    /// Everything is there, and the two ends agree on which of them goes on.
    Committing,
    /// The other end may or may not run the VM; it stands still here until that is resolved.
    InDoubt,
    /// It has done what it was to do.
    Completed,
    /// It has failed, and the VM is where and as it was.
    Failed,
    /// It was cancelled, and the VM is where and as it was.
    Cancelled,
}

impl Phase {
    /// Whether nothing comes after it.
    pub fn is_end(self) -> bool {
        matches!(self, Self::Completed | Self::Failed | Self::Cancelled)
    }

    /// Its name in events.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Preparing => "preparing",
            Self::Listening => "listening",
            Self::Precopy => "precopy",
            Self::StopAndCopy => "stop-and-copy",
            Self::Committing => "committing",
            Self::Completed => "completed",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
            Self::InDoubt => "in-doubt",
        }
    }
}

/// An operation's progress.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(ToSchema))]
pub struct MigrationProgress {
    /// What it does.
    pub operation: OperationKind,
    /// The name of the migration, the same at both ends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// How far it has come.
    pub phase: Phase,
    /// How long it has taken so far, or took in all, in milliseconds.
    pub elapsed_ms: u64,
    /// How many times memory has been gone through.
    pub rounds: u32,
    /// Guest memory in bytes.
    pub memory_bytes: u64,
    /// Bytes of memory and device state that have been copied, those copied twice counted twice.
    pub copied_bytes: u64,
    /// Bytes of memory that are still to be copied, as far as it is known.
    pub remaining_bytes: u64,
    /// How fast it copies, in bytes per second.
    pub bytes_per_second: u64,
    /// How fast the guest and its devices write to memory, in bytes per second.
    pub dirty_bytes_per_second: u64,
    /// How long the guest would stand still if it were stopped now, in microseconds, once that can be said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub estimated_downtime_us: Option<u64>,
    /// How long it did stand still, in microseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub downtime_us: Option<u64>,
    /// What that time went to, in microseconds.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub downtime_parts_us: BTreeMap<String, u64>,
    /// The state of each device, by its id.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub devices: BTreeMap<String, DeviceProgress>,
    /// Why it failed, from the top to the root cause.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub error: Vec<String>,
    #[serde(skip)]
    #[cfg_attr(test, schema(ignore))]
    started: Option<Instant>,
}

/// What is known of a device in the course of an operation.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(ToSchema))]
pub struct DeviceProgress {
    /// The state of the device, as VFIO names it.
    pub state: String,
    /// Bytes of its state that have been copied.
    pub copied_bytes: u64,
    /// Bytes of its state that are still to be copied, if it can say.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remaining_bytes: Option<u64>,
}

impl MigrationProgress {
    /// The progress of an operation that begins now.
    pub(crate) fn new(operation: OperationKind) -> Self {
        Self {
            operation,
            id: None,
            phase: Phase::Preparing,
            elapsed_ms: 0,
            rounds: 0,
            memory_bytes: 0,
            copied_bytes: 0,
            remaining_bytes: 0,
            bytes_per_second: 0,
            dirty_bytes_per_second: 0,
            estimated_downtime_us: None,
            downtime_us: None,
            downtime_parts_us: BTreeMap::new(),
            devices: BTreeMap::new(),
            error: Vec::new(),
            started: Some(Instant::now()),
        }
    }

    /// Brings `elapsed_ms` up to now, unless the operation has ended.
    pub(super) fn tick(&mut self) {
        if let Some(started) = self.started.filter(|_| !self.phase.is_end()) {
            self.elapsed_ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
        }
    }

    /// The figures that `vm.counters` has.
    pub(super) fn counters(&self) -> BTreeMap<String, u64> {
        [
            ("rounds", u64::from(self.rounds)),
            ("copied_bytes", self.copied_bytes),
            ("remaining_bytes", self.remaining_bytes),
            ("elapsed_ms", self.elapsed_ms),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .into()
    }
}
