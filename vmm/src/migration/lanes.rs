//! The connections that guest RAM takes, at the source: one or more, and a stripe of RAM always takes the same.

use std::io::{self, Write};
use std::thread;

use super::gather::Gather;
use super::ram::{self, Outgoing, Sent};
use super::stream::{ConnectError, Route, Stream};
use super::wire::{self, Kind, MigrationId, Role, WireError};
use crate::control::Task;
use crate::memory::Memory;
use crate::memory::written::{Pages, WriteLog};

/// The connections.
#[derive(Debug)]
pub(super) struct Lanes<'m>(Vec<Lane<'m>>);

#[derive(Debug)]
struct Lane<'m> {
    stripes: Stripes,
    stream: Gather<Stream>,
    /// All of RAM, of which each lane sends its stripes.
    regions: Vec<Outgoing<'m>>,
}

/// The stripes that a lane takes.
#[derive(Debug, Clone, Copy)]
struct Stripes {
    /// The lane's number, and how many there are.
    index: u8,
    count: u8,
}

/// Pages to be sent.
#[derive(Debug, Clone, Copy)]
pub(super) struct Load<'a> {
    pub(super) pages: &'a Pages,
    /// Whether the destination's RAM has nothing in it yet.
    pub(super) fresh: bool,
    /// The log in which the pages are to come again when they are written from now on; none if nobody writes any more.
    pub(super) log: Option<&'a WriteLog<'a>>,
    /// How many bytes of contents are enough.
    pub(super) limit: u64,
    /// Whether to wait until the destination has them. On their way, much may be in the host's and the network's buffers,
    /// which is sent neither as fast as it seems, nor before the guest stands still.
    pub(super) awaited: bool,
}

impl<'m> Lanes<'m> {
    /// Opens so many for this RAM.
    pub(super) fn open(
        memory: &'m Memory,
        route: &Route,
        id: MigrationId,
        count: u8,
        task: &Task,
    ) -> Result<Self, ConnectError> {
        let open = |index| {
            let mut stream = route.connect(task.cancel())?;
            wire::say_hello(&mut stream, Role::Memory, id)
                .map_err(|source| route.failed(source))?;
            Ok(Lane {
                stripes: Stripes { index, count },
                stream: Gather::new(stream),
                regions: memory.regions().map(Outgoing::new).collect(),
            })
        };
        (0..count).map(open).collect::<Result<_, _>>().map(Self)
    }

    /// Sends pages, over all of them at the same time, and tells `task` of each piece.
    pub(super) fn send(&mut self, load: &Load<'_>, task: &Task) -> Result<Sent, WireError> {
        let lanes = self.0.iter_mut();
        let mut busy = lanes.filter(|lane| lane.stripes.of(load.pages).next().is_some());
        // A thread takes as long to start as a few pages to send.
        let Some(first) = busy.next() else {
            return Ok(Sent::default());
        };
        thread::scope(|scope| {
            let others: Vec<_> = busy
                .map(|lane| scope.spawn(move || lane.send(load, task)))
                .collect();
            let sent = first.send(load, task);
            others.into_iter().fold(sent, |all, thread| {
                let failed =
                    |_| Err(io::Error::other("a thread that sends memory has failed").into());
                let sent = thread.join().unwrap_or_else(failed);
                Ok(all? + sent?)
            })
        })
    }

    /// Says that nothing more comes.
    pub(super) fn end(&mut self) -> Result<(), WireError> {
        let end = |lane: &mut Lane<'_>| wire::send(&mut lane.stream, Kind::PagesEnd, &[]);
        Ok(self.0.iter_mut().try_for_each(end)?)
    }
}

impl Lane<'_> {
    fn send(&mut self, load: &Load<'_>, task: &Task) -> Result<Sent, WireError> {
        let mut all = Sent::default();
        for (number, stripe, words) in self.stripes.of(load.pages) {
            let Some(region) = self.regions.get_mut(number) else {
                break;
            };
            if let Some(log) = load.log {
                let first = usize::try_from(stripe).unwrap_or(usize::MAX) * words.len();
                log.clear(number, first, &words).map_err(io::Error::other)?;
            }
            let sent = region.send_stripe(&mut self.stream, stripe, &words, load.fresh)?;
            all = all + sent;
            task.update(|progress| {
                progress.copied_bytes += sent.bytes();
                progress.remaining_bytes =
                    progress.remaining_bytes.saturating_sub(ram::size(&words));
            });
            if all.bytes() >= load.limit {
                break;
            }
        }
        if load.awaited {
            wire::send(&mut self.stream, Kind::RoundEnd, &[])?;
            wire::expect(self.stream.below(), Kind::RoundTaken)?;
        } else {
            self.stream.flush()?;
        }
        Ok(all)
    }
}

impl Stripes {
    /// Those of some pages: the number of their region, their own, and which of their pages are wanted.
    fn of(self, pages: &Pages) -> impl Iterator<Item = (usize, u64, ram::Words)> {
        let Self { index, count } = self;
        let regions = pages.regions().iter().enumerate();
        regions.flat_map(move |(number, pages)| {
            ram::stripes(pages)
                .filter(move |(stripe, _)| stripe % u64::from(count) == u64::from(index))
                .map(move |(stripe, words)| (number, stripe, words))
        })
    }
}
