//! What operations are asked to do, parsed.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use super::ControlError;
use super::progress::OperationKind;

/// An operation that takes a VM's state out, puts it back, or moves it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Operation {
    /// Writes the VM's state into a directory.
    Snapshot(SnapshotRequest),
    /// Makes a VM of what was written there.
    Restore(RestoreRequest),
    /// Moves the VM to another VMM.
    Send(SendRequest),
    /// Takes a VM from another VMM.
    Receive(ReceiveRequest),
}

impl Operation {
    /// Which of them it is.
    pub fn kind(&self) -> OperationKind {
        match self {
            Self::Snapshot(_) => OperationKind::Snapshot,
            Self::Restore(_) => OperationKind::Restore,
            Self::Send(_) => OperationKind::Send,
            Self::Receive(_) => OperationKind::Receive,
        }
    }
}

/// What a snapshot is to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotRequest {
    /// The directory that it is written into.
    pub directory: PathBuf,
}

/// What is to be restored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RestoreRequest {
    /// The directory that a snapshot was written into.
    pub directory: PathBuf,
    /// Whether the guest goes on at once, or stays paused.
    pub resume: bool,
    /// Whether the host's memory is taken at the start.
    pub prefault: bool,
    /// Where devices are on this host that are elsewhere than they were.
    pub devices: DevicePlaces,
}

/// Where a VM is to go, and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SendRequest {
    /// Where its next VMM waits for it.
    pub destination: MigrationUrl,
    /// Over how many connections memory is sent, 1 to 16.
    pub connections: u8,
    /// Whether memory and connections are handed over rather than copied.
    pub local: bool,
    /// How long the guest may stand still.
    pub downtime: Duration,
    /// How long it may take until the guest is stopped.
    pub timeout: Duration,
    /// What happens then.
    pub on_timeout: TimeoutStrategy,
    /// Where the certificates for TLS are.
    pub tls_dir: Option<PathBuf>,
    /// Whether it may go in the clear over a network.
    pub insecure: bool,
    /// Whether devices may go along that keep no log of what they write to memory, whatever that costs.
    pub unlogged_dma: bool,
}

/// Where a VM is to come from, and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReceiveRequest {
    /// Where it is waited for.
    pub receiver: MigrationUrl,
    /// Where the certificates for TLS are.
    pub tls_dir: Option<PathBuf>,
    /// Whether it may come in the clear over a network.
    pub insecure: bool,
    /// Where devices are on this host that are elsewhere than they were.
    pub devices: DevicePlaces,
}

/// The socket or path of devices, by their ids.
pub type DevicePlaces = BTreeMap<String, PathBuf>;

/// What is to become of a VM of which it is not known whether it runs here or at the other end of a migration.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Resolution {
    /// What the other end says, which is asked.
    #[default]
    Ask,
    /// It runs here. The operator vouches that it does not run at the other end, and never will.
    Run,
    /// It is gone from here.
    Discard,
}

/// What happens to a migration that does not come to its end in time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum TimeoutStrategy {
    /// The VM stays.
    #[default]
    Cancel,
    /// The guest is stopped, however long the rest takes.
    Ignore,
}

/// Where two VMMs meet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MigrationUrl {
    /// `tcp:HOST:PORT`
    Tcp {
        /// A name or an address, an IPv6 address without its brackets.
        host: String,
        /// The port.
        port: u16,
    },
    /// `unix:PATH`
    Unix(PathBuf),
}

impl FromStr for MigrationUrl {
    type Err = ControlError;

    fn from_str(text: &str) -> Result<Self, ControlError> {
        let invalid =
            || ControlError::Invalid(format!("`{text}` is neither tcp:HOST:PORT nor unix:PATH"));
        match text.split_once(':').ok_or_else(invalid)? {
            ("unix", path) if !path.is_empty() => Ok(Self::Unix(path.into())),
            ("tcp", address) => {
                let (host, port) = address.rsplit_once(':').ok_or_else(invalid)?;
                let port = port.parse().map_err(|_| invalid())?;
                let unbracketed = host
                    .strip_prefix('[')
                    .and_then(|host| host.strip_suffix(']'));
                let host = unbracketed.unwrap_or(host);
                // Without its brackets, where an IPv6 address ends is a guess.
                if host.is_empty() || port == 0 || (unbracketed.is_none() && host.contains(':')) {
                    return Err(invalid());
                }
                Ok(Self::Tcp {
                    host: host.to_owned(),
                    port,
                })
            }
            _ => Err(invalid()),
        }
    }
}

impl fmt::Display for MigrationUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host, port } if host.contains(':') => write!(f, "tcp:[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "tcp:{host}:{port}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// The directory that a snapshot's URL names: `file://PATH`, the path absolute.
pub fn snapshot_directory(url: &str) -> Result<PathBuf, ControlError> {
    url.strip_prefix("file://")
        .map(Path::new)
        .filter(|path| path.is_absolute())
        .map(Path::to_owned)
        .ok_or_else(|| {
            ControlError::Invalid(format!(
                "`{url}` is not file:///PATH, the path of a directory"
            ))
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_read_and_written_alike() {
        for text in [
            "tcp:host:1",
            "tcp:10.0.0.1:65535",
            "tcp:[::1]:8000",
            "unix:/a:b",
        ] {
            assert_eq!(text.parse::<MigrationUrl>().unwrap().to_string(), text);
        }
        for wrong in [
            "",
            "tcp",
            "unix:",
            "tcp:host",
            "tcp::1",
            "tcp:host:0",
            "tcp:host:65536",
            "tcp:::1:80",
            "tcp:[]:80",
            "http://host",
            "/a",
        ] {
            assert!(wrong.parse::<MigrationUrl>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn snapshots_are_in_absolute_directories() {
        assert_eq!(
            snapshot_directory("file:///a/b").unwrap(),
            Path::new("/a/b")
        );
        for wrong in ["", "/a", "file://", "file://a", "file:/a", "http:///a"] {
            assert!(snapshot_directory(wrong).is_err(), "{wrong}");
        }
    }
}
