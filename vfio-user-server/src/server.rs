//! The server: a device, and one client after the other.

use std::fs;
use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;
use thiserror::Error;

use crate::core::Core;
use crate::description::{Description, DescriptionError};
use crate::device::{Device, Host};
use crate::doorbell::Doorbells;
use crate::eventfd;
use crate::function::{Function, Interrupts};
use crate::link::{Ended, Link};
use crate::memory::Memory;
use crate::migration::Machine;
use crate::session;

/// Serves a device to one client after the other.
///
/// The device keeps its state when a client goes: memory is unmapped, eventfds are forgotten, a log of written memory is
/// dropped, and the next client finds the device as it is.
#[derive(Debug)]
pub struct Server<D> {
    core: Core<D>,
    stopper: Stopper,
}

/// What the author of a device, or its user, decides about its server.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Whether memory is mapped only from files that are sealed against shrinking.
    ///
    /// A client that cuts off a file which this process has mapped kills it (`SIGBUS`) with the device's next access. The
    /// server checks the size of a file when it maps it; only a seal (`F_SEAL_SHRINK`, of a memfd) makes it stay. Without
    /// this option, a client is trusted not to do that, and not to send a file of a file system that does not answer.
    pub sealed_memory: bool,
    /// How long the client may take for an access to memory by a message.
    ///
    /// QEMU answers none while it waits for an answer itself, and after 5 seconds of that it never speaks to the device
    /// again. So this is less: a device that reaches such memory from the middle of an access fails, but stays.
    pub memory_deadline: Duration,
    /// How long the client may leave what it is sent unread before it is dropped.
    pub send_deadline: Duration,
    /// How long the device may keep a view of memory that the client wants back. After that the client is refused.
    pub unmap_deadline: Duration,
    /// Most mappings of memory at a time.
    pub max_mappings: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            sealed_memory: false,
            memory_deadline: Duration::from_secs(3),
            send_deadline: Duration::from_secs(10),
            unmap_deadline: Duration::from_secs(5),
            max_mappings: 1024,
        }
    }
}

/// Why there can be no server.
#[derive(Debug, Error)]
pub enum ServerError {
    /// The device cannot be.
    #[error("the device's description is not valid")]
    Description(#[from] DescriptionError),
    /// There is no descriptor for an eventfd or a socket.
    #[error("the system cannot give the server what it needs")]
    System(#[from] io::Error),
    /// The socket cannot be made.
    #[error("cannot listen on {path}")]
    Listen {
        /// Where it should be.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

impl<D: Device> Server<D> {
    /// Makes the device that `description` describes. `device` makes its inside, with the handles to what is outside.
    ///
    /// # Errors
    ///
    /// [`ServerError::Description`], and [`ServerError::System`] if there are no descriptors for its doorbells.
    pub fn new(
        description: Description,
        options: Options,
        device: impl FnOnce(&Host) -> D,
    ) -> Result<Self, ServerError> {
        let layout = description.lay_out()?;
        let function = Arc::new(Function::new(&layout));
        let host = Host {
            interrupts: Interrupts(Arc::clone(&function)),
            memory: Memory::new(Arc::clone(&function)),
            doorbells: Doorbells::new(&layout.doorbells)?,
        };
        let device = device(&host);
        Ok(Self {
            core: Core {
                layout,
                function,
                host,
                device,
                machine: Machine::new(),
                options,
            },
            stopper: Stopper::new()?,
        })
    }

    /// Serves the client at the other end of `stream` until it goes, and says why it went.
    ///
    /// # Errors
    ///
    /// If the stream cannot be used.
    pub fn serve(&mut self, stream: UnixStream) -> io::Result<Ended> {
        let link = Arc::new(Link::new(stream, self.core.options.send_deadline)?);
        self.stopper.watch(&link);
        Ok(session::serve(&mut self.core, &link))
    }

    /// Serves one client after the other until it is [stopped](Self::stopper). Those who connect while there is a client
    /// wait for their turn.
    ///
    /// # Errors
    ///
    /// If no more clients can be accepted.
    pub fn run(&mut self, listener: &Listener) -> io::Result<()> {
        loop {
            if !self.stopper.wait_for(&listener.socket)? {
                return Ok(());
            }
            let stream = match listener.socket.accept() {
                Ok((stream, _)) => stream,
                Err(error) if is_passing(&error) => continue,
                Err(error) => return Err(error),
            };
            match self.serve(stream) {
                Ok(Ended::Closed) => log::info!("the client has gone"),
                Ok(ended) => log::warn!("lost the client: {ended}"),
                Err(error) => log::warn!("a client cannot be served: {error}"),
            }
        }
    }

    /// What stops the server, from any thread.
    pub fn stopper(&self) -> Stopper {
        self.stopper.clone()
    }

    /// The device.
    pub fn device(&mut self) -> &mut D {
        &mut self.core.device
    }
}

/// Whether an error of accept(2) concerns but the client that was to be accepted.
fn is_passing(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::Interrupted | ErrorKind::WouldBlock | ErrorKind::ConnectionAborted
    )
}

/// Ends a server: the client that it has is dropped, and it takes no other.
#[derive(Clone, Debug)]
pub struct Stopper(Arc<Stop>);

#[derive(Debug)]
struct Stop {
    /// Readable for ever once the server is to stop.
    event: OwnedFd,
    /// The client, and whether the server is to stop.
    current: Mutex<(Weak<Link>, bool)>,
}

impl Stopper {
    fn new() -> io::Result<Self> {
        Ok(Self(Arc::new(Stop {
            event: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            current: Mutex::default(),
        })))
    }

    /// Stops the server. It does nothing to one that is stopped.
    pub fn stop(&self) {
        let mut current = self
            .0
            .current
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        current.1 = true;
        if let Some(link) = current.0.upgrade() {
            link.shutdown();
        }
        eventfd::signal(&self.0.event);
    }

    /// Drops this client too when the server is stopped.
    fn watch(&self, link: &Arc<Link>) {
        let mut current = self
            .0
            .current
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        current.0 = Arc::downgrade(link);
        if current.1 {
            link.shutdown();
        }
    }

    /// Waits for a client. Returns false if the server is to stop instead.
    fn wait_for(&self, listener: &UnixListener) -> io::Result<bool> {
        loop {
            let mut fds = [
                PollFd::new(&self.0.event, PollFlags::IN),
                PollFd::new(listener, PollFlags::IN),
            ];
            match poll(&mut fds, None) {
                Ok(_) => {}
                Err(Errno::INTR) => continue,
                Err(errno) => return Err(errno.into()),
            }
            let [stop, client] = fds.map(|fd| !fd.revents().is_empty());
            if stop || client {
                return Ok(!stop);
            }
        }
    }
}

/// A socket that clients connect to. It goes from the file system when this is dropped.
#[derive(Debug)]
pub struct Listener {
    socket: UnixListener,
    path: PathBuf,
    /// Device and inode of the socket's file.
    file: (u64, u64),
}

impl Listener {
    /// Listens at `path`. A socket that is left over there from a server that is gone is replaced.
    ///
    /// # Errors
    ///
    /// [`ServerError::Listen`] if something else is there, or a server that lives.
    pub fn bind(path: &Path) -> Result<Self, ServerError> {
        let listen = || {
            remove_stale(path)?;
            let socket = UnixListener::bind(path)?;
            socket.set_nonblocking(true)?;
            let metadata = fs::symlink_metadata(path)?;
            Ok((socket, (metadata.dev(), metadata.ino())))
        };
        match listen() {
            Ok((socket, file)) => Ok(Self {
                socket,
                path: path.to_owned(),
                file,
            }),
            Err(source) => Err(ServerError::Listen {
                path: path.to_owned(),
                source,
            }),
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // Somebody else's socket may be there by now.
        let ours = fs::symlink_metadata(&self.path)
            .is_ok_and(|metadata| (metadata.dev(), metadata.ino()) == self.file);
        if ours && let Err(error) = fs::remove_file(&self.path) {
            log::warn!("cannot remove {}: {error}", self.path.display());
        }
    }
}

/// Removes a socket that nobody listens on.
fn remove_stale(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err(ErrorKind::AlreadyExists.into());
        }
        Ok(_) => {}
    }
    match UnixStream::connect(path) {
        Ok(_) => Err(ErrorKind::AddrInUse.into()),
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => fs::remove_file(path),
        Err(error) => Err(error),
    }
}
