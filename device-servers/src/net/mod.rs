//! A network card: virtio-net on a tap.
//!
//! # What it offers
//!
//! Checksums and segmentation of TCP and UDP are left to whoever is last to see a packet, in both directions: headers pass
//! between the driver and the tap as they are (`IFF_VNET_HDR`). With a tap of a kernel before Linux 6.2, which does not know
//! segmentation of UDP, the card splits what the driver does not, so that it can move between all of them. There are merged
//! receive buffers, indirect descriptors, event index, and several pairs of queues. The driver can set the MAC address, how
//! many pairs it uses, and its offloads. It gets everything that comes from the tap, and is not offered to filter.
//!
//! The link is up while the tap is: `ip link set NAME down` and `up` are what pulls the cable out and plugs it in.
//!
//! # Threads
//!
//! Each pair of queues has a thread, which waits for the doorbells and for its queue of the tap, and which reads and writes
//! packets right where the driver has them. While the driver has no room, its packets stay in the tap. One more thread
//! serves the control queue, watches the link, and announces the card.
//!
//! # Migration
//!
//! The state is the MAC address, the pairs in use, the offloads, and whether the driver has still to announce itself. The
//! other card must have as many queues, the same MTU, and at least the features that the driver uses; its own MAC address
//! is replaced. Where it runs next, it has the driver announce itself (`VIRTIO_NET_F_GUEST_ANNOUNCE`), and announces it
//! with a few frames of reverse ARP, over about a second, for drivers that don't. No packet of the driver's is
//! lost or sent twice. Of those for it, what is in the tap when the card stops stays there, and one of each pair that the
//! driver had no room for is dropped, as with a cable that is pulled out.
//!
//! # Sandbox
//!
//! [`open`] opens all that is there to be opened: the tap, and a netlink socket. What runs later, in a sandbox, makes
//! eventfds and threads when it begins ([`OpenNet::server`]), and after that these system calls, besides those of any
//! vfio-user server: `readv`, `writev`, `read`, `write`, `poll` or `ppoll`; `sendto` and `recvfrom` on the netlink socket;
//! and `ioctl` with `TUNSETOFFLOAD` (0x400454d0) and `TUNSETQUEUE` (0x400454d9), for which no capability is needed. It
//! opens no file.

mod announce;
mod config;
mod control;
mod device;
mod error;
mod ioctl;
mod link;
mod mac;
mod packet;
mod pair;
mod receive;
mod split;
mod state;
mod tap;
mod transmit;

use std::os::fd::OwnedFd;
use std::path::Path;

use vfio_user_server::{Listener, Server};

use self::config::Config;
use self::tap::Network;
use crate::virtio::{self, Transport};

pub use self::device::Net;
pub use self::error::NetError;
pub use self::mac::{MacAddress, MacError};

/// Most pairs of queues: with the control queue, they are not more than a device can have.
pub const MAX_PAIRS: u16 = (virtio::MAX_QUEUES - 1) / 2;
/// Fewest entries of a queue: drivers put a packet into several pieces, each an entry.
pub const MIN_QUEUE_SIZE: u16 = 32;
/// Most entries of a queue.
pub const MAX_QUEUE_SIZE: u16 = 1024;
/// Least MTU in bytes (virtio 1.2, 5.1.4.1).
pub const MIN_MTU: u16 = 68;

/// What there is to decide about a network card.
#[derive(Clone, Debug)]
pub struct Options {
    /// The tap's name. If there is none of this name, it is made, and goes with the server; that takes `CAP_NET_ADMIN`.
    /// Without a name, one is made with a name of the kernel's choice.
    pub tap: Option<String>,
    /// The MAC address of the guest's end. Without one, it is chosen by chance, another one each time.
    pub mac: Option<MacAddress>,
    /// The MTU that the guest is told, in bytes, from [`MIN_MTU`] on. A tap that is made gets it too. Without one, it is
    /// that of the tap.
    pub mtu: Option<u16>,
    /// Number of pairs of queues, from 1 to [`MAX_PAIRS`]. Each has a thread. With more than one, a tap that is there
    /// already has to be made with `multi_queue`.
    pub num_queues: u16,
    /// Entries of each queue: a power of two from [`MIN_QUEUE_SIZE`] to [`MAX_QUEUE_SIZE`].
    pub queue_size: u16,
    /// What there is to decide about the server.
    pub server: vfio_user_server::Options,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            tap: None,
            mac: None,
            mtu: None,
            num_queues: 1,
            queue_size: 256,
            server: vfio_user_server::Options::default(),
        }
    }
}

/// Serves a network card at `socket` to one client after the other, for ever. Calls `ready` when clients may connect.
///
/// # Errors
///
/// [`NetError`] if there can be no such card or socket, or no more clients can be accepted.
pub fn serve(options: &Options, socket: &Path, ready: impl FnOnce()) -> Result<(), NetError> {
    let mut server = server(options)?;
    let listener = Listener::bind(socket).map_err(NetError::from)?;
    ready();
    server.run(&listener).map_err(NetError::from)
}

/// Makes a network card and its server, for those who have a connected socket.
///
/// # Errors
///
/// [`NetError`] if there can be no such card.
pub fn server(options: &Options) -> Result<Server<Transport<Net>>, NetError> {
    open(options)?.server()
}

/// Opens the tap, or makes it. This is all that needs privileges or access to the file system, and it makes no thread.
///
/// # Errors
///
/// [`NetError`] if there can be no such card.
pub fn open(options: &Options) -> Result<OpenNet, NetError> {
    check(options)?;
    let network = Network::open(options.tap.as_deref(), options.num_queues, options.mtu)?;
    OpenNet::new(options, network)
}

/// As [`open`], with a tap that somebody else has opened: a descriptor for each pair of queues
/// ([`num_queues`](Options::num_queues) and [`tap`](Options::tap) are not used).
///
/// What is no tap will do too, if it keeps packets apart, as a pair of `SOCK_SEQPACKET` sockets does. Before each packet
/// is a `struct virtio_net_hdr_v1` of 12 bytes (virtio 1.2, 5.1.6).
///
/// # Errors
///
/// [`NetError`] if there can be no such card.
pub fn open_with(options: &Options, tap: Vec<OwnedFd>) -> Result<OpenNet, NetError> {
    let options = Options {
        num_queues: tap.len().try_into().unwrap_or(u16::MAX),
        ..options.clone()
    };
    check(&options)?;
    OpenNet::new(&options, Network::of(tap)?)
}

/// A network card whose tap is open.
#[derive(Debug)]
pub struct OpenNet {
    network: Network,
    config: Config,
    mac: MacAddress,
    server: vfio_user_server::Options,
}

impl OpenNet {
    fn new(options: &Options, network: Network) -> Result<Self, NetError> {
        let config = Config {
            pairs: options.num_queues,
            queue_size: options.queue_size,
            mtu: options.mtu.or(network.mtu),
            has_uso: network.has_uso,
        };
        Ok(Self {
            mac: options.mac.map_or_else(MacAddress::random, Ok)?,
            network,
            config,
            server: options.server,
        })
    }

    /// Makes the threads of the card, and the server.
    ///
    /// # Errors
    ///
    /// [`NetError::System`] and [`NetError::Server`].
    pub fn server(self) -> Result<Server<Transport<Net>>, NetError> {
        let Network { taps, link, .. } = self.network;
        let net = Net::new(taps, link, self.config, self.mac)?;
        Ok(virtio::server(net, self.server)?)
    }
}

fn check(options: &Options) -> Result<(), NetError> {
    let Options {
        mtu,
        num_queues,
        queue_size,
        ..
    } = *options;
    if !(1..=MAX_PAIRS).contains(&num_queues) {
        return Err(NetError::Queues(num_queues));
    }
    if !queue_size.is_power_of_two() || !(MIN_QUEUE_SIZE..=MAX_QUEUE_SIZE).contains(&queue_size) {
        return Err(NetError::QueueSize(queue_size));
    }
    match mtu {
        Some(mtu) if mtu < MIN_MTU => Err(NetError::Mtu(mtu)),
        _ => Ok(()),
    }
}
