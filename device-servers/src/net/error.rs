//! Why there can be no network card.

use std::io;

use thiserror::Error;
use vfio_user_server::ServerError;

use super::{MAX_PAIRS, MAX_QUEUE_SIZE, MIN_MTU, MIN_QUEUE_SIZE};

/// Why there can be no network card, or why it cannot be served.
#[derive(Debug, Error)]
pub enum NetError {
    /// No interface can have this name.
    #[error(
        "{0:?} cannot be the name of a tap: it has 1 to 15 characters, no space, and none of '/', ':' and '%'"
    )]
    Name(String),
    /// There cannot be as many pairs of queues.
    #[error("a network card has 1 to {MAX_PAIRS} pairs of queues, and not {0}")]
    Queues(u16),
    /// The queues cannot be as long.
    #[error("queue_size is a power of two from {MIN_QUEUE_SIZE} to {MAX_QUEUE_SIZE}, and not {0}")]
    QueueSize(u16),
    /// Packets cannot be as short.
    #[error("mtu is a number of bytes from {MIN_MTU} on, and not {0}")]
    Mtu(u16),
    /// There are no taps at all.
    #[error(
        "cannot open /dev/net/tun; is the module there (`modprobe tun`), and may this user read and write the file?"
    )]
    NoTun(#[source] io::Error),
    /// There is no such tap, and none can be made.
    #[error(
        "there is no tap {name}, and making one takes CAP_NET_ADMIN; somebody who has it can make one that stays, for \
         this user: `ip tuntap add dev {name} mode tap user USER multi_queue vnet_hdr`"
    )]
    CannotCreate {
        /// The tap's name.
        name: String,
    },
    /// The tap is somebody else's.
    #[error(
        "tap {name} belongs to another user; make it this one's (`ip tuntap add dev {name} mode tap user USER \
         multi_queue vnet_hdr`, after deleting it), or run with CAP_NET_ADMIN"
    )]
    NotOurs {
        /// The tap's name.
        name: String,
    },
    /// Somebody else has the tap open.
    #[error("tap {name} is in use; does another VM have it? Each needs a tap of its own")]
    InUse {
        /// The tap's name.
        name: String,
    },
    /// What has that name is no tap, or one for a single queue.
    #[error(
        "{name} is no tap, or one of a single queue; with num_queues above 1 it has to be made with multi_queue: `ip \
         tuntap add dev {name} mode tap user USER multi_queue vnet_hdr`"
    )]
    NotSuitable {
        /// The interface's name.
        name: String,
    },
    /// Something else is wrong with the tap.
    #[error("cannot {step} tap {name}")]
    Tap {
        /// What was to be done.
        step: &'static str,
        /// The tap's name.
        name: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The tap that was given open has no headers for offloads.
    #[error("tap {name}, which was given open, has no IFF_VNET_HDR; open it with that flag")]
    NoHeaders {
        /// The tap's name.
        name: String,
    },
    /// There is no thread or descriptor for a queue.
    #[error("the system cannot give the network card what it needs")]
    System(#[from] io::Error),
    /// It cannot be served.
    #[error(transparent)]
    Server(#[from] ServerError),
}
