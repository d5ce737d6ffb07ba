//! A pair of queues, and its thread.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::config::MERGEABLE;
use super::device::Shared;
use super::receive::Receiver;
use super::tap::Tap;
use super::transmit::Transmitter;
use crate::virtio::{Activation, Service, Stop, VirtQueue};

/// Most packets that go in one direction before the other gets its turn.
pub(super) const BATCH: usize = 64;

/// Serves one pair of queues, with a queue of the tap.
#[derive(Debug)]
pub(super) struct Pair {
    shared: Arc<Shared>,
    number: u16,
    receiver: Receiver,
    transmitter: Transmitter,
}

/// What a direction waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wait {
    /// Nothing: there may be more to do.
    No,
    /// The tap, until it has packets, or room for some.
    Tap,
    /// The driver, until it notifies.
    Driver,
    /// A change of the card or of the tap.
    Change,
}

impl Pair {
    pub(super) fn new(shared: Arc<Shared>, number: u16) -> Self {
        let transmitter = Transmitter::new(shared.config.has_uso);
        Self {
            shared,
            number,
            receiver: Receiver::new(),
            transmitter,
        }
    }

    fn run(&mut self, activation: &mut Activation, stop: &Stop) -> io::Result<()> {
        let shared = Arc::clone(&self.shared);
        let number = usize::from(self.number);
        // There are both for each pair.
        let (Some(tap), Some(changed)) = (shared.taps.get(number), shared.changed.get(number))
        else {
            return Err(io::ErrorKind::NotFound.into());
        };
        self.receiver.begin(activation.features & MERGEABLE != 0);
        let [mut receive, mut transmit] = [None, None];
        for queue in &mut activation.queues {
            queue.doorbell().has_rung();
            let place = if queue.index() % 2 == 0 {
                &mut receive
            } else {
                &mut transmit
            };
            *place = Some(queue);
        }
        let begin = || Waits {
            // A tap's queue that is not in use has nothing to be read, and no descriptor to wait for.
            receive: if shared.is_used(self.number) {
                Wait::No
            } else {
                Wait::Change
            },
            transmit: Wait::No,
        };
        let mut waits = begin();
        while !stop.is_set() {
            waits = Waits {
                receive: step(waits.receive, &mut receive, |queue| {
                    self.receiver.receive(queue, tap)
                }),
                transmit: step(waits.transmit, &mut transmit, |queue| {
                    self.transmitter.transmit(queue, tap)
                }),
            };
            let bells = [&receive, &transmit].map(Option::as_deref);
            if waits.wait(tap, bells, stop, changed)? {
                waits = begin();
            }
        }
        Ok(())
    }
}

impl Service for Pair {
    fn serve(&mut self, activation: &mut Activation, stop: &Stop) {
        if let Err(error) = self.run(activation, stop) {
            for queue in &mut activation.queues {
                queue.give_up(&error);
            }
        }
    }
}

/// Lets a direction go on if it waits for nothing. One without a queue never does.
fn step(
    wait: Wait,
    queue: &mut Option<&mut VirtQueue>,
    work: impl FnOnce(&mut VirtQueue) -> Wait,
) -> Wait {
    match (wait, queue) {
        (Wait::No, Some(queue)) => work(queue),
        (_, Some(_)) => wait,
        (_, None) => Wait::Change,
    }
}

/// What both directions wait for.
#[derive(Clone, Copy, Debug)]
struct Waits {
    receive: Wait,
    transmit: Wait,
}

impl Waits {
    /// Waits, and notes what there is no need to wait for any more. Returns whether there was a change.
    fn wait(
        &mut self,
        tap: &Tap,
        [receive, transmit]: [Option<&VirtQueue>; 2],
        stop: &Stop,
        changed: &impl AsFd,
    ) -> io::Result<bool> {
        let limit = [self.receive, self.transmit].contains(&Wait::No);
        let limit = limit.then(Timespec::default);
        let mut of_tap = PollFlags::empty();
        of_tap.set(PollFlags::IN, self.receive == Wait::Tap);
        of_tap.set(PollFlags::OUT, self.transmit == Wait::Tap);
        let bell = |queue, wait| bell(queue, wait, stop);
        let mut fds = [
            PollFd::new(stop, PollFlags::IN),
            PollFd::new(changed, PollFlags::IN),
            bell(receive, self.receive),
            bell(transmit, self.transmit),
            // A tap that is gone, or not in use, would always be ready.
            if of_tap.is_empty() {
                PollFd::new(stop, of_tap)
            } else {
                PollFd::new(tap, of_tap)
            },
        ];
        match poll(&mut fds, limit.as_ref()) {
            Ok(_) => {}
            Err(Errno::INTR) => return Ok(false),
            Err(errno) => return Err(errno.into()),
        }
        let [_, change, receive_rang, transmit_rang, of_tap] = fds.map(|fd| fd.revents());
        if !receive_rang.is_empty() && receive.is_some_and(has_rung) {
            self.receive = Wait::No;
        }
        if !transmit_rang.is_empty() && transmit.is_some_and(has_rung) {
            self.transmit = Wait::No;
        }
        let broken = PollFlags::ERR | PollFlags::HUP | PollFlags::NVAL;
        if self.receive == Wait::Tap && of_tap.intersects(PollFlags::IN | broken) {
            self.receive = Wait::No;
        }
        if self.transmit == Wait::Tap && of_tap.intersects(PollFlags::OUT | broken) {
            self.transmit = Wait::No;
        }
        Ok(!change.is_empty() && take(changed).is_ok())
    }
}

/// The doorbell of a queue, if the driver is waited for, and otherwise something that does nothing.
fn bell<'a>(queue: Option<&'a VirtQueue>, wait: Wait, stop: &'a Stop) -> PollFd<'a> {
    match queue {
        Some(queue) if wait == Wait::Driver => PollFd::new(queue.doorbell(), PollFlags::IN),
        _ => PollFd::new(stop, PollFlags::empty()),
    }
}

fn has_rung(queue: &VirtQueue) -> bool {
    queue.doorbell().has_rung()
}

/// Takes what is in an eventfd.
fn take(event: &impl AsFd) -> io::Result<()> {
    rustix::io::read(event, &mut [0; 8])?;
    Ok(())
}
