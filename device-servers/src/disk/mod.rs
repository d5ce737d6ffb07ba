//! A disk: virtio-blk (virtio 1.2, section 5.2) on a raw file or a block device.
//!
//! Each queue has a thread of its own with an io_uring, which reads into guest memory and writes from it directly. What
//! is not mapped, or not aligned as `direct` wants it, goes through a buffer.
//! When all requests are done, it looks for more for a moment before it sleeps, if that has saved notifications lately.
//!
//! # When data is safe
//!
//! A write is over when the kernel has it, so that the end of the server, by whatever signal, loses nothing that the guest
//! was told is written. A flush is over when fdatasync(2) would be. If the driver does not flush
//! (`VIRTIO_BLK_F_FLUSH` not accepted), or has switched the cache off (`writeback` of the configuration), each write is
//! over when it survives a loss of power.
//!
//! # Who may have the image
//!
//! The image is locked (fcntl(2), open file description locks): exclusively, or shared if the disk is read-only. A second
//! user is refused, with an error that names the image. The lock of a server that is killed lasts until the kernel has
//! finished what that had begun, which the next one waits for, for a second.
//!
//! # Migration
//!
//! Both hosts have to have the same storage. What is under way when the disk is stopped is finished, and the image
//! flushed; what the driver has made available by then, and the disk not taken, moves along in the queues. The lock
//! follows the disk: it is
//!
//! * dropped when all of the state has been read, in STOP_COPY;
//! * taken when the disk starts to run, there or, if the migration was cancelled, here again. If somebody else has it by
//!   then, the disk does not run, and says so (`EBUSY`): it must be the other end. Nothing is lost, and it can be tried
//!   again.
//!
//! A disk that is [incoming](Options::incoming) opens the image without the lock and without reading it. When it takes the
//! lock, what is cached of the image is dropped first. That is not enough for storage of which each host has a cache of
//! its own that it trusts: a writable disk with `direct=off` on a block device or a network file system does not migrate,
//! and [says why](OpenDisk::migration_obstacle).
//!
//! # In a sandbox
//!
//! [`open`] does all that needs a path. Then the process can enter its [sandbox](crate::sandbox), and make the
//! [server](OpenDisk::server), with its threads, in there. Those call `io_uring_setup`, `io_uring_register`, and from then
//! on `io_uring_enter`, besides what every server calls; the thread that serves calls `fdatasync`, `fadvise64` and `fcntl`
//! (`F_OFD_SETLK`), and the threads of the queues `pwritev2`. The rings are restricted to reading, writing, syncing,
//! allocating and waiting. The kernel's own threads for what io_uring cannot do at once count as the process's
//! (`RLIMIT_NPROC`, `pids.max`).

mod at_once;
mod config;
mod device;
mod error;
mod image;
mod job;
mod lock;
mod polling;
mod request;
mod ring;
mod service;

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use vfio_user_server::{Listener, Server};

use self::config::Config;
use self::image::Image;
use self::job::SERIAL;
use self::service::Shared;
use crate::virtio::{self, Transport};

pub use self::device::Disk;
pub use self::error::DiskError;

/// Most queues of a disk.
pub const MAX_QUEUES: u16 = 64;
/// Fewest entries of a queue: a header, a status, and some data.
pub const MIN_QUEUE_SIZE: u16 = 4;
/// Most entries of a queue: as many pieces as the kernel takes at once (`UIO_MAXIOV`).
pub const MAX_QUEUE_SIZE: u16 = 1024;

/// What there is to decide about a disk.
#[derive(Clone, Debug)]
pub struct Options {
    /// The image: a raw file, or a block device.
    pub path: PathBuf,
    /// Whether the guest may only read it. Then several disks may share an image.
    pub readonly: bool,
    /// Whether the host caches nothing of it (`O_DIRECT`).
    pub direct: bool,
    /// Number of queues, from 1 to [`MAX_QUEUES`]. Each has a thread.
    pub num_queues: u16,
    /// Entries of each queue: a power of two from [`MIN_QUEUE_SIZE`] to [`MAX_QUEUE_SIZE`].
    pub queue_size: u16,
    /// What the guest sees as the disk's serial number: up to 20 printable ASCII characters.
    pub serial: String,
    /// Whether the disk waits for one that migrates here. The image is then not locked before that runs here.
    pub incoming: bool,
    /// What there is to decide about the server.
    pub server: vfio_user_server::Options,
}

impl Options {
    /// The usual disk, of the image at `path`.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            readonly: false,
            direct: false,
            num_queues: 1,
            queue_size: 256,
            serial: String::new(),
            incoming: false,
            server: vfio_user_server::Options::default(),
        }
    }
}

/// Serves a disk at `socket` to one client after the other, for ever. Calls `ready` when clients may connect.
///
/// # Errors
///
/// [`DiskError`] if there can be no such disk or socket, or no more clients can be accepted.
pub fn serve(options: &Options, socket: &Path, ready: impl FnOnce()) -> Result<(), DiskError> {
    let mut server = server(options)?;
    let listener = Listener::bind(socket)?;
    ready();
    server.run(&listener).map_err(DiskError::from)
}

/// Makes a disk and its server, for those who have a connected socket.
///
/// # Errors
///
/// [`DiskError`] if there can be no such disk.
pub fn server(options: &Options) -> Result<Server<Transport<Disk>>, DiskError> {
    open(options)?.server()
}

/// Opens the image, and locks it unless the disk is [incoming](Options::incoming). This is all that needs access to the
/// file system, and it makes no thread.
///
/// # Errors
///
/// [`DiskError`] if there can be no such disk.
pub fn open(options: &Options) -> Result<OpenDisk, DiskError> {
    let Options {
        num_queues,
        queue_size,
        ..
    } = *options;
    if !(1..=MAX_QUEUES).contains(&num_queues) {
        return Err(DiskError::Queues(num_queues));
    }
    if !queue_size.is_power_of_two() || !(MIN_QUEUE_SIZE..=MAX_QUEUE_SIZE).contains(&queue_size) {
        return Err(DiskError::QueueSize(queue_size));
    }
    let serial = serial(&options.serial)?;
    let image = Image::open(&options.path, options.readonly, options.direct)?;
    if !options.incoming {
        image.lock_patiently()?;
    }
    let config = Config {
        size: image.size,
        geometry: image.geometry,
        readonly: options.readonly,
        queues: num_queues,
        queue_size,
    };
    let shared = Shared {
        image,
        serial,
        writeback: AtomicBool::new(true),
    };
    Ok(OpenDisk {
        shared,
        config,
        server: options.server,
    })
}

/// A disk whose image is open.
#[derive(Debug)]
pub struct OpenDisk {
    shared: Shared,
    config: Config,
    server: vfio_user_server::Options,
}

impl OpenDisk {
    /// Makes the threads of the queues, their io_urings, and the server.
    ///
    /// # Errors
    ///
    /// [`DiskError::Ring`], [`DiskError::System`] and [`DiskError::Server`].
    pub fn server(self) -> Result<Server<Transport<Disk>>, DiskError> {
        let disk = Disk::new(self.shared, self.config)?;
        Ok(virtio::server(disk, self.server)?)
    }

    /// Why the disk cannot migrate, and what to do about it, if it cannot.
    pub fn migration_obstacle(&self) -> Option<String> {
        self.shared.image.obstacle()
    }
}

/// A serial number as the guest reads it, filled up with zeroes.
fn serial(text: &str) -> Result<[u8; SERIAL], DiskError> {
    let mut serial = [0; SERIAL];
    let is_printable = text.bytes().all(|byte| matches!(byte, b' '..=b'~'));
    let place = serial.get_mut(..text.len()).filter(|_| is_printable);
    place
        .ok_or_else(|| DiskError::Serial(text.to_owned()))?
        .copy_from_slice(text.as_bytes());
    Ok(serial)
}
