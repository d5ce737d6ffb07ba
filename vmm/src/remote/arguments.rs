//! What can be asked.

use std::path::PathBuf;

use anyhow::{anyhow, bail};
use clap::{Args, Subcommand};
use vmm::api::body::{
    DeviceOverride, MigrationOutcome, ReceiveMigrationData, ResolveMigrationData, RestoreConfig,
    SendMigrationData, TimeoutStrategy,
};

/// Which VMM is asked, and what.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// The socket that it serves its API on
    #[arg(long, value_name = "PATH")]
    api_socket: String,

    #[command(subcommand)]
    pub(super) verb: Verb,
}

impl Arguments {
    pub(super) fn socket(&self) -> anyhow::Result<PathBuf> {
        crate::cli::path_option("--api-socket", &self.api_socket)
    }
}

/// What can be asked.
#[derive(Debug, Subcommand)]
pub(super) enum Verb {
    /// Asks whether it is there, and shows its version
    Ping,
    /// Shows what the VM is and does
    Info,
    /// Shows what has been counted, of each device and of memory
    Counters,
    /// Says what the VM is to be: a file of JSON, or - for standard input
    Create {
        /// The file
        #[arg(default_value = "-", value_name = "FILE")]
        file: PathBuf,
    },
    /// Makes the VM that was created, and starts it
    Boot,
    /// Has the vCPUs stop; they have when info says Paused
    Pause,
    /// Lets the vCPUs go on
    Resume,
    /// Resets the VM and its devices, and starts it again
    Reboot,
    /// Presses the VM's power button
    PowerButton,
    /// Ends the VM's run; it can be booted again
    Shutdown,
    /// Ends the VM's run, if it runs, and forgets it
    Delete,
    /// Ends the VMM, and with it the VM
    ShutdownVmm,
    /// Writes the VM's state into a directory: file:///PATH
    Snapshot {
        /// The directory
        url: String,
    },
    /// Makes a VM of a snapshot: file:///PATH
    Restore(Restore),
    /// Moves the VM to the VMM that waits for it: tcp:HOST:PORT or unix:PATH
    Migrate(Box<Migrate>),
    /// Waits for another VMM to send its VM, and takes it: tcp:HOST:PORT or unix:PATH
    Receive(Receive),
    /// Shows how far the operation has come that goes on, or how the last one ended
    Migration,
    /// Cancels the operation that goes on
    Cancel,
    /// Asks the other end whether the VM runs there whose migration is in doubt, or says so
    Resolve(Resolve),
}

/// Which snapshot is to be restored.
#[derive(Debug, Args)]
pub(super) struct Restore {
    /// The directory
    url: String,
    /// Let the guest go on at once
    #[arg(long)]
    resume: bool,
    /// Take the host's memory at the start
    #[arg(long)]
    prefault: bool,
    /// Where a device is on this host: id=NAME, and socket=PATH or path=PATH
    #[arg(long = "device", value_name = "id=NAME,...")]
    devices: Vec<String>,
}

/// Where a VM is to come from, and how.
#[derive(Debug, Args)]
pub(super) struct Receive {
    /// Where it is waited for
    url: String,
    /// The directory with ca-cert.pem, server-cert.pem and server-key.pem, for TLS
    #[arg(long, value_name = "PATH")]
    tls_dir: Option<String>,
    /// Allow it to come in the clear over a network
    #[arg(long)]
    insecure: bool,
    /// Where a device is on this host: id=NAME, and socket=PATH or path=PATH
    #[arg(long = "device", value_name = "id=NAME,...")]
    devices: Vec<String>,
}

/// What is to become of a VM of which it is not known where it runs.
#[derive(Debug, Args)]
pub(super) struct Resolve {
    /// It runs here: you know that it does not at the other end, and never will
    #[arg(long, conflicts_with = "discard")]
    run: bool,
    /// It is gone from here
    #[arg(long)]
    discard: bool,
}

impl Resolve {
    pub(super) fn body(&self) -> ResolveMigrationData {
        ResolveMigrationData {
            outcome: match self {
                Self { run: true, .. } => MigrationOutcome::Run,
                Self { discard: true, .. } => MigrationOutcome::Discard,
                Self { .. } => MigrationOutcome::Ask,
            },
        }
    }
}

/// Where a VM is to go, and how.
#[derive(Debug, Args)]
pub(super) struct Migrate {
    /// Where it is waited for
    url: String,
    /// Over how many connections memory is sent, 1 to 16
    #[arg(long, default_value_t = 1, value_name = "NUMBER")]
    connections: u8,
    /// Hand memory and connections over to a VMM of this host, over a Unix socket
    #[arg(long)]
    local: bool,
    /// How long the guest may stand still
    #[arg(long, default_value_t = 300, value_name = "MILLISECONDS")]
    downtime_ms: u64,
    /// How long it may take until the guest is stopped
    #[arg(long, default_value_t = 3600, value_name = "SECONDS")]
    timeout_s: u64,
    /// Stop the guest when that time is over, instead of giving up
    #[arg(long)]
    ignore_timeout: bool,
    /// The directory with ca-cert.pem, client-cert.pem and client-key.pem, for TLS
    #[arg(long, value_name = "PATH")]
    tls_dir: Option<String>,
    /// Allow it to go in the clear over a network
    #[arg(long)]
    insecure: bool,
    /// Allow devices to go along that keep no log of what they write to memory, whatever that costs
    #[arg(long)]
    unlogged_dma: bool,
}

impl Migrate {
    pub(super) fn body(&self) -> SendMigrationData {
        let mut data = SendMigrationData::new(&self.url);
        data.local = self.local;
        data.downtime_ms = self.downtime_ms;
        data.timeout_s = self.timeout_s;
        if self.ignore_timeout {
            data.timeout_strategy = TimeoutStrategy::Ignore;
        }
        data.connections = self.connections;
        data.tls_dir.clone_from(&self.tls_dir);
        data.insecure = self.insecure;
        data.unlogged_dma = self.unlogged_dma;
        data
    }
}

pub(super) fn restore_config(restore: &Restore) -> anyhow::Result<RestoreConfig> {
    let mut config = RestoreConfig::new(&restore.url);
    config.resume = restore.resume;
    config.prefault = restore.prefault;
    config.devices = overrides(&restore.devices)?;
    Ok(config)
}

pub(super) fn receive_data(receive: &Receive) -> anyhow::Result<ReceiveMigrationData> {
    let mut data = ReceiveMigrationData::new(&receive.url);
    data.tls_dir.clone_from(&receive.tls_dir);
    data.insecure = receive.insecure;
    data.devices = overrides(&receive.devices)?;
    Ok(data)
}

fn overrides(devices: &[String]) -> anyhow::Result<Vec<DeviceOverride>> {
    devices.iter().map(|text| parse_override(text)).collect()
}

fn parse_override(text: &str) -> anyhow::Result<DeviceOverride> {
    let (mut id, mut socket, mut path) = (None, None, None);
    for part in text.split(',') {
        let value = match part.split_once('=') {
            Some(("id", value)) => id.replace(value.to_owned()),
            Some(("socket", value)) => socket.replace(value.to_owned()),
            Some(("path", value)) => path.replace(value.to_owned()),
            _ => bail!("--device: `{part}` is none of id=NAME, socket=PATH and path=PATH"),
        };
        if value.is_some() {
            bail!("--device: `{text}` says something twice");
        }
    }
    let id = id.ok_or_else(|| anyhow!("--device: `{text}` has no id="))?;
    Ok(DeviceOverride { id, socket, path })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_may_be_elsewhere() {
        let place = parse_override("id=nvme,socket=/run/nvme.sock").unwrap();
        assert_eq!((place.id.as_str(), place.path), ("nvme", None));
        assert_eq!(place.socket.as_deref(), Some("/run/nvme.sock"));
        for wrong in ["", "nvme", "socket=/s", "id=a,id=b", "id=a,mac=b"] {
            assert!(parse_override(wrong).is_err(), "{wrong}");
        }
    }
}
