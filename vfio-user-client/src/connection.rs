//! One connection, shared by any number of threads: who sends, who reads, and who waits.
//!
//! Whoever waits for something reads the socket, if nobody else does, and deals with whatever comes, for others too
//! ([`receiving`]). The right to read is the [`Reader`] itself: it is in [`Shared`] while nobody reads. Likewise
//! [`Shared::sending`] is the right to send, for the time of one message ([`sending`]). The lock around [`Shared`] is
//! held for moments only, never while a thread waits for the server.

mod leaving;
mod receiving;
mod sending;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use vfio_user_protocol::{Command, Header, MessageFlags};

use crate::calls::{Calls, Expected, MAX_CALLS, Outcome, Ticket};
use crate::counters::Counters;
use crate::dma::{DmaService, MAX_COMMAND};
use crate::error::{ConnError, Loss};
use crate::reader::Reader;
use crate::socket::Socket;
use crate::twin::Twin;
use crate::watch::{Interest, Watch};

pub(crate) use leaving::LeftAt;
pub(crate) use sending::MAX_OUTGOING;

/// What a connection is ready for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// The version is being agreed on.
    Negotiating,
    /// Everything.
    Ready,
    /// The answers to what was asked before.
    Draining,
    /// Nothing: it is another process', or may be soon.
    Away,
    /// Nothing, ever again.
    Lost(Loss),
}

/// A command to be sent.
#[derive(Debug)]
pub(crate) struct Request<'a> {
    pub(crate) command: Command,
    /// The struct that the payload begins with.
    pub(crate) head: &'a [u8],
    /// The rest of the payload.
    pub(crate) data: &'a [u8],
    /// Descriptors to be sent along.
    pub(crate) fds: &'a [BorrowedFd<'a>],
    /// What the reply may have.
    pub(crate) expected: Expected,
}

impl Request<'_> {
    fn payload_size(&self) -> usize {
        self.head.len() + self.data.len()
    }
}

/// The reply to a command that the server did not refuse.
#[derive(Debug)]
pub(crate) struct Reply<'a> {
    pub(crate) payload: Vec<u8>,
    pub(crate) fds: Vec<OwnedFd>,
    connection: &'a Connection,
}

impl Drop for Reply<'_> {
    fn drop(&mut self) {
        let payload = std::mem::take(&mut self.payload);
        self.connection.lock().calls.recycle(payload);
    }
}

/// A connection to a server.
#[derive(Debug)]
pub(crate) struct Connection {
    socket: Socket,
    /// The socket for the server's commands, once it is agreed on.
    twin: OnceLock<Arc<Socket>>,
    watch: Watch,
    dma: DmaService,
    shared: Mutex<Shared>,
    /// Where those sleep who wait for their turn to send.
    turn: Condvar,
    /// Where those sleep who wait for a reply, one for each place in [`Calls`].
    answered: [Condvar; MAX_CALLS],
}

/// What the threads on a connection share.
#[derive(Debug)]
struct Shared {
    state: State,
    calls: Calls,
    /// Present while nobody reads the socket.
    reader: Option<Box<Reader>>,
    /// Whether somebody is sending a command.
    sending: bool,
    /// How many threads sleep on [`Connection::turn`].
    queued: usize,
    /// Answers to the server's commands that there was no room for yet.
    outbox: Vec<u8>,
    /// Where such an answer is made up.
    answer: Vec<u8>,
    /// Whether only one command may be on its way at a time.
    one_at_a_time: bool,
    /// What the event loop watches for.
    watching: Interest,
    counters: Counters,
}

impl Connection {
    pub(crate) fn new(
        socket: OwnedFd,
        dma: DmaService,
        max_outstanding: usize,
    ) -> std::io::Result<Self> {
        let socket = Socket::new(socket, Some(receiving::SLICE))?;
        Ok(Self {
            watch: Watch::new(&socket)?,
            socket,
            twin: OnceLock::new(),
            dma,
            shared: Mutex::new(Shared {
                state: State::Negotiating,
                calls: Calls::new(max_outstanding),
                reader: Some(Box::new(Reader::new(MAX_COMMAND))),
                sending: false,
                queued: 0,
                outbox: Vec::new(),
                answer: Vec::new(),
                one_at_a_time: false,
                watching: Interest::Nothing,
                counters: Counters::default(),
            }),
            turn: Condvar::new(),
            answered: [const { Condvar::new() }; MAX_CALLS],
        })
    }

    /// Ends the negotiation. `twin` is the socket for the server's commands, if there is one.
    pub(crate) fn ready(&self, twin: Option<&Twin>) {
        self.set_twin(twin);
        let mut shared = self.lock();
        if shared.state == State::Negotiating {
            shared.state = State::Ready;
        }
        self.leave(shared);
    }

    fn set_twin(&self, twin: Option<&Twin>) {
        if let Some(twin) = twin {
            // Nobody else sets it.
            let _ = self.twin.set(Arc::clone(twin.socket()));
        }
    }

    /// Sends a command and waits for the reply.
    pub(crate) fn call(
        &self,
        request: &Request<'_>,
        limit: Duration,
    ) -> Result<Reply<'_>, ConnError> {
        let deadline = Deadline::new(request.command, limit);
        let ticket = self.begin(request, &deadline)?;
        let header = Header::command(ticket.id, request.command, request.payload_size());
        let sent = self.send(&header, request, &deadline);
        let mut shared = self.end_turn();
        if let Err(error) = sent {
            shared.calls.abandon(&ticket, false);
            return Err(self.fail(shared, error));
        }
        shared.counters.calls += 1;
        shared.counters.bytes_sent += u64::from(header.size);
        let place = Place::Answer(ticket.slot());
        let fetch = |shared: &mut Shared| shared.calls.fetch(&ticket);
        match self.wait(shared, place, &deadline, fetch) {
            (mut shared, Ok(outcome)) => {
                shared.count(&outcome, &deadline);
                self.leave(shared);
                self.reply(request.command, outcome)
            }
            (mut shared, Err(error)) => {
                shared.calls.abandon(&ticket, true);
                Err(self.fail(shared, error))
            }
        }
    }

    /// Sends a command that the server is not to answer. Returns `false`, and sends nothing, if the server has to be
    /// given one command at a time.
    pub(crate) fn post(&self, request: &Request<'_>, limit: Duration) -> Result<bool, ConnError> {
        let deadline = Deadline::new(request.command, limit);
        let mut shared = self.turn(&deadline)?;
        if shared.one_at_a_time {
            self.leave(shared);
            return Ok(false);
        }
        shared.sending = true;
        drop(shared);
        let mut header = Header::command(0, request.command, request.payload_size());
        header.flags |= MessageFlags::NO_REPLY.bits();
        let sent = self.send(&header, request, &deadline);
        let mut shared = self.end_turn();
        if let Err(error) = sent {
            return Err(self.fail(shared, error));
        }
        shared.counters.posts += 1;
        shared.counters.bytes_sent += u64::from(header.size);
        self.leave(shared);
        Ok(true)
    }

    /// Takes no more calls, and waits until those on their way have ended.
    pub(crate) fn drain(&self, limit: Duration) -> Result<(), ConnError> {
        let mut shared = self.lock();
        if shared.state == State::Ready {
            shared.state = State::Draining;
            // Those who wait for a turn will have none.
            self.turn.notify_all();
        }
        let deadline = Deadline::new(None, limit);
        let idle = |shared: &mut Shared| shared.is_idle().then_some(());
        let (shared, drained) = self.wait(shared, Place::Turn, &deadline, idle);
        self.leave(shared);
        drained
    }

    /// Ends the connection, and wakes all who wait.
    pub(crate) fn close(&self, loss: Loss) {
        let mut shared = self.lock();
        self.lose(&mut shared, loss);
    }

    /// The main socket.
    pub(crate) fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    pub(crate) fn state(&self) -> State {
        self.lock().state
    }

    pub(crate) fn counters(&self) -> Counters {
        let shared = self.lock();
        Counters {
            strays: shared.calls.strays(),
            ..shared.counters
        }
    }

    /// Counts an answer that broke the protocol.
    pub(crate) fn count_bad_answer(&self) {
        self.lock().counters.bad_answers += 1;
    }

    /// Counts a command that was answered on the twin socket.
    pub(crate) fn count_served(&self) {
        self.lock().counters.served += 1;
    }

    pub(crate) fn dma(&self) -> &DmaService {
        &self.dma
    }

    /// Waits for the turn of a command that wants a reply, and takes it.
    fn begin(&self, request: &Request<'_>, deadline: &Deadline) -> Result<Ticket, ConnError> {
        let mut shared = self.turn(deadline)?;
        let ticket = shared.calls.open(request.command, request.expected);
        shared.sending = ticket.is_some();
        // There is room, as `turn` has seen to.
        ticket.ok_or_else(|| deadline.error())
    }

    /// Counts a call that failed on this side, and gives up the lock.
    fn fail(&self, mut shared: MutexGuard<'_, Shared>, error: ConnError) -> ConnError {
        shared.counters.timeouts += u64::from(matches!(error, ConnError::TimedOut { .. }));
        self.leave(shared);
        error
    }

    /// What a call returns for its outcome.
    fn reply(&self, command: Command, outcome: Outcome) -> Result<Reply<'_>, ConnError> {
        match outcome {
            Outcome::Payload(payload, fds) => Ok(Reply {
                payload,
                fds,
                connection: self,
            }),
            Outcome::Refused(errno) => Err(ConnError::Refused { command, errno }),
            Outcome::TooLong => Err(ConnError::TooLong { command }),
            Outcome::Descriptors => Err(ConnError::Descriptors { command }),
        }
    }

    /// Notes that the connection is lost, unless it has been before, and wakes all who wait, the event loop too.
    fn lose(&self, shared: &mut Shared, loss: Loss) {
        if matches!(shared.state, State::Lost(_)) {
            return;
        }
        let is_ours = shared.state != State::Away;
        shared.state = State::Lost(loss);
        log::debug!("vfio-user: connection lost: {loss}");
        if is_ours {
            self.socket.shutdown();
            if let Some(twin) = self.twin.get() {
                twin.shutdown();
            }
        }
        self.watch_for(shared, Interest::End);
        self.turn.notify_all();
        self.wake(shared.calls.asleep());
    }

    /// Wakes the callers of the commands in these slots, of which each has a bit.
    fn wake(&self, mut slots: u64) {
        while slots != 0 {
            if let Some(caller) = self.answered.get(slots.trailing_zeros() as usize) {
                caller.notify_one();
            }
            slots &= slots - 1;
        }
    }

    /// Wakes the next who waits for a turn, if it can have it.
    fn call_next(&self, shared: &Shared) {
        if shared.queued > 0 && (shared.may_send() || shared.is_idle()) {
            self.turn.notify_one();
        }
    }

    /// Lets the event loop watch for something else.
    fn watch_for(&self, shared: &mut Shared, interest: Interest) {
        if shared.watching == interest {
            return;
        }
        match self.watch.set(&self.socket, interest) {
            Ok(()) => shared.watching = interest,
            Err(error) => log::warn!("vfio-user: cannot watch a connection: {error}"),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        // What a thread that panicked left behind is consistent: nothing under the lock panics.
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.watch.as_fd()
    }
}

impl Shared {
    /// Whether a command may be sent at all in this state.
    fn admit(&self) -> Result<(), ConnError> {
        match self.state {
            State::Negotiating | State::Ready => Ok(()),
            State::Draining => Err(ConnError::Draining),
            State::Away => Err(ConnError::Away),
            State::Lost(loss) => Err(ConnError::Lost(loss)),
        }
    }

    /// Whether a command may be sent now: no other message is half sent, and the server has not too many already.
    fn may_send(&self) -> bool {
        !self.sending && self.outbox.is_empty() && self.calls.has_room()
    }

    /// Whether nothing is on its way.
    fn is_idle(&self) -> bool {
        !self.sending && self.outbox.is_empty() && self.calls.outstanding() == 0
    }

    /// Has the server be given one command at a time, from now on.
    fn serve_one_at_a_time(&mut self) {
        self.one_at_a_time = true;
        self.calls.set_limit(1);
    }

    /// Counts the outcome of a call.
    fn count(&mut self, outcome: &Outcome, deadline: &Deadline) {
        self.counters.latency.record(deadline.began.elapsed());
        match outcome {
            Outcome::Payload(..) => {}
            Outcome::Refused(_) => self.counters.refusals += 1,
            Outcome::TooLong | Outcome::Descriptors => self.counters.bad_answers += 1,
        }
    }
}

/// Until when a call may take.
#[derive(Debug)]
struct Deadline {
    /// What the call asks; `None` for [`Connection::drain`].
    command: Option<Command>,
    began: Instant,
    limit: Duration,
}

impl Deadline {
    fn new(command: impl Into<Option<Command>>, limit: Duration) -> Self {
        Self {
            command: command.into(),
            began: Instant::now(),
            limit,
        }
    }

    fn remaining(&self) -> Duration {
        self.limit.saturating_sub(self.began.elapsed())
    }

    /// What it means that it has passed.
    fn error(&self) -> ConnError {
        match self.command {
            Some(command) => ConnError::TimedOut {
                command,
                limit: self.limit,
            },
            None => ConnError::Draining,
        }
    }
}

/// Where a thread sleeps while another reads.
#[derive(Clone, Copy, Debug)]
enum Place {
    /// Until it is its turn to send.
    Turn,
    /// Until there is a reply in this slot.
    Answer(usize),
}

/// Why the connection is lost if the socket says this.
fn loss(errno: Errno) -> Loss {
    match errno {
        Errno::PIPE | Errno::CONNRESET => Loss::Closed,
        _ => Loss::Socket(errno.raw_os_error()),
    }
}
