//! Leaving a connection to another process, and taking over one that another process has left.

use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{Connection, Deadline, Place, Shared, State};
use crate::error::{ConnError, Loss};
use crate::twin::Twin;
use crate::watch::Interest;

/// Where a connection was left.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct LeftAt {
    /// Later commands have higher ids.
    last_id: u16,
    /// Whether the server has to be given one command at a time.
    one_at_a_time: bool,
}

impl Connection {
    /// Takes no more calls, waits until nothing is on its way in either direction, and then leaves both sockets alone.
    /// After an error everything is as before.
    pub(crate) fn hand_over(
        self: &Arc<Self>,
        twin: Option<&Twin>,
        limit: Duration,
    ) -> Result<LeftAt, ConnError> {
        self.lock().admit()?;
        let left = self.come_to_rest(twin, limit);
        if left.is_err() {
            self.go_on(twin)?;
        }
        left
    }

    fn come_to_rest(&self, twin: Option<&Twin>, limit: Duration) -> Result<LeftAt, ConnError> {
        let deadline = Deadline::new(None, limit);
        self.drain(limit).map_err(|error| match error {
            ConnError::Draining => ConnError::Restless("a command is not answered"),
            error => error,
        })?;
        // The server may have needed it to answer.
        if !twin.is_none_or(|twin| twin.rest(deadline.remaining())) {
            return Err(ConnError::Restless("an access to memory does not end"));
        }
        let still = |shared: &mut Shared| {
            (shared.state == State::Draining && shared.is_still()).then_some(())
        };
        let (mut shared, still) = self.wait(self.lock(), Place::Turn, &deadline, still);
        if let Err(error) = still {
            let error = match error {
                ConnError::Draining => ConnError::Restless("an access to memory does not end"),
                error => error,
            };
            return Err(self.fail(shared, error));
        }
        shared.state = State::Away;
        self.watch_for(&mut shared, Interest::Nothing);
        let left = LeftAt {
            last_id: shared.calls.last_id(),
            one_at_a_time: shared.one_at_a_time,
        };
        self.leave(shared);
        Ok(left)
    }

    /// Makes a connection that nothing has been done with yet one that was handed over and is not this process' yet.
    pub(crate) fn stay_away(&self, twin: Option<&Twin>) {
        self.set_twin(twin);
        self.lock().state = State::Away;
    }

    /// Takes a connection over where it was left.
    pub(crate) fn take_over(
        &self,
        LeftAt {
            last_id,
            one_at_a_time,
        }: &LeftAt,
    ) {
        let mut shared = self.lock();
        shared.calls.go_on_after(*last_id);
        if *one_at_a_time {
            shared.serve_one_at_a_time();
        }
    }

    /// Takes calls, and serves the sockets, after [`hand_over`](Self::hand_over) or [`take_over`](Self::take_over).
    pub(crate) fn go_on(self: &Arc<Self>, twin: Option<&Twin>) -> Result<(), ConnError> {
        let mut shared = self.lock();
        match shared.state {
            State::Negotiating | State::Ready => {}
            State::Draining | State::Away => shared.state = State::Ready,
            State::Lost(loss) => return Err(ConnError::Lost(loss)),
        }
        self.leave(shared);
        let started = twin.map_or(Ok(()), |twin| twin.start(self));
        started.map_err(|error| {
            self.close(Loss::Dropped);
            ConnError::System(error)
        })
    }
}

impl Shared {
    /// Whether nothing is on its way, and nothing is half received.
    fn is_still(&self) -> bool {
        let reader = self.reader.as_ref();
        self.is_idle() && reader.is_some_and(|reader| reader.is_between_messages())
    }
}
