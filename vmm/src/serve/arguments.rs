//! What comes behind `outrigger serve`.

use std::path::PathBuf;

use anyhow::bail;
use clap::{Args, Subcommand};
use device_servers::net::MacAddress;
use device_servers::{disk, net};

/// The built-in devices.
#[derive(Debug, Subcommand)]
pub(crate) enum Device {
    /// A device that does everything that a device can do: for demonstrations, tests, and those who write a client
    Demo {
        #[command(flatten)]
        to: Client,
    },
    /// A disk: virtio-blk on a raw image or a block device
    Disk {
        #[command(flatten)]
        disk: DiskArguments,
        #[command(flatten)]
        to: Client,
    },
    /// A network card: virtio-net on a tap
    Net {
        #[command(flatten)]
        net: NetArguments,
        #[command(flatten)]
        to: Client,
    },
}

impl Device {
    /// What the VM calls it whose device it is.
    pub(crate) fn id(&self) -> Option<&str> {
        match self {
            Self::Demo { to } | Self::Disk { to, .. } | Self::Net { to, .. } => to.id.as_deref(),
        }
    }
}

/// Whom a device is served to.
#[derive(Debug, Args)]
pub(crate) struct Client {
    /// The socket to listen on
    #[arg(long, value_name = "PATH", required_unless_present = "vm")]
    pub(crate) socket: Option<PathBuf>,

    /// The process of the VM that starts this for itself, which is at the other end of standard input. For those who
    /// look at the list of processes
    #[arg(long, value_name = "PID", hide = true, conflicts_with = "socket")]
    vm: Option<u32>,

    /// What that VM calls the device
    #[arg(long, value_name = "NAME", hide = true, requires = "vm")]
    id: Option<String>,
}

/// A disk.
#[derive(Debug, Args)]
pub(crate) struct DiskArguments {
    /// The image: a raw file, or a block device
    #[arg(long, value_name = "PATH")]
    path: PathBuf,

    /// Let guests only read it
    #[arg(long)]
    readonly: bool,

    /// Pass by the host's page cache
    #[arg(long)]
    direct: bool,

    /// Leave the image to the disk whose state is going to come, and has it now
    #[arg(long)]
    incoming: bool,

    /// How many queues it has
    #[arg(long, value_name = "NUMBER")]
    num_queues: Option<u16>,

    /// How many descriptors each queue has
    #[arg(long, value_name = "NUMBER")]
    queue_size: Option<u16>,

    /// The serial number that guests see
    #[arg(long, value_name = "TEXT")]
    serial: Option<String>,
}

impl DiskArguments {
    pub(crate) fn options(&self) -> disk::Options {
        let usual = disk::Options::new(&self.path);
        disk::Options {
            readonly: self.readonly,
            direct: self.direct,
            incoming: self.incoming,
            num_queues: self.num_queues.unwrap_or(usual.num_queues),
            queue_size: self.queue_size.unwrap_or(usual.queue_size),
            serial: self.serial.clone().unwrap_or_default(),
            ..usual
        }
    }
}

/// A network card.
#[derive(Debug, Args)]
pub(crate) struct NetArguments {
    /// The tap; without one, one is made, which takes CAP_NET_ADMIN
    #[arg(long, value_name = "NAME")]
    tap: Option<String>,

    /// The MAC address of the guest's end; without one, it is left to chance
    #[arg(long)]
    mac: Option<MacAddress>,

    /// The MTU in bytes; without one, that of the tap
    #[arg(long, value_name = "BYTES")]
    mtu: Option<u16>,

    /// How many queues it has, those that receive and those that transmit together
    #[arg(long, value_name = "NUMBER")]
    num_queues: Option<u16>,

    /// How many descriptors each queue has
    #[arg(long, value_name = "NUMBER")]
    queue_size: Option<u16>,
}

impl NetArguments {
    pub(crate) fn options(&self) -> anyhow::Result<net::Options> {
        let usual = net::Options::default();
        let pairs = match self.num_queues {
            None => usual.num_queues,
            Some(count) if count.is_multiple_of(2) => count / 2,
            Some(count) => bail!(
                "num_queues counts queues that receive and as many that transmit, and is not {count}"
            ),
        };
        Ok(net::Options {
            tap: self.tap.clone(),
            mac: self.mac,
            mtu: self.mtu,
            num_queues: pairs,
            queue_size: self.queue_size.unwrap_or(usual.queue_size),
            ..usual
        })
    }
}
