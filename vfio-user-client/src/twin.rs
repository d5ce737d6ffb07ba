//! The twin socket: the server's commands on a socket of their own, served by a thread of their own.
//!
//! The server may send one in the middle of a command of ours, and answers that only afterwards. The thread therefore
//! never waits for anything on the main socket.

use std::io::{self, IoSlice};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;
use vfio_user_protocol::Header;

use crate::connection::Connection;
use crate::dma::MAX_COMMAND;
use crate::error::Loss;
use crate::reader::{Fds, Reader, Replies};
use crate::socket::{Socket, Wait};

/// The twin socket and the thread that serves it, if one does. Dropping it ends the thread, but not the connection.
#[derive(Debug)]
pub(crate) struct Twin {
    served: Arc<Served>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// What the thread and its owner share.
#[derive(Debug)]
struct Served {
    socket: Arc<Socket>,
    phase: Mutex<Phase>,
    rested: Condvar,
    /// Readable when the thread is to look at the phase.
    wake: OwnedFd,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The thread serves.
    Serving,
    /// It is to end as soon as it is in the middle of nothing.
    Resting,
    /// There is none, or it is about to end and leaves the socket alone.
    Rested,
}

impl Twin {
    /// A socket that nobody serves yet.
    pub(crate) fn new(socket: OwnedFd) -> io::Result<Self> {
        Ok(Self {
            served: Arc::new(Served {
                socket: Arc::new(Socket::new(socket, None)?),
                phase: Mutex::new(Phase::Rested),
                rested: Condvar::new(),
                wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            }),
            thread: Mutex::default(),
        })
    }

    /// Starts to serve the socket, unless it is being served.
    pub(crate) fn start(&self, connection: &Arc<Connection>) -> io::Result<()> {
        let mut thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        if *self.served.phase() != Phase::Rested {
            return Ok(());
        }
        *self.served.phase() = Phase::Serving;
        let (served, connection) = (Arc::clone(&self.served), Arc::clone(connection));
        let spawned = thread::Builder::new()
            .name("vfio-user-dma".to_owned())
            .spawn(move || {
                if let Some(loss) = served.serve(&connection) {
                    served.rest(&mut served.phase());
                    connection.close(loss);
                }
            });
        let spawned = spawned.inspect_err(|_| self.served.rest(&mut self.served.phase()))?;
        if let Some(rested) = thread.replace(spawned) {
            // It has nothing more to do. As below, it cannot fail in silence.
            let _ = rested.join();
        }
        Ok(())
    }

    /// Leaves the socket alone, as soon as nothing of a command has been received that has not been answered, and
    /// returns whether that was within `limit`. If not, it goes on to be served.
    pub(crate) fn rest(&self, limit: Duration) -> bool {
        let mut phase = self.served.phase();
        if *phase == Phase::Serving {
            *phase = Phase::Resting;
        }
        self.served.wake();
        let resting = |phase: &mut Phase| *phase == Phase::Resting;
        let (mut phase, _) = self
            .served
            .rested
            .wait_timeout_while(phase, limit, resting)
            .unwrap_or_else(PoisonError::into_inner);
        if *phase == Phase::Resting {
            *phase = Phase::Serving;
        }
        // Nobody is woken for nothing.
        let _ = rustix::io::read(&self.served.wake, &mut [0; 8]);
        *phase == Phase::Rested
    }

    pub(crate) fn socket(&self) -> &Arc<Socket> {
        &self.served.socket
    }
}

impl Drop for Twin {
    fn drop(&mut self) {
        if *self.served.phase() != Phase::Rested {
            self.served.socket.shutdown();
        }
        let thread = self.thread.get_mut();
        if let Some(thread) = thread.unwrap_or_else(PoisonError::into_inner).take() {
            // It fails only if the thread panicked, which is reported where that happens.
            let _ = thread.join();
        }
    }
}

impl Served {
    /// Serves the socket until it ends, and returns how it did; or until it is to be left alone.
    fn serve(&self, connection: &Connection) -> Option<Loss> {
        let socket = &self.socket;
        let mut reader = Reader::new(MAX_COMMAND);
        let mut answer = Vec::new();
        loop {
            if reader.is_between_messages() && self.rests() {
                return None;
            }
            match reader.fill(|buffer, fds| socket.receive(buffer, fds, Wait::Yes)) {
                Ok(0) | Err(Errno::CONNRESET) => return Some(Loss::Closed),
                Ok(_) => {}
                Err(Errno::INTR | Errno::AGAIN) => continue,
                Err(errno) => return Some(Loss::Socket(errno.raw_os_error())),
            }
            loop {
                match reader.parse(&mut NoReplies) {
                    Ok(None) => break,
                    Ok(Some(command)) => {
                        connection
                            .dma()
                            .answer(&command, reader.command(), &mut answer);
                        if let Err(loss) = send(socket, &answer) {
                            return Some(loss);
                        }
                        answer.clear();
                        connection.count_served();
                    }
                    Err(error) => {
                        log::warn!("vfio-user: the server sent what is not a message: {error}");
                        return Some(Loss::Garbage);
                    }
                }
            }
        }
    }

    /// Waits until there is something to receive, or the socket is left alone, and returns whether it is that.
    fn rests(&self) -> bool {
        loop {
            let mut fds = [
                PollFd::new(self.socket.as_ref(), PollFlags::IN),
                PollFd::new(&self.wake, PollFlags::IN),
            ];
            if poll(&mut fds, None).is_err() {
                continue;
            }
            let [socket, wake] = fds;
            if !wake.revents().is_empty() {
                let mut phase = self.phase();
                if *phase == Phase::Resting {
                    self.rest(&mut phase);
                    return true;
                }
            }
            if !socket.revents().is_empty() {
                return false;
            }
        }
    }

    fn rest(&self, phase: &mut Phase) {
        *phase = Phase::Rested;
        self.rested.notify_all();
    }

    fn wake(&self) {
        // It fails only if it has been written more often than can be counted.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }

    fn phase(&self) -> MutexGuard<'_, Phase> {
        self.phase.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Sends all of `bytes`, however long the server takes.
fn send(socket: &Socket, mut bytes: &[u8]) -> Result<(), Loss> {
    while !bytes.is_empty() {
        match socket.send(&[IoSlice::new(bytes)], &[]) {
            Ok(sent) => bytes = bytes.get(sent..).unwrap_or(&[]),
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => {
                // A failure shows again in the next attempt to send.
                let _ = socket.poll(PollFlags::OUT, PATIENCE);
            }
            Err(Errno::PIPE | Errno::CONNRESET) => return Err(Loss::Closed),
            Err(errno) => return Err(Loss::Socket(errno.raw_os_error())),
        }
    }
    Ok(())
}

/// The server has no command of ours on this socket, so there are no replies.
struct NoReplies;

impl Replies for NoReplies {
    fn payload(&mut self, _: &Header, _: &[u8]) {}

    fn end(&mut self, _: &Header, _: Fds) {}
}

/// How long to wait for room in one go. The end of the connection ends the wait too.
const PATIENCE: Duration = Duration::from_secs(60);
