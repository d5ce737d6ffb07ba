//! The twin socket: the server's commands on a socket of their own, served by a thread of their own.
//!
//! The server may send one in the middle of a command of ours, and answers that only afterwards. The thread therefore
//! never waits for anything on the main socket.

use std::io::{self, IoSlice};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::event::PollFlags;
use rustix::io::Errno;
use vfio_user_protocol::Header;

use crate::connection::Connection;
use crate::dma::MAX_COMMAND;
use crate::error::Loss;
use crate::reader::{Fds, Reader, Replies};
use crate::socket::{Socket, Wait};

/// The twin socket and the thread that serves it. Dropping it ends the thread, but not the connection.
#[derive(Debug)]
pub(crate) struct Twin {
    socket: Arc<Socket>,
    thread: Option<JoinHandle<()>>,
}

impl Twin {
    /// Starts to serve the socket.
    pub(crate) fn start(socket: OwnedFd, connection: Arc<Connection>) -> io::Result<Self> {
        let socket = Arc::new(Socket::new(socket, None)?);
        let served = Arc::clone(&socket);
        let thread = thread::Builder::new()
            .name("vfio-user-dma".to_owned())
            .spawn(move || {
                let loss = serve(&served, &connection);
                connection.close(loss);
            })?;
        Ok(Self {
            socket,
            thread: Some(thread),
        })
    }

    pub(crate) fn socket(&self) -> Arc<Socket> {
        Arc::clone(&self.socket)
    }
}

impl Drop for Twin {
    fn drop(&mut self) {
        self.socket.shutdown();
        if let Some(thread) = self.thread.take() {
            // It fails only if the thread panicked, which is reported where that happens.
            let _ = thread.join();
        }
    }
}

/// Serves the socket until it ends, and returns how it did.
fn serve(socket: &Socket, connection: &Connection) -> Loss {
    let mut reader = Reader::new(MAX_COMMAND);
    let mut answer = Vec::new();
    loop {
        match reader.fill(|buffer, fds| socket.receive(buffer, fds, Wait::Yes)) {
            Ok(0) | Err(Errno::CONNRESET) => return Loss::Closed,
            Ok(_) => {}
            Err(Errno::INTR | Errno::AGAIN) => continue,
            Err(errno) => return Loss::Socket(errno.raw_os_error()),
        }
        loop {
            match reader.parse(&mut NoReplies) {
                Ok(None) => break,
                Ok(Some(command)) => {
                    connection
                        .dma()
                        .answer(&command, reader.command(), &mut answer);
                    if let Err(loss) = send(socket, &answer) {
                        return loss;
                    }
                    answer.clear();
                    connection.count_served();
                }
                Err(error) => {
                    log::warn!("vfio-user: the server sent what is not a message: {error}");
                    return Loss::Garbage;
                }
            }
        }
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
