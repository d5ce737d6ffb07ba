//! What a call can end in.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use thiserror::Error;
use vfio_user_protocol::{Command, ProtocolError};

/// Why a call on a connection failed.
#[derive(Debug, Error)]
pub enum ConnError {
    /// Nobody listens on the socket, or not in time.
    #[error("cannot connect to {path}")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// This side's kernel refused something that the connection needs, such as one more descriptor.
    #[error("the system cannot give the connection what it needs")]
    System(#[source] io::Error),
    /// The server's version or capabilities cannot be worked with.
    #[error("cannot agree on a version with the server")]
    Version(#[source] ProtocolError),
    /// The connection is gone, and nothing will bring it back.
    #[error("the connection is lost")]
    Lost(#[source] Loss),
    /// The connection takes no more calls, because [`Client::drain`](crate::Client::drain) was called. From `drain`
    /// itself: not all calls have ended in time.
    #[error("the connection is being closed")]
    Draining,
    /// The connection takes no calls, because it is, or may be, another process'. See
    /// [`Client::hand_over`](crate::Client::hand_over).
    #[error("the connection is handed over to another process")]
    Away,
    /// Something has not ended in time, so that the connection cannot be handed over.
    #[error("the connection does not come to rest: {0}")]
    Restless(&'static str),
    /// What was handed over makes no sense.
    #[error("this is no connection that could be taken over: {0}")]
    Handed(&'static str),
    /// The server has not answered in time. It may still do so, or be hung.
    #[error("{command:?} was not answered within {limit:?}")]
    TimedOut {
        /// What was asked.
        command: Command,
        /// How long the call was allowed to take.
        limit: Duration,
    },
    /// The server said no.
    #[error("{command:?} was refused with errno {errno}")]
    Refused {
        /// What was asked.
        command: Command,
        /// The errno of the server's operating system; 0 if it did not say.
        errno: u32,
    },
    /// The server's answer breaks the protocol. The connection goes on.
    #[error("the answer to {command:?} is not valid")]
    Answer {
        /// What was asked.
        command: Command,
        /// What is wrong with the answer.
        #[source]
        source: ProtocolError,
    },
    /// The answer has more payload than the call can have. The connection goes on.
    #[error("the answer to {command:?} is too long")]
    TooLong {
        /// What was asked.
        command: Command,
    },
    /// The answer has more or fewer descriptors than the call can have, or some were lost on the way because this
    /// process has too many open. The connection goes on.
    #[error("the descriptors with the answer to {command:?} are not those that it needs")]
    Descriptors {
        /// What was asked.
        command: Command,
    },
    /// A mappable area or a doorbell is not inside its region, or two areas overlap.
    #[error("region {region} has a part that is not inside it or overlaps another")]
    Layout {
        /// The region.
        region: u32,
    },
    /// The caller asked for what the server's limits or the protocol rule out.
    #[error("the server cannot be asked for this: {0}")]
    Limit(&'static str),
}

/// Why a connection was lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum Loss {
    /// The server closed it, or died.
    #[error("the server closed the connection")]
    Closed,
    /// The socket failed with an errno.
    #[error("the socket failed with errno {0}")]
    Socket(i32),
    /// The server sent what is no message, so where the next one begins cannot be known.
    #[error("the server sent what is not a message")]
    Garbage,
    /// A deadline came while a message was half sent, so that nothing can follow it.
    #[error("the server stopped reading in the middle of a message")]
    HalfSent,
    /// The connection was closed on this side.
    #[error("the connection was closed")]
    Dropped,
}
