//! One socket, with messages in both directions: commands of the client, and the device's own and their replies.
//!
//! Any thread may [`call`](Link::call) the client; one thread, which serves the device, waits for its commands with
//! [`next`](Link::next). Whoever waits reads the socket if nobody else does, and hands what is not for it to whom it is
//! for. So a device may reach guest memory by messages from the middle of an access to it.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use thiserror::Error;
use vfio_user_protocol::{Command, Header};
use zerocopy::IntoBytes;

use crate::reader::{Message, Reader};
use crate::socket::{Socket, Wait};

/// A socket that several threads use.
#[derive(Debug)]
pub(crate) struct Link {
    socket: Socket,
    /// Held while a message is sent.
    sending: Mutex<()>,
    state: Mutex<State>,
    /// Signalled when a message has been handed over, the reader is free, or the connection has ended.
    changed: Condvar,
    /// How long the client may let the socket be full.
    patience: Duration,
}

#[derive(Debug)]
struct State {
    /// The reader; `None` while some thread reads.
    reader: Option<Reader>,
    /// Commands that nobody has dealt with, and what they [cost].
    commands: VecDeque<Message>,
    queued: usize,
    /// The ids of calls that wait, and the replies to them.
    calls: Vec<(u16, Option<Message>)>,
    next_id: u16,
    ended: Option<Ended>,
}

/// What the thread that serves the device wakes up for.
#[derive(Debug)]
pub(crate) enum Next {
    /// A command of the client.
    Command(Message),
    /// Something else that it waits for.
    Event,
}

/// How a connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum Ended {
    /// The client has closed it.
    #[error("the client has gone")]
    Closed,
    /// The client sent what is not a message.
    #[error("the client sent what is not a message")]
    Garbage,
    /// The client does not read what it is sent.
    #[error("the client does not read what it is sent")]
    Stuck,
    /// The client sends commands without end while the device waits for an answer.
    #[error("the client sends commands without end while the device waits for an answer")]
    Flood,
    /// The client's proposal of a version cannot be answered with another.
    #[error("no version could be agreed on")]
    Version,
    /// The kernel refused to send or receive.
    #[error("the socket failed with errno {0}")]
    Socket(i32),
}

/// Why the client did not do what the device asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CallError {
    Ended,
    TimedOut,
    /// It said no, for this reason.
    Refused(u32),
}

impl Link {
    /// A link over `stream`, for a client that may let it be full for as long as `patience`.
    pub(crate) fn new(stream: UnixStream, patience: Duration) -> io::Result<Self> {
        Ok(Self {
            socket: Socket::new(stream)?,
            sending: Mutex::new(()),
            state: Mutex::new(State {
                reader: Some(Reader::new()),
                commands: VecDeque::new(),
                queued: 0,
                calls: Vec::new(),
                next_id: 0,
                ended: None,
            }),
            changed: Condvar::new(),
            patience,
        })
    }

    /// Waits for a command, or until one of `events` is readable.
    pub(crate) fn next(&self, events: &[BorrowedFd<'_>]) -> Result<Next, Ended> {
        let mut state = self.lock();
        loop {
            if let Some(message) = state.commands.pop_front() {
                state.queued -= cost(&message);
                return Ok(Next::Command(message));
            }
            if let Some(ended) = state.ended {
                return Err(ended);
            }
            let Some(mut reader) = state.reader.take() else {
                state = self.wait(state, None);
                continue;
            };
            drop(state);
            let result = if events.is_empty() {
                self.receive(&mut reader, Wait::Yes).map(|()| false)
            } else {
                self.poll(events).and_then(|(input, event)| {
                    if input {
                        self.receive(&mut reader, Wait::No)?;
                    }
                    Ok(event)
                })
            };
            state = self.hand_out(reader, result.as_ref().map(drop).map_err(|ended| *ended));
            if result == Ok(true) {
                return Ok(Next::Event);
            }
        }
    }

    /// Gives the payload of a command back, so that its memory serves for another.
    pub(crate) fn recycle(&self, payload: Vec<u8>) {
        if let Some(reader) = &mut self.lock().reader {
            reader.recycle(payload);
        }
    }

    /// Sends a reply.
    pub(crate) fn reply(
        &self,
        header: &Header,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), Ended> {
        self.send(
            header.as_bytes(),
            payload,
            fds,
            Instant::now() + self.patience,
        )
    }

    /// Sends a command of the device, and waits for the reply to it, for `limit` at most.
    pub(crate) fn call(
        &self,
        command: Command,
        head: &[u8],
        data: &[u8],
        limit: Duration,
    ) -> Result<Message, CallError> {
        let deadline = Instant::now() + limit;
        let id = self.register()?;
        let header = Header::command(id, command, head.len() + data.len());
        let head = [header.as_bytes(), head].concat();
        let result = self
            .send(&head, data, &[], deadline)
            .map_err(|_| CallError::Ended)
            .and_then(|()| self.await_reply(id, deadline));
        self.lock().calls.retain(|(other, _)| *other != id);
        let reply = result?;
        if reply.header.is_error() {
            return Err(CallError::Refused(reply.header.error));
        }
        Ok(reply)
    }

    /// Ends the connection, so that every thread that uses it notices.
    pub(crate) fn shutdown(&self) {
        self.socket.shutdown();
    }

    /// Takes an id for a call that nobody else uses.
    fn register(&self) -> Result<u16, CallError> {
        let mut state = self.lock();
        if state.calls.len() >= MAX_CALLS {
            return Err(CallError::TimedOut);
        }
        loop {
            let id = state.next_id;
            state.next_id = id.wrapping_add(1);
            if state.calls.iter().all(|(other, _)| *other != id) {
                state.calls.push((id, None));
                return Ok(id);
            }
        }
    }

    /// Waits for the reply to the call with this id, and reads the socket meanwhile unless another thread does.
    fn await_reply(&self, id: u16, deadline: Instant) -> Result<Message, CallError> {
        let mut state = self.lock();
        loop {
            let call = state.calls.iter_mut().find(|(other, _)| *other == id);
            if let Some(reply) = call.and_then(|(_, reply)| reply.take()) {
                return Ok(reply);
            }
            if state.ended.is_some() {
                return Err(CallError::Ended);
            }
            if Instant::now() >= deadline {
                return Err(CallError::TimedOut);
            }
            let Some(mut reader) = state.reader.take() else {
                state = self.wait(state, Some(deadline));
                continue;
            };
            drop(state);
            let result = match self.socket.wait(PollFlags::IN, deadline) {
                Ok(()) => self.receive(&mut reader, Wait::No),
                Err(Errno::TIMEDOUT) => Ok(()),
                Err(errno) => Err(ended_by(errno)),
            };
            state = self.hand_out(reader, result);
        }
    }

    /// Sends one message: `head` and then `data`.
    fn send(
        &self,
        head: &[u8],
        data: &[u8],
        fds: &[BorrowedFd<'_>],
        deadline: Instant,
    ) -> Result<(), Ended> {
        let _sending = self.sending.lock().unwrap_or_else(PoisonError::into_inner);
        self.socket
            .send(head, data, fds, deadline)
            .map_err(|errno| self.end(ended_by(errno)))
    }

    /// Waits for the socket or one of `events`, and returns which of the two there is.
    fn poll(&self, events: &[BorrowedFd<'_>]) -> Result<(bool, bool), Ended> {
        let mut fds: Vec<_> = std::iter::once(self.socket.as_fd())
            .chain(events.iter().copied())
            .map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN))
            .collect();
        match poll(&mut fds, None) {
            Ok(_) => {}
            Err(Errno::INTR) => return Ok((false, false)),
            Err(errno) => return Err(ended_by(errno)),
        }
        let mut ready = fds.iter().map(|fd| !fd.revents().is_empty());
        Ok((ready.next().unwrap_or(false), ready.any(|ready| ready)))
    }

    fn receive(&self, reader: &mut Reader, wait: Wait) -> Result<(), Ended> {
        match reader.fill(|buffer, fds| self.socket.receive(buffer, fds, wait)) {
            Ok(0) => Err(Ended::Closed),
            Ok(_) | Err(Errno::INTR | Errno::AGAIN) => Ok(()),
            Err(errno) => Err(ended_by(errno)),
        }
    }

    /// Hands out what the reader has received, and lets others read.
    fn hand_out(&self, mut reader: Reader, result: Result<(), Ended>) -> MutexGuard<'_, State> {
        let mut state = self.lock();
        let mut result = result;
        while result.is_ok() {
            match reader.parse() {
                Ok(None) => break,
                Ok(Some(message)) => result = state.take(message),
                Err(error) => {
                    log::warn!("the client sent what is not a message: {error}");
                    result = Err(Ended::Garbage);
                }
            }
        }
        if let Err(ended) = result {
            state.ended.get_or_insert(ended);
            // A client that sends no more may still want its answers.
            if ended != Ended::Closed {
                self.socket.shutdown();
            }
        }
        state.reader = Some(reader);
        // Whoever serves one thread alone need not wake others.
        if !state.calls.is_empty() {
            self.changed.notify_all();
        }
        state
    }

    fn end(&self, ended: Ended) -> Ended {
        let mut state = self.lock();
        let ended = *state.ended.get_or_insert(ended);
        drop(state);
        self.socket.shutdown();
        self.changed.notify_all();
        ended
    }

    fn wait<'a>(
        &self,
        state: MutexGuard<'a, State>,
        deadline: Option<Instant>,
    ) -> MutexGuard<'a, State> {
        let limit = deadline.map_or(SLICE, |deadline| {
            deadline.saturating_duration_since(Instant::now())
        });
        let result = self.changed.wait_timeout(state, limit);
        result.unwrap_or_else(PoisonError::into_inner).0
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Takes a message for whom it is for. Replies that nobody waits for, or not any more, are dropped.
    fn take(&mut self, message: Message) -> Result<(), Ended> {
        if message.header.is_reply() {
            let waiting = |(id, reply): &&mut (u16, Option<Message>)| {
                *id == message.header.id && reply.is_none()
            };
            if let Some((_, reply)) = self.calls.iter_mut().find(waiting) {
                *reply = Some(message);
            }
            return Ok(());
        }
        let queued = self.queued + cost(&message);
        if queued > MAX_QUEUED {
            return Err(Ended::Flood);
        }
        self.queued = queued;
        self.commands.push_back(message);
        Ok(())
    }
}

/// What a message in the queue costs: its bytes, and as much as a page for each descriptor.
fn cost(message: &Message) -> usize {
    size_of::<Message>() + message.payload.len() + (message.fds.len() << 12)
}

fn ended_by(errno: Errno) -> Ended {
    match errno {
        Errno::PIPE | Errno::CONNRESET => Ended::Closed,
        Errno::TIMEDOUT => Ended::Stuck,
        errno => Ended::Socket(errno.raw_os_error()),
    }
}

/// How long a thread without a deadline waits in one go.
const SLICE: Duration = Duration::from_secs(10);

/// Most calls at a time: as many as a device has threads.
const MAX_CALLS: usize = 1024;

/// What the commands may cost that wait while the device waits for a reply. The socket itself holds a few hundred
/// posted writes, and what is received at once up to four thousand headers.
const MAX_QUEUED: usize = 8 << 20;
