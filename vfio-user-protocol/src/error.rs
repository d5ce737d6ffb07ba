//! What can be wrong with a message.

use thiserror::Error;

/// A message, or the agreement on a version, that breaks the protocol.
#[derive(Debug, Error)]
pub enum ProtocolError {
    /// The bytes end before the struct that they should hold, in bytes.
    #[error("{have} bytes where at least {need} are needed")]
    Short {
        /// Size of the struct.
        need: usize,
        /// Bytes present.
        have: usize,
    },
    /// The size field of a header is smaller than the header or larger than any message may be, in bytes.
    #[error("message size {0} is impossible")]
    MessageSize(u32),
    /// The type field of a header is neither command nor reply.
    #[error("message flags {0:#x} name neither a command nor a reply")]
    MessageType(u32),
    /// The command field of a header names no command.
    #[error("unknown command {0}")]
    UnknownCommand(u16),
    /// The peer's version cannot be spoken.
    #[error("version {major}.{minor} is not one that was proposed")]
    Version {
        /// Major version of the peer.
        major: u16,
        /// Minor version of the peer.
        minor: u16,
    },
    /// The version data is not a string that ends in NUL.
    #[error("the version data does not end in NUL")]
    Unterminated,
    /// The version data is not the JSON that it should be.
    #[error("the version data is not valid")]
    Json(#[from] serde_json::Error),
    /// A capability's value is one with which no connection can work.
    #[error("capability {name} cannot be {value}")]
    Capability {
        /// The JSON key.
        name: &'static str,
        /// The peer's value.
        value: u64,
    },
    /// A twin socket was agreed on, and its descriptor is missing.
    #[error("the twin socket's descriptor is missing")]
    TwinSocket,
    /// A capability chain leaves the message, loops or is too long; the offset is relative to the region information.
    #[error("bad capability chain at offset {0}")]
    CapabilityChain(u32),
    /// The list of mappable areas does not fit where it is.
    #[error("{0} mappable areas do not fit into the message")]
    SparseAreas(u32),
    /// The entries of a list of I/O descriptors have a size that nobody defined.
    #[error("{count} I/O descriptor entries in {bytes} bytes")]
    IoFdEntries {
        /// Entries announced.
        count: u32,
        /// Bytes that they should fill.
        bytes: usize,
    },
    /// A field that counts something contradicts the request or the message's length.
    #[error("count is {count} where {expected} was expected")]
    Count {
        /// The value received.
        count: u64,
        /// The value that would have been right.
        expected: u64,
    },
    /// A device state that the protocol does not define.
    #[error("unknown device state {0}")]
    DeviceState(u32),
}
