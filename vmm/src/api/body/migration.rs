//! Snapshots and migration: what is to go where.

use std::time::Duration;

use serde::{Deserialize, Serialize};
#[cfg(test)]
use utoipa::ToSchema;

use super::rest::Rest;
use crate::control::{
    self, ControlError, DevicePlaces, Operation, ReceiveRequest, Resolution, RestoreRequest,
    SendRequest, SnapshotRequest, snapshot_directory,
};

/// Most connections that memory is sent over.
const MAX_CONNECTIONS: u8 = 16;

/// Where a snapshot is to go.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(ToSchema))]
#[serde(deny_unknown_fields)]
pub struct SnapshotConfig {
    /// `file:///PATH`, a directory.
    pub destination_url: String,
}

/// Which snapshot is to be restored.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(ToSchema))]
pub struct RestoreConfig {
    /// `file:///PATH`, a directory.
    pub source_url: String,
    /// Whether the host's memory is taken at the start.
    #[serde(default)]
    pub prefault: bool,
    /// Whether the guest goes on at once; else it is paused.
    #[serde(default)]
    pub resume: bool,
    /// Memory is always copied.
    #[serde(default)]
    pub memory_restore_mode: MemoryRestoreMode,
    /// Devices that are elsewhere on this host than they were.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub devices: Vec<DeviceOverride>,
    #[serde(flatten, skip_serializing)]
    #[cfg_attr(test, schema(ignore))]
    rest: Rest,
}

/// How memory comes back.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(ToSchema))]
pub enum MemoryRestoreMode {
    /// Before the guest goes on.
    #[default]
    Copy,
}

/// Where a VM is to go, and how.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(ToSchema))]
pub struct SendMigrationData {
    /// `tcp:HOST:PORT` or `unix:PATH`.
    pub destination_url: String,
    /// Whether memory and connections are handed over to a VMM of the same host rather than copied.
    #[serde(default)]
    pub local: bool,
    /// How long the guest may stand still, in milliseconds.
    #[serde(default = "downtime")]
    #[cfg_attr(test, schema(minimum = 1))]
    pub downtime_ms: u64,
    /// How long it may take until the guest is stopped, in seconds.
    #[serde(default = "time_limit")]
    #[cfg_attr(test, schema(minimum = 1))]
    pub timeout_s: u64,
    /// What happens then.
    #[serde(default)]
    pub timeout_strategy: TimeoutStrategy,
    /// Over how many connections memory is sent.
    #[serde(default = "connections")]
    #[cfg_attr(test, schema(minimum = 1, maximum = 16))]
    pub connections: u8,
    /// The directory with `ca-cert.pem`, `client-cert.pem` and `client-key.pem`, for TLS.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls_dir: Option<String>,
    /// Whether it may go in the clear over a network.
    #[serde(default)]
    pub insecure: bool,
    /// Whether devices may go along that keep no log of what they write to memory. The guest then stands still while all
    /// of its memory is sent, however much longer than `downtime_ms` that takes.
    #[serde(default)]
    pub unlogged_dma: bool,
    /// Memory is always sent before the guest runs there.
    #[serde(default)]
    pub memory_mode: MemoryMode,
    #[serde(flatten, skip_serializing)]
    #[cfg_attr(test, schema(ignore))]
    rest: Rest,
}

/// Where a VM is to come from, and how.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(ToSchema))]
pub struct ReceiveMigrationData {
    /// `tcp:HOST:PORT` or `unix:PATH`.
    pub receiver_url: String,
    /// The directory with `ca-cert.pem`, `server-cert.pem` and `server-key.pem`, for TLS.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls_dir: Option<String>,
    /// Whether it may come in the clear over a network.
    #[serde(default)]
    pub insecure: bool,
    /// Memory is always sent before the guest runs here.
    #[serde(default)]
    pub memory_mode: MemoryMode,
    /// Devices that are elsewhere on this host than they were.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub devices: Vec<DeviceOverride>,
    #[serde(flatten, skip_serializing)]
    #[cfg_attr(test, schema(ignore))]
    rest: Rest,
}

/// What is to become of a VM whose migration is in doubt.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(ToSchema))]
pub enum MigrationOutcome {
    /// What the other end says, which is asked.
    #[default]
    Ask,
    /// It runs here: it does not at the other end, and never will.
    Run,
    /// It is gone from here.
    Discard,
}

/// Says what is to become of a VM whose migration is in doubt.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(ToSchema))]
#[serde(deny_unknown_fields)]
pub struct ResolveMigrationData {
    /// What is to become of it.
    #[serde(default)]
    pub outcome: MigrationOutcome,
}

impl From<ResolveMigrationData> for Resolution {
    fn from(data: ResolveMigrationData) -> Self {
        match data.outcome {
            MigrationOutcome::Ask => Self::Ask,
            MigrationOutcome::Run => Self::Run,
            MigrationOutcome::Discard => Self::Discard,
        }
    }
}

/// When memory is sent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(ToSchema))]
pub enum MemoryMode {
    /// Before the guest runs at its destination.
    #[default]
    Precopy,
}

/// What happens to a migration that takes too long.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(ToSchema))]
pub enum TimeoutStrategy {
    /// The VM stays.
    #[default]
    Cancel,
    /// The guest is stopped, however long the rest takes.
    Ignore,
}

/// Where a device is on this host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(ToSchema))]
#[serde(deny_unknown_fields)]
pub struct DeviceOverride {
    /// The device.
    pub id: String,
    /// The socket of a vfio-user device's server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket: Option<String>,
    /// The image of a disk, the tap of a network card, or a device of the host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
}

fn downtime() -> u64 {
    300
}

fn time_limit() -> u64 {
    3600
}

fn connections() -> u8 {
    1
}

impl SnapshotConfig {
    /// A snapshot in the directory that `url` names.
    pub fn new(url: &str) -> Self {
        Self {
            destination_url: url.to_owned(),
        }
    }
}

impl RestoreConfig {
    /// The snapshot in the directory that `url` names, and nothing else than usual.
    pub fn new(url: &str) -> Self {
        Self {
            source_url: url.to_owned(),
            prefault: false,
            resume: false,
            memory_restore_mode: MemoryRestoreMode::Copy,
            devices: Vec::new(),
            rest: Rest::default(),
        }
    }
}

impl SendMigrationData {
    /// A migration to `url`, and nothing else than usual.
    pub fn new(url: &str) -> Self {
        Self {
            destination_url: url.to_owned(),
            local: false,
            downtime_ms: downtime(),
            timeout_s: time_limit(),
            timeout_strategy: TimeoutStrategy::default(),
            connections: connections(),
            tls_dir: None,
            insecure: false,
            unlogged_dma: false,
            memory_mode: MemoryMode::Precopy,
            rest: Rest::default(),
        }
    }
}

impl ReceiveMigrationData {
    /// A migration that comes to `url`, and nothing else than usual.
    pub fn new(url: &str) -> Self {
        Self {
            receiver_url: url.to_owned(),
            tls_dir: None,
            insecure: false,
            memory_mode: MemoryMode::Precopy,
            devices: Vec::new(),
            rest: Rest::default(),
        }
    }
}

impl TryFrom<SnapshotConfig> for Operation {
    type Error = ControlError;

    fn try_from(config: SnapshotConfig) -> Result<Self, ControlError> {
        let directory = snapshot_directory(&config.destination_url)?;
        Ok(Self::Snapshot(SnapshotRequest { directory }))
    }
}

impl TryFrom<RestoreConfig> for Operation {
    type Error = ControlError;

    fn try_from(config: RestoreConfig) -> Result<Self, ControlError> {
        expect_nothing(&config.rest)?;
        Ok(Self::Restore(RestoreRequest {
            directory: snapshot_directory(&config.source_url)?,
            resume: config.resume,
            prefault: config.prefault,
            devices: places(config.devices)?,
        }))
    }
}

impl TryFrom<SendMigrationData> for Operation {
    type Error = ControlError;

    fn try_from(data: SendMigrationData) -> Result<Self, ControlError> {
        expect_nothing(&data.rest)?;
        if !(1..=MAX_CONNECTIONS).contains(&data.connections) {
            let what = format!("connections: it is between 1 and {MAX_CONNECTIONS}");
            return Err(ControlError::Invalid(what));
        }
        for (name, value) in [
            ("downtime_ms", data.downtime_ms),
            ("timeout_s", data.timeout_s),
        ] {
            if value == 0 {
                return Err(ControlError::Invalid(format!("{name}: it is at least 1")));
            }
        }
        Ok(Self::Send(SendRequest {
            destination: data.destination_url.parse()?,
            connections: data.connections,
            local: data.local,
            downtime: Duration::from_millis(data.downtime_ms),
            timeout: Duration::from_secs(data.timeout_s),
            on_timeout: match data.timeout_strategy {
                TimeoutStrategy::Cancel => control::TimeoutStrategy::Cancel,
                TimeoutStrategy::Ignore => control::TimeoutStrategy::Ignore,
            },
            tls_dir: data.tls_dir.map(Into::into),
            insecure: data.insecure,
            unlogged_dma: data.unlogged_dma,
        }))
    }
}

impl TryFrom<ReceiveMigrationData> for Operation {
    type Error = ControlError;

    fn try_from(data: ReceiveMigrationData) -> Result<Self, ControlError> {
        expect_nothing(&data.rest)?;
        Ok(Self::Receive(ReceiveRequest {
            receiver: data.receiver_url.parse()?,
            tls_dir: data.tls_dir.map(Into::into),
            insecure: data.insecure,
            devices: places(data.devices)?,
        }))
    }
}

fn expect_nothing(rest: &Rest) -> Result<(), ControlError> {
    let mut wrong = Vec::new();
    rest.refuse("", &mut wrong);
    if wrong.is_empty() {
        Ok(())
    } else {
        let what = format!("not possible here: {}", wrong.join(", "));
        Err(ControlError::Invalid(what))
    }
}

fn places(overrides: Vec<DeviceOverride>) -> Result<DevicePlaces, ControlError> {
    let mut places = DevicePlaces::new();
    for DeviceOverride { id, socket, path } in overrides {
        let invalid = |what: &str| ControlError::Invalid(format!("devices: {id}: {what}"));
        let place = match (socket, path) {
            (Some(place), None) | (None, Some(place)) => place,
            _ => return Err(invalid("give either its socket or its path")),
        };
        if places.insert(id.clone(), place.into()).is_some() {
            return Err(invalid("it is there twice"));
        }
    }
    Ok(places)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn operation<T: TryInto<Operation, Error = ControlError> + serde::de::DeserializeOwned>(
        text: &str,
    ) -> Result<Operation, String> {
        let body: T = serde_json::from_str(text).map_err(|error| error.to_string())?;
        body.try_into()
            .map_err(|error: ControlError| error.to_string())
    }

    #[test]
    fn what_ch_remote_sends_is_understood() {
        let send = operation::<SendMigrationData>(
            r#"{"destination_url": "tcp:10.0.0.2:4444", "local": false, "preserve_source": false,
                "downtime_ms": 300, "timeout_s": 3600, "timeout_strategy": "Cancel",
                "connections": 4, "tls_dir": null, "memory_mode": "Precopy"}"#,
        );
        let Ok(Operation::Send(send)) = send else {
            panic!("{send:?}");
        };
        assert_eq!(send.destination.to_string(), "tcp:10.0.0.2:4444");
        assert_eq!(
            (send.connections, send.downtime),
            (4, Duration::from_millis(300))
        );
        let receive = operation::<ReceiveMigrationData>(
            r#"{"receiver_url": "unix:/s", "tls_dir": null, "memory_mode": "Precopy",
                "vfio_fds": null, "iommufd_fd": null, "zone_updates": []}"#,
        );
        assert!(matches!(receive, Ok(Operation::Receive(_))), "{receive:?}");
        let restore = operation::<RestoreConfig>(
            r#"{"source_url": "file:///snapshot", "prefault": false, "net_fds": null,
                "memory_restore_mode": "Copy", "resume": true, "zone_updates": []}"#,
        );
        assert!(matches!(restore, Ok(Operation::Restore(_))), "{restore:?}");
    }

    #[test]
    fn what_cannot_be_is_named() {
        for (text, named) in [
            (
                r#"{"destination_url": "tcp:h:1", "memory_mode": "Postcopy"}"#,
                "Postcopy",
            ),
            (
                r#"{"destination_url": "tcp:h:1", "preserve_source": true}"#,
                "preserve_source",
            ),
            (
                r#"{"destination_url": "tcp:h:1", "connections": 17}"#,
                "connections",
            ),
            (
                r#"{"destination_url": "tcp:h:1", "connections": 0}"#,
                "connections",
            ),
            (
                r#"{"destination_url": "tcp:h:1", "downtime_ms": 0}"#,
                "downtime_ms",
            ),
            (r#"{"destination_url": "http://h"}"#, "tcp:HOST:PORT"),
            ("{}", "destination_url"),
        ] {
            let error = operation::<SendMigrationData>(text).unwrap_err();
            assert!(error.contains(named), "{text}: {error}");
        }
        for devices in [
            r#"{"id": "a"}"#,
            r#"{"id": "a", "path": "p", "socket": "s"}"#,
            r#"{"id": "a", "path": "p"}, {"id": "a", "path": "q"}"#,
            r#"{"id": "a", "tap": "p"}"#,
        ] {
            let text = format!(r#"{{"receiver_url": "unix:/s", "devices": [{devices}]}}"#);
            assert!(operation::<ReceiveMigrationData>(&text).is_err(), "{text}");
        }
    }
}
