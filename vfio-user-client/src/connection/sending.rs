//! Sending: one message at a time, never blocking in the kernel.

use std::io::IoSlice;
use std::sync::MutexGuard;
use std::time::Duration;

use rustix::event::PollFlags;
use rustix::io::Errno;
use vfio_user_protocol::Header;
use zerocopy::IntoBytes;

use super::{Connection, Deadline, Place, Request, Shared, State, loss};
use crate::error::{ConnError, Loss};

/// Largest message that is sent, in bytes, whatever the server says it takes. libvfio-user reads a payload with a single
/// `recv`, and the kernel hands it no more than about 36 KiB at once.
pub(crate) const MAX_OUTGOING: usize = 32 << 10;

impl Connection {
    /// Waits until a command may be sent.
    pub(super) fn turn(&self, deadline: &Deadline) -> Result<MutexGuard<'_, Shared>, ConnError> {
        let shared = self.lock();
        let ready = |shared: &mut Shared| match shared.admit() {
            Ok(()) => shared.may_send().then_some(Ok(())),
            Err(error) => Some(Err(error)),
        };
        let (shared, admitted) = self.wait(shared, Place::Turn, deadline, ready);
        match admitted.flatten() {
            Ok(()) => Ok(shared),
            Err(error) => Err(self.fail(shared, error)),
        }
    }

    /// Sends a message, whose turn it must be. A deadline in the middle of it ends the connection.
    pub(super) fn send(
        &self,
        header: &Header,
        request: &Request<'_>,
        deadline: &Deadline,
    ) -> Result<(), ConnError> {
        let mut parts = [
            IoSlice::new(header.as_bytes()),
            IoSlice::new(request.head),
            IoSlice::new(request.data),
        ];
        let mut parts = parts.as_mut_slice();
        let mut fds = request.fds;
        let mut missing = Header::SIZE + request.payload_size();
        let mut begun = false;
        loop {
            match self.socket.send(parts, fds) {
                Ok(sent) if sent >= missing => return Ok(()),
                Ok(sent) => {
                    IoSlice::advance_slices(&mut parts, sent);
                    missing -= sent;
                    fds = &[];
                    begun = true;
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    if let Err(error) = self.await_room(deadline) {
                        if begun {
                            self.close(Loss::HalfSent);
                        }
                        return Err(error);
                    }
                }
                Err(errno) if begun || matches!(errno, Errno::PIPE | Errno::CONNRESET) => {
                    self.close(loss(errno));
                    return Err(ConnError::Lost(loss(errno)));
                }
                Err(errno) => return Err(ConnError::System(errno.into())),
            }
        }
    }

    /// Gives the right to send to whoever is next.
    pub(super) fn end_turn(&self) -> MutexGuard<'_, Shared> {
        let mut shared = self.lock();
        shared.sending = false;
        self.flush(&mut shared);
        self.call_next(&shared);
        shared
    }

    /// Sends answers to the server's commands as far as there is room, unless somebody is sending a command.
    pub(super) fn flush(&self, shared: &mut Shared) {
        while !shared.outbox.is_empty() && !shared.sending {
            match self.socket.send(&[IoSlice::new(&shared.outbox)], &[]) {
                Ok(sent) => {
                    shared.outbox.drain(..sent.min(shared.outbox.len()));
                    shared.counters.bytes_sent += sent as u64;
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return,
                Err(errno) => return self.lose(shared, loss(errno)),
            }
        }
    }

    /// Waits until there may be room to send, reading if nobody else does: the server may be waiting for that.
    fn await_room(&self, deadline: &Deadline) -> Result<(), ConnError> {
        let mut shared = self.lock();
        if let State::Lost(loss) = shared.state {
            return Err(ConnError::Lost(loss));
        }
        let remaining = deadline.remaining();
        if remaining.is_zero() {
            return Err(deadline.error());
        }
        if let Some(reader) = shared.reader.take() {
            drop(self.read(shared, reader, PollFlags::IN | PollFlags::OUT, remaining));
            return Ok(());
        }
        drop(shared);
        match self.socket.poll(PollFlags::OUT, remaining.min(GLANCE)) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(errno) => Err(ConnError::System(errno.into())),
        }
    }
}

/// How often a thread that waits for room looks whether the one who read has stopped doing so.
const GLANCE: Duration = Duration::from_millis(10);
