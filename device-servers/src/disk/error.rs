//! Why there can be no disk.

use std::io;
use std::path::PathBuf;

use thiserror::Error;
use vfio_user_server::ServerError;

use super::{MAX_QUEUE_SIZE, MAX_QUEUES, MIN_QUEUE_SIZE};

/// Why there can be no disk, or why it cannot be served.
#[derive(Debug, Error)]
pub enum DiskError {
    /// The image cannot be opened.
    #[error("cannot open {path}")]
    Open {
        /// The image.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The image cannot be opened for `direct=on`.
    #[error(
        "cannot open {path} with direct=on, which its file system does not support; use direct=off"
    )]
    NotDirect {
        /// The image.
        path: PathBuf,
    },
    /// What is at the path is something else.
    #[error("{path} is neither a file nor a block device")]
    NotAnImage {
        /// What is no image.
        path: PathBuf,
    },
    /// The image does not consist of sectors.
    #[error(
        "{path} has {size} bytes, which is no multiple of {block}; `truncate -s %{block} {path}` fills its last block up"
    )]
    Size {
        /// The image.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
        /// What it has to be a multiple of, in bytes.
        block: u32,
    },
    /// Somebody else has locked the image.
    #[error(
        "{path} is in use; does another VM have it? Several can share it if all have it with readonly=on"
    )]
    InUse {
        /// The image.
        path: PathBuf,
    },
    /// The image cannot be locked.
    #[error("cannot lock {path}; on a network file system, is its lock service running?")]
    Lock {
        /// The image.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// There cannot be as many queues.
    #[error("a disk has 1 to {MAX_QUEUES} queues, and not {0}")]
    Queues(u16),
    /// The queues cannot be as long.
    #[error("queue_size is a power of two from {MIN_QUEUE_SIZE} to {MAX_QUEUE_SIZE}, and not {0}")]
    QueueSize(u16),
    /// The serial number is too long, or has characters that it cannot have.
    #[error("serial has up to 20 printable ASCII characters, unlike {0:?}")]
    Serial(String),
    /// There is no io_uring.
    #[error(
        "cannot set up io_uring; it has to be allowed (sysctl kernel.io_uring_disabled=0), and the kernel to be 5.19 or later"
    )]
    Ring(#[source] io::Error),
    /// There is no thread or descriptor for a queue.
    #[error("the system cannot give the disk what it needs")]
    System(#[from] io::Error),
    /// It cannot be served.
    #[error(transparent)]
    Server(#[from] ServerError),
}
