//! Connections between the two ends, over whatever they go.

mod descriptors;

use std::io::{self, IoSlice, Read, Write};
use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::net::sockopt;
use vm_memory::bitmap::BitmapSlice;
use vm_memory::{VolatileMemoryError, VolatileSlice, WriteVolatile};

use super::gather::into_io;
use super::tls::{self, TlsError};
use crate::control::{Cancel, MigrationUrl};
use crate::private_socket::{PrivateSocket, SocketError};

/// How long a peer may be silent, or take nothing, before its connection counts as lost.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);
/// How often it is looked whether the operation has been cancelled.
const TICK: Duration = Duration::from_millis(100);
/// How long a connection may take to come about.
const CONNECT: Duration = Duration::from_secs(10);

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectError {
    /// Nobody listens there.
    #[error("cannot connect to {url}; is the destination waiting there?")]
    Connect {
        /// Where.
        url: MigrationUrl,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Nobody can listen there.
    #[error("cannot wait at {url}")]
    Listen {
        /// Where.
        url: MigrationUrl,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// It cannot be waited for there.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// Guest memory would go over a network for everyone to read.
    #[error(
        "{0} is not on this host, and what goes there could be read by others: give tls_dir, or insecure=on if the \
         network is trusted"
    )]
    Insecure(MigrationUrl),
    /// TLS is for networks.
    #[error("{0} is on this host: tls_dir is of no use there")]
    NeedlessTls(MigrationUrl),
    /// There is no TLS.
    #[error(transparent)]
    Tls(#[from] TlsError),
}

/// A connection. It is lost when the peer is silent for too long, and given up when the operation is cancelled.
#[derive(Debug)]
pub(super) struct Stream {
    socket: Socket,
    /// How long the peer may be silent; none if for ever: its death is noticed all the same.
    patience: Option<Duration>,
    cancel: Option<Arc<Cancel>>,
    /// Is set when another connection of the same migration is lost.
    broken: Option<Arc<AtomicBool>>,
}

#[derive(Debug)]
enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
    TlsClient(Box<tls::ClientStream>),
    TlsServer(Box<tls::ServerStream>),
}

/// Where to connect to, and how.
#[derive(Debug, Clone)]
pub(super) struct Route {
    url: MigrationUrl,
    tls: Option<tls::Client>,
}

impl Route {
    /// Says what can be said before connecting. `insecure` allows to do without TLS.
    pub(super) fn new(
        url: MigrationUrl,
        tls_dir: Option<&Path>,
        insecure: bool,
    ) -> Result<Self, ConnectError> {
        match (&url, tls_dir) {
            (MigrationUrl::Unix(_), Some(_)) => Err(ConnectError::NeedlessTls(url)),
            (MigrationUrl::Tcp { .. }, None) if !insecure && !is_loopback(&url) => {
                Err(ConnectError::Insecure(url))
            }
            (_, tls_dir) => Ok(Self {
                tls: tls_dir.map(tls::Client::new).transpose()?,
                url,
            }),
        }
    }

    /// Why a connection there does not work.
    pub(super) fn failed(&self, source: io::Error) -> ConnectError {
        ConnectError::Connect {
            url: self.url.clone(),
            source,
        }
    }

    /// A new connection, which ends when the operation is cancelled.
    pub(super) fn connect(&self, cancel: &Arc<Cancel>) -> Result<Stream, ConnectError> {
        let failed = |source| self.failed(source);
        let socket = match &self.url {
            MigrationUrl::Unix(path) => Socket::Unix(UnixStream::connect(path).map_err(failed)?),
            MigrationUrl::Tcp { host, port } => {
                let stream = connect_tcp(host, *port).map_err(failed)?;
                set_up_tcp(&stream).map_err(failed)?;
                match &self.tls {
                    Some(tls) => Socket::TlsClient(Box::new(tls.connect(host, stream)?)),
                    None => Socket::Tcp(stream),
                }
            }
        };
        let mut stream = Stream::new(socket).map_err(failed)?;
        stream.until(cancel);
        Ok(stream)
    }
}

fn connect_tcp(host: &str, port: u16) -> io::Result<TcpStream> {
    let mut result = Err(io::ErrorKind::NotFound.into());
    for address in (host, port).to_socket_addrs()? {
        result = TcpStream::connect_timeout(&address, CONNECT);
        if result.is_ok() {
            break;
        }
    }
    result
}

/// Small messages go out at once, and a peer whose host has died is noticed. Until TLS is there, it may be silent for as
/// long as these time limits allow.
fn set_up_tcp(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(CONNECT))?;
    stream.set_write_timeout(Some(CONNECT))?;
    let patience = u32::try_from(PATIENCE.as_millis()).unwrap_or(u32::MAX);
    sockopt::set_tcp_user_timeout(stream, patience)?;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, PATIENCE / 3)?;
    sockopt::set_tcp_keepintvl(stream, PATIENCE / 6)?;
    Ok(())
}

/// Where a source may connect to.
#[derive(Debug)]
pub(super) struct Listener {
    socket: ListeningSocket,
    tls: Option<tls::Server>,
}

#[derive(Debug)]
enum ListeningSocket {
    Tcp(TcpListener),
    Unix(PrivateSocket),
}

impl Listener {
    /// Listens. `insecure` allows to do without TLS.
    pub(super) fn bind(
        url: &MigrationUrl,
        tls_dir: Option<&Path>,
        insecure: bool,
    ) -> Result<Self, ConnectError> {
        // The same rules, from the other side.
        match (url, tls_dir) {
            (MigrationUrl::Unix(_), Some(_)) => return Err(ConnectError::NeedlessTls(url.clone())),
            (MigrationUrl::Tcp { .. }, None) if !insecure && !is_loopback(url) => {
                return Err(ConnectError::Insecure(url.clone()));
            }
            _ => {}
        }
        let failed = |source| ConnectError::Listen {
            url: url.clone(),
            source,
        };
        let socket = match url {
            MigrationUrl::Unix(path) => {
                ListeningSocket::Unix(PrivateSocket::bind("receiver_url", path)?)
            }
            MigrationUrl::Tcp { host, port } => {
                let listener = TcpListener::bind((host.as_str(), *port));
                ListeningSocket::Tcp(listener.map_err(failed)?)
            }
        };
        Ok(Self {
            socket,
            tls: tls_dir.map(tls::Server::new).transpose()?,
        })
    }

    /// The next connection. Whoever opens one and says nothing does not hold up more than its own.
    pub(super) fn accept(&self) -> io::Result<Incoming> {
        let socket = match &self.socket {
            ListeningSocket::Unix(socket) => Socket::Unix(socket.listener().accept()?.0),
            ListeningSocket::Tcp(listener) => {
                let (stream, _) = listener.accept()?;
                set_up_tcp(&stream)?;
                Socket::Tcp(stream)
            }
        };
        Ok(Incoming {
            socket,
            tls: self.tls.clone(),
        })
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.socket {
            ListeningSocket::Unix(socket) => socket.as_fd(),
            ListeningSocket::Tcp(listener) => listener.as_fd(),
        }
    }
}

/// A connection of which nothing is known yet.
#[derive(Debug)]
pub(super) struct Incoming {
    socket: Socket,
    tls: Option<tls::Server>,
}

impl Incoming {
    /// Hears who it is, which may take a while.
    pub(super) fn open(self) -> Result<Stream, TlsError> {
        let socket = match (self.socket, self.tls) {
            (Socket::Tcp(stream), Some(tls)) => Socket::TlsServer(Box::new(tls.accept(stream)?)),
            (socket, _) => socket,
        };
        Stream::new(socket).map_err(TlsError::Handshake)
    }
}

impl Stream {
    /// A connection that nothing but its peer ends.
    fn new(socket: Socket) -> io::Result<Self> {
        match socket.tcp_or_unix() {
            Ok(tcp) => {
                tcp.set_read_timeout(Some(TICK))?;
                tcp.set_write_timeout(Some(TICK))?;
            }
            Err(unix) => {
                unix.set_read_timeout(Some(TICK))?;
                unix.set_write_timeout(Some(TICK))?;
            }
        }
        Ok(Self {
            socket,
            patience: Some(PATIENCE),
            cancel: None,
            broken: None,
        })
    }

    /// Has the connection end when the operation is cancelled.
    pub(super) fn until(&mut self, cancel: &Arc<Cancel>) {
        self.cancel = Some(Arc::clone(cancel));
    }

    /// Has the connection end when this is set, for it is of no use by itself.
    pub(super) fn until_broken(&mut self, broken: &Arc<AtomicBool>) {
        self.broken = Some(Arc::clone(broken));
    }

    /// Has nothing but the peer end the connection any more: it is too late to cancel.
    pub(super) fn ignore_cancel(&mut self) {
        self.cancel = None;
        self.broken = None;
    }

    /// How long the peer may be silent from now on; none if for ever, but for its death, which is noticed.
    pub(super) fn set_patience(&mut self, patience: Option<Duration>) {
        self.patience = patience;
    }

    /// Does something again and again until it comes about, or has been waited for long enough.
    fn wait<R>(&mut self, mut step: impl FnMut(&mut Socket) -> io::Result<R>) -> io::Result<R> {
        let mut since = None;
        loop {
            // Also where bytes come and go all the time.
            if self.cancel.as_ref().is_some_and(|cancel| cancel.is_asked()) {
                // (As `Interrupted` it would be tried again.)
                return Err(io::Error::other("the operation was cancelled"));
            }
            match step(&mut self.socket) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                result => return result,
            }
            // What has come is heard: it may say why.
            if self
                .broken
                .as_ref()
                .is_some_and(|broken| broken.load(Ordering::Acquire))
            {
                return Err(io::Error::other("another connection is lost"));
            }
            let since = *since.get_or_insert_with(Instant::now);
            if self
                .patience
                .is_some_and(|patience| since.elapsed() > patience)
            {
                return Err(io::ErrorKind::TimedOut.into());
            }
        }
    }
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.wait(|socket| match socket {
            Socket::Tcp(stream) => stream.read(buffer),
            Socket::Unix(stream) => stream.read(buffer),
            Socket::TlsClient(stream) => stream.read(buffer),
            Socket::TlsServer(stream) => stream.read(buffer),
        })
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.wait(|socket| match socket {
            Socket::Tcp(stream) => stream.write(bytes),
            Socket::Unix(stream) => stream.write(bytes),
            Socket::TlsClient(stream) => stream.write(bytes),
            Socket::TlsServer(stream) => stream.write(bytes),
        })
    }

    fn write_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        self.wait(|socket| match socket {
            Socket::Tcp(stream) => stream.write_vectored(slices),
            Socket::Unix(stream) => stream.write_vectored(slices),
            Socket::TlsClient(stream) => stream.write_vectored(slices),
            Socket::TlsServer(stream) => stream.write_vectored(slices),
        })
    }

    fn flush(&mut self) -> io::Result<()> {
        self.wait(|socket| match socket {
            Socket::Tcp(stream) => stream.flush(),
            Socket::Unix(stream) => stream.flush(),
            Socket::TlsClient(stream) => stream.flush(),
            Socket::TlsServer(stream) => stream.flush(),
        })
    }
}

impl WriteVolatile for Stream {
    fn write_volatile<B: BitmapSlice>(
        &mut self,
        memory: &VolatileSlice<'_, B>,
    ) -> Result<usize, VolatileMemoryError> {
        /// What is enciphered is copied first, this much at a time: the four largest records of TLS.
        const COPIED: usize = 64 << 10;
        let sent = match &self.socket {
            Socket::Tcp(_) | Socket::Unix(_) => self.wait(|socket| {
                let sent = match socket {
                    Socket::Tcp(stream) => stream.write_volatile(memory),
                    Socket::Unix(stream) => stream.write_volatile(memory),
                    Socket::TlsClient(_) | Socket::TlsServer(_) => Ok(0),
                };
                sent.map_err(into_io)
            }),
            Socket::TlsClient(_) | Socket::TlsServer(_) => {
                let mut copy = vec![0; memory.len().min(COPIED)];
                memory.copy_to(&mut copy);
                self.write(&copy)
            }
        };
        sent.map_err(VolatileMemoryError::IOError)
    }
}

impl Socket {
    fn tcp_or_unix(&self) -> Result<&TcpStream, &UnixStream> {
        match self {
            Self::Tcp(stream) => Ok(stream),
            Self::TlsClient(stream) => Ok(&stream.sock),
            Self::TlsServer(stream) => Ok(&stream.sock),
            Self::Unix(stream) => Err(stream),
        }
    }
}

/// Whether what goes to an address stays on this host.
fn is_loopback(url: &MigrationUrl) -> bool {
    match url {
        MigrationUrl::Unix(_) => true,
        MigrationUrl::Tcp { host, port } => (host.as_str(), *port)
            .to_socket_addrs()
            .is_ok_and(|mut addresses| addresses.all(|address| address.ip().is_loopback())),
    }
}
