//! Receiving: one thread reads for all.

use std::sync::{MutexGuard, PoisonError};
use std::time::Duration;

use rustix::event::PollFlags;
use rustix::io::Errno;
use vfio_user_protocol::{Command, Header};

use super::{Connection, Deadline, Place, Shared, State, loss};
use crate::error::{ConnError, Loss};
use crate::reader::Reader;
use crate::socket::Wait;
use crate::watch::Interest;

/// How long a thread stays in one blocking receive. It saves the call of `poll` that a deadline would otherwise cost:
/// only the last slice before the deadline is polled for.
pub(super) const SLICE: Duration = Duration::from_millis(100);

impl Connection {
    /// Deals with what has come while nobody waited. Called by the event loop.
    pub(crate) fn serve(&self) -> State {
        if let Err(error) = self.watch.consume() {
            log::warn!("vfio-user: cannot ask what happened on a connection: {error}");
        }
        let mut shared = self.lock();
        shared.watching = Interest::Nothing;
        for _ in 0..READS_PER_EVENT {
            if matches!(shared.state, State::Lost(_) | State::Away) {
                break;
            }
            let Some(reader) = shared.reader.take() else {
                break;
            };
            let received;
            (shared, received) = self.read(shared, reader, PollFlags::IN, Duration::ZERO);
            if received == 0 {
                break;
            }
        }
        let state = shared.state;
        self.leave(shared);
        state
    }

    /// Waits until `ready` has a value, reading the socket while nobody else does. Whoever is given the lock back has to
    /// [`leave`](Self::leave) it, unless another wait follows.
    pub(super) fn wait<'a, T>(
        &'a self,
        mut shared: MutexGuard<'a, Shared>,
        place: Place,
        deadline: &Deadline,
        mut ready: impl FnMut(&mut Shared) -> Option<T>,
    ) -> (MutexGuard<'a, Shared>, Result<T, ConnError>) {
        loop {
            if let Some(value) = ready(&mut shared) {
                return (shared, Ok(value));
            }
            if let State::Lost(loss) = shared.state {
                return (shared, Err(ConnError::Lost(loss)));
            }
            let remaining = deadline.remaining();
            if remaining.is_zero() {
                return (shared, Err(deadline.error()));
            }
            shared = match shared.reader.take() {
                Some(reader) => self.read(shared, reader, PollFlags::IN, remaining).0,
                None => self.sleep(shared, place, remaining),
            };
        }
    }

    /// Reads once, after waiting at most `limit` for one of `events`, and deals with what came. Returns how many bytes
    /// that was.
    pub(super) fn read<'a>(
        &'a self,
        mut shared: MutexGuard<'a, Shared>,
        mut reader: Box<Reader>,
        mut events: PollFlags,
        limit: Duration,
    ) -> (MutexGuard<'a, Shared>, usize) {
        if matches!(shared.watching, Interest::Input | Interest::InputOutput) {
            self.watch_for(&mut shared, Interest::End);
        }
        if shared.has_full_outbox() {
            events = PollFlags::OUT;
        } else if !shared.outbox.is_empty() {
            events |= PollFlags::OUT;
        }
        drop(shared);
        let received = self.receive(&mut reader, events, limit);
        let mut shared = self.lock();
        let count = received.unwrap_or_else(|loss| {
            self.lose(&mut shared, loss);
            0
        });
        shared.counters.bytes_received += count as u64;
        self.flush(&mut shared);
        while !shared.has_full_outbox() {
            match reader.parse(&mut shared.calls) {
                Ok(None) => break,
                Ok(Some(command)) => shared = self.serve_command(shared, &command, &reader),
                Err(error) => {
                    log::warn!("vfio-user: the server sent what is not a message: {error}");
                    self.lose(&mut shared, Loss::Garbage);
                    break;
                }
            }
        }
        shared.reader = Some(reader);
        self.call_next(&shared);
        let answered = shared.calls.take_wake();
        if answered != 0 {
            // Those who are woken want the lock.
            drop(shared);
            self.wake(answered);
            shared = self.lock();
        }
        (shared, count)
    }

    /// Gives up the lock, and the reading to somebody who waits, or to the event loop.
    pub(super) fn leave(&self, mut shared: MutexGuard<'_, Shared>) {
        let asleep = shared.calls.asleep();
        let queued = shared.queued > 0;
        // Those who have been answered are awake: they come by here, and may well want to read again themselves.
        let unread = shared.reader.is_some() && !shared.calls.has_answered();
        if unread && asleep == 0 && !queued {
            self.watch_while_idle(&mut shared);
        }
        let may_send = shared.may_send();
        drop(shared);
        if unread && asleep != 0 {
            self.wake(asleep & asleep.wrapping_neg());
        }
        if queued && (may_send || (unread && asleep == 0)) {
            self.turn.notify_one();
        }
    }

    /// Sleeps, for `limit` at most, until another thread has something for this one.
    fn sleep<'a>(
        &'a self,
        mut shared: MutexGuard<'a, Shared>,
        place: Place,
        limit: Duration,
    ) -> MutexGuard<'a, Shared> {
        let bed = match place {
            Place::Turn => {
                shared.queued += 1;
                &self.turn
            }
            Place::Answer(slot) => {
                shared.calls.set_asleep(slot, true);
                self.answered.get(slot).unwrap_or(&self.turn)
            }
        };
        let woken = bed.wait_timeout(shared, limit);
        let (mut shared, _) = woken.unwrap_or_else(PoisonError::into_inner);
        match place {
            Place::Turn => shared.queued -= 1,
            Place::Answer(slot) => shared.calls.set_asleep(slot, false),
        }
        shared
    }

    /// Waits at most `limit` for one of `events`, and receives what there is to receive.
    fn receive(
        &self,
        reader: &mut Reader,
        events: PollFlags,
        limit: Duration,
    ) -> Result<usize, Loss> {
        if !reader.is_parsed() && events.contains(PollFlags::IN) {
            return Ok(0);
        }
        let mut wait = Wait::Yes;
        if events != PollFlags::IN || limit < SLICE {
            wait = Wait::No;
            match self.socket.poll(events, limit) {
                Ok(_) if !events.contains(PollFlags::IN) => return Ok(0),
                Ok(ready) if ready.difference(PollFlags::OUT).is_empty() => return Ok(0),
                Ok(_) => {}
                Err(Errno::INTR) => return Ok(0),
                Err(errno) => return Err(loss(errno)),
            }
        }
        match reader.fill(|buffer, fds| self.socket.receive(buffer, fds, wait)) {
            Ok(0) => Err(Loss::Closed),
            Ok(count) => Ok(count),
            Err(Errno::INTR | Errno::AGAIN) => Ok(0),
            Err(errno) => Err(loss(errno)),
        }
    }

    /// Answers a command that the server sent on the main socket.
    ///
    /// libvfio-user takes the next message on the socket for the answer to its command, whatever it is. From the first
    /// access to memory on, it is therefore given no message but the answer: one command at a time, and none posted.
    fn serve_command<'a>(
        &'a self,
        mut shared: MutexGuard<'a, Shared>,
        command: &Header,
        reader: &Reader,
    ) -> MutexGuard<'a, Shared> {
        let is_dma = [Command::DmaRead as u16, Command::DmaWrite as u16].contains(&command.command);
        if is_dma && !shared.one_at_a_time {
            shared.serve_one_at_a_time();
            log::info!(
                "vfio-user: the server uses one socket for both directions: from now on it is sent one command at a time"
            );
        }
        let mut answer = std::mem::take(&mut shared.answer);
        drop(shared);
        self.dma.answer(command, reader.command(), &mut answer);
        let mut shared = self.lock();
        shared.outbox.append(&mut answer);
        shared.answer = answer;
        shared.counters.served += 1;
        self.flush(&mut shared);
        shared
    }

    /// Lets the event loop watch for what would otherwise be seen by nobody.
    fn watch_while_idle(&self, shared: &mut Shared) {
        let interest = match shared.state {
            State::Negotiating | State::Away | State::Lost(_) => return,
            State::Ready | State::Draining if !shared.outbox.is_empty() => Interest::InputOutput,
            State::Ready | State::Draining if self.twin.get().is_none() => Interest::Input,
            State::Ready | State::Draining => Interest::End,
        };
        self.watch_for(shared, interest);
    }
}

impl Shared {
    /// Whether the server has to take some answers before it gets more.
    fn has_full_outbox(&self) -> bool {
        self.outbox.len() > MAX_OUTBOX
    }
}

/// How often the event loop reads at most before it turns to something else.
const READS_PER_EVENT: usize = 16;

/// From how many bytes of unsent answers on nothing more is taken from the server.
const MAX_OUTBOX: usize = 256 << 10;
