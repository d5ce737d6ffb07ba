//! The connections that guest RAM takes, at the destination.

use std::io::{self, BufReader};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::destination::ReceiveError;
use super::ram::{self, Buffer};
use super::reception::{Call, Reception};
use super::stream::Stream;
use super::wire::{self, Kind, MigrationId, Role, WireError};
use crate::control::Task;
use crate::memory::Memory;

/// How often it is looked whether the wait for them has come to an end.
const TICK: Duration = Duration::from_millis(100);
/// How long a source may take to open them.
const CONNECTIONS: Duration = Duration::from_secs(30);
/// How much is read to have the head of a frame, and small frames with it, in bytes.
const HEADS: usize = 16 << 10;

/// Whether a connection of a migration is lost. The others are of no use then.
#[derive(Debug, Default)]
pub(super) struct Broken(pub(super) Arc<AtomicBool>);

impl Broken {
    /// Has an error of one connection end the others, and notes whether there has been none before.
    pub(super) fn by(&self, error: impl Into<ReceiveError>) -> Failure {
        Failure {
            is_first: !self.0.swap(true, Ordering::AcqRel),
            error: error.into(),
        }
    }
}

/// Why a connection is lost.
#[derive(Debug)]
pub(super) struct Failure {
    /// Whether it is the first, and says more than what has followed from it.
    pub(super) is_first: bool,
    pub(super) error: ReceiveError,
}

/// What RAM comes with.
#[derive(Debug, Clone, Copy)]
pub(super) struct Incoming<'a> {
    pub(super) id: MigrationId,
    pub(super) reception: &'a Reception,
    pub(super) task: &'a Task,
    pub(super) memory: &'a Memory,
    pub(super) broken: &'a Broken,
}

impl Incoming<'_> {
    /// Waits for so many connections, and takes all that they bring.
    pub(super) fn take(&self, connections: u8) -> Result<(), Failure> {
        let lanes = self.lanes(connections);
        let lanes = lanes.map_err(|error| self.broken.by(error))?;
        thread::scope(|scope| {
            let mut lanes = lanes.into_iter();
            let first = lanes.next();
            let others: Vec<_> = lanes
                .map(|lane| scope.spawn(move || self.take_lane(lane)))
                .collect();
            let failed = |_| {
                let error = io::Error::other("a thread that receives memory has failed");
                Err(self.broken.by(WireError::from(error)))
            };
            let first = first.map_or(Ok(()), |lane| self.take_lane(lane));
            others.into_iter().fold(first, |all, lane| {
                match lane.join().unwrap_or_else(failed) {
                    Err(failure) if failure.is_first || all.is_ok() => Err(failure),
                    _ => all,
                }
            })
        })
    }

    fn lanes(&self, count: u8) -> Result<Vec<Stream>, ReceiveError> {
        let deadline = Instant::now() + CONNECTIONS;
        let mut lanes = Vec::new();
        while lanes.len() < usize::from(count) {
            if self.task.cancel().is_asked() {
                return Err(ReceiveError::Refused);
            }
            if self.broken.0.load(Ordering::Acquire) {
                return Err(WireError::from(io::Error::other("another connection is lost")).into());
            }
            if Instant::now() > deadline {
                return Err(WireError::from(io::Error::from(io::ErrorKind::TimedOut)).into());
            }
            let call = self
                .reception
                .next_call(TICK)
                .map_err(ReceiveError::Reception)?;
            let of_this = |call: &Call| call.role == Role::Memory && call.id == self.id;
            if let Some(mut call) = call.filter(of_this) {
                call.stream.until(self.task.cancel());
                call.stream.until_broken(&self.broken.0);
                call.stream.set_patience(None);
                lanes.push(call.stream);
            }
        }
        Ok(lanes)
    }

    fn take_lane(&self, lane: Stream) -> Result<(), Failure> {
        let taken = take_ram(lane, self.memory, self.task);
        taken.map_err(|error| self.broken.by(error))
    }
}

fn take_ram(lane: Stream, memory: &Memory, task: &Task) -> Result<(), WireError> {
    // The heads of frames come with the beginning of what follows. The rest of that takes no detour.
    let mut lane = BufReader::with_capacity(HEADS, lane);
    let mut buffer = Buffer::new();
    loop {
        match wire::receive_head(&mut lane)? {
            (Kind::Pages, length) => {
                ram::receive_block(&mut lane, length, memory, &mut buffer)?;
                task.update(|progress| progress.copied_bytes += u64::from(length));
            }
            (Kind::RoundEnd, _) => wire::send(lane.get_mut(), Kind::RoundTaken, &[])?,
            (Kind::PagesEnd, _) => return Ok(()),
            (kind, _) => return Err(WireError::Unexpected(format!("{kind:?} among memory"))),
        }
    }
}
