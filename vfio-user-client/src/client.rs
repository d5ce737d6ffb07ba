//! The client: how it comes to be, and what concerns the whole connection.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use vfio_user_protocol::{
    Capabilities, Command, Header, Limits, ProtocolError, TwinSocket, Version, take,
};
use zerocopy::FromBytes;

use crate::calls::Expected;
use crate::connection::{Connection, MAX_OUTGOING, Reply, Request, State};
use crate::counters::Counters;
use crate::dma::{DmaService, GuestDma, MAX_DATA};
use crate::error::{ConnError, Loss};
use crate::options::{Deadlines, Options};
use crate::setup::Setup;
use crate::socket::{MAX_FDS, Socket};
use crate::twin::Twin;

/// The VMM's end of a connection to the server of one device.
///
/// All calls take `&self` and may come from any number of threads at once. Each returns by its deadline, and at once
/// when the server is gone.
///
/// # The event loop
///
/// While a thread waits in a call, it reads what comes. What comes at other times, the end of the connection above all,
/// has to be waited for by somebody: the client [is a descriptor](AsFd) that becomes readable when [`serve`](Self::serve)
/// should be called.
///
/// # The device's memory accesses
///
/// The client offers a twin socket, over which the server's own commands are served by a thread of their own. A server
/// without one sends them over the same socket as its replies, and from the first of them on it is sent only one command
/// at a time and no posted write, since libvfio-user would take either for the answer that it waits for. What remains is
/// a race that this cannot close: if such a server accesses memory without a command that made it do so, a command may
/// be on its way at that moment.
#[derive(Debug)]
pub struct Client {
    pub(crate) connection: Arc<Connection>,
    /// The twin socket, if there is one. Its thread ends when this goes.
    pub(crate) twin: Option<Twin>,
    pub(crate) limits: Limits,
    pub(crate) deadlines: Deadlines,
    /// What the server keeps. Never locked during a call.
    pub(crate) setup: Mutex<Setup>,
}

impl Client {
    /// Connects to the server that listens at `path`, and agrees with it on a version.
    ///
    /// # Errors
    ///
    /// [`ConnError::Connect`], and those of [`handshake`](Self::handshake).
    pub fn connect(
        path: &Path,
        dma: Arc<dyn GuestDma>,
        options: &Options,
    ) -> Result<Self, ConnError> {
        let stream = Socket::connect(path, options.deadlines.handshake).map_err(|errno| {
            ConnError::Connect {
                path: path.to_owned(),
                source: errno.into(),
            }
        })?;
        Self::handshake(stream, dma, options)
    }

    /// Agrees on a version with the server at the other end of `stream`, to which nothing has been sent.
    ///
    /// # Errors
    ///
    /// [`ConnError::Version`] if its version or limits cannot be worked with, [`ConnError::System`] if there is no
    /// descriptor, memory or thread for the connection, and those that every call has: [`ConnError::TimedOut`],
    /// [`ConnError::Refused`], [`ConnError::Lost`], [`ConnError::TooLong`], [`ConnError::Descriptors`].
    pub fn handshake(
        stream: UnixStream,
        dma: Arc<dyn GuestDma>,
        options: &Options,
    ) -> Result<Self, ConnError> {
        let service = DmaService::new(dma);
        let connection = Connection::new(stream.into(), service, options.max_outstanding)
            .map_err(ConnError::System)?;
        let connection = Arc::new(connection);
        let (limits, twin) = negotiate(&connection, options)?;
        let twin = twin.map(Twin::new).transpose();
        let twin = twin.map_err(ConnError::System)?;
        if let Some(twin) = &twin {
            twin.start(&connection).map_err(ConnError::System)?;
        }
        connection.ready(twin.as_ref());
        Ok(Self {
            connection,
            twin,
            limits,
            deadlines: options.deadlines.clone(),
            setup: Mutex::default(),
        })
    }

    /// What both ends can do. Every call honours it.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Serves what came while no thread was in a call, and returns what the connection is ready for.
    ///
    /// To be called by the event loop when the client's descriptor is readable. It does not block. The loss of the
    /// connection is reported here at least once, whoever noticed it; after that the descriptor stays quiet.
    pub fn serve(&self) -> State {
        self.connection.serve()
    }

    /// What the connection is ready for.
    pub fn state(&self) -> State {
        self.connection.state()
    }

    /// What has happened so far. This takes a lock for a moment and nothing else.
    pub fn counters(&self) -> Counters {
        self.connection.counters()
    }

    /// Takes no more calls, and waits, for `limit` at most, until those on their way have ended.
    ///
    /// # Errors
    ///
    /// [`ConnError::Draining`] if they have not, [`ConnError::Lost`] if the connection is lost.
    pub fn drain(&self, limit: Duration) -> Result<(), ConnError> {
        self.connection.drain(limit)
    }

    /// Ends the connection. Whoever waits in a call, and whoever calls later, gets [`ConnError::Lost`]. One that is handed
    /// over ends for this process alone.
    pub fn close(&self) {
        self.connection.close(Loss::Dropped);
    }

    /// What the server has been told to keep, as far as it has said that it does. It is still known when the connection
    /// is lost.
    pub fn setup(&self) -> Setup {
        self.lock_setup().clone()
    }

    pub(crate) fn lock_setup(&self) -> MutexGuard<'_, Setup> {
        self.setup.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends a command and waits for the reply.
    pub(crate) fn call(
        &self,
        request: &Request<'_>,
        limit: Duration,
    ) -> Result<Reply<'_>, ConnError> {
        if Header::SIZE + request.head.len() + request.data.len() > MAX_OUTGOING {
            return Err(ConnError::Limit("the message would be too long"));
        }
        if request.fds.len() > self.limits.max_msg_fds {
            return Err(ConnError::Limit("it takes no more descriptors"));
        }
        self.connection.call(request, limit)
    }

    /// Sends a command, and returns what `read` makes of the struct that its reply begins with, and of what follows.
    pub(crate) fn query<T: FromBytes, R>(
        &self,
        request: &Request<'_>,
        limit: Duration,
        read: impl FnOnce(T, &[u8]) -> Result<R, ProtocolError>,
    ) -> Result<R, ConnError> {
        let reply = self.call(request, limit)?;
        take(&reply.payload)
            .and_then(|(head, rest)| read(head, rest))
            .map_err(|source| self.bad_answer(request.command, source))
    }

    /// The error for an answer that breaks the protocol.
    pub(crate) fn bad_answer(&self, command: Command, source: ProtocolError) -> ConnError {
        self.connection.count_bad_answer();
        ConnError::Answer { command, source }
    }
}

impl AsFd for Client {
    /// A descriptor to be watched for input, level-triggered: see [`Client::serve`]. It must not be read.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.connection.as_fd()
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.close();
    }
}

/// Proposes a version, and returns the limits agreed on and the twin socket, if there is one.
fn negotiate(
    connection: &Connection,
    options: &Options,
) -> Result<(Limits, Option<OwnedFd>), ConnError> {
    let ours = Capabilities {
        max_msg_fds: Some(MAX_FDS as u64),
        max_data_xfer_size: Some(MAX_DATA as u64),
        max_dma_maps: Some(MAX_DMA_MAPS),
        pgsizes: Some(PAGE_SIZES),
        write_multiple: Some(true),
        twin_socket: options.twin_socket.then_some(TwinSocket {
            supported: true,
            fd_index: None,
        }),
    };
    let proposal = Version::CURRENT.encode(&ours).map_err(ConnError::Version)?;
    let request = Request {
        command: Command::Version,
        head: &proposal,
        data: &[],
        fds: &[],
        expected: Expected {
            payload: MAX_VERSION,
            fds: MAX_FDS,
        },
    };
    let mut reply = connection.call(&request, options.deadlines.handshake)?;
    let (version, theirs) = Version::decode(&reply.payload).map_err(ConnError::Version)?;
    Version::CURRENT
        .check_answer(version)
        .map_err(ConnError::Version)?;
    let limits = Limits::agree(version, &ours, &theirs).map_err(ConnError::Version)?;
    let Some(index) = limits.twin_socket else {
        return Ok((limits, None));
    };
    if index >= reply.fds.len() {
        return Err(ConnError::Version(ProtocolError::TwinSocket));
    }
    Ok((limits, Some(reply.fds.swap_remove(index))))
}

/// The default of the specification, and more than any VMM maps.
const MAX_DMA_MAPS: u64 = 65535;

/// The page sizes of x86-64, in bytes: 4 KiB, 2 MiB and 1 GiB.
const PAGE_SIZES: u64 = 0x4020_1000;

/// Most bytes of payload that the answer to the proposal may have.
const MAX_VERSION: usize = 4096;
