//! What the thread of a queue does: it takes requests, and gives them to the kernel.

use std::hint;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use super::at_once::{AtOnce, MAX_LENGTH};
use super::config::writes_through;
use super::error::DiskError;
use super::image::Image;
use super::job::{Context, Job, SERIAL, Step};
use super::polling::{LONGEST, Polling};
use super::request::Request;
use super::ring::{Event, Memory, Operation, Ring};
use crate::virtio::guest::Guest;
use crate::virtio::{Activation, Service, Stop, VirtQueue};

/// What serves one queue.
#[derive(Debug)]
pub(super) struct DiskService {
    shared: Arc<Shared>,
    ring: Ring,
    /// The requests that are under way, by the slots of the ring that they have.
    jobs: Vec<Option<Job>>,
    free: Vec<u16>,
    /// How many of them go through a buffer.
    buffered: usize,
    /// Which writes are not for the ring.
    at_once: AtOnce,
    /// Bytes that have been written without it since the driver was last interrupted.
    written: usize,
    polling: Polling,
    /// Whether the ring cannot be used any more.
    has_failed: bool,
}

/// What the services of a disk share with the device.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) image: Image,
    pub(super) serial: [u8; SERIAL],
    /// What the driver has set: whether it flushes itself.
    pub(super) writeback: AtomicBool,
}

/// Whether there is more to be taken out of the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rest {
    /// No: the driver notifies when there is.
    Nothing,
    /// Perhaps, when something that is under way has ended.
    Waits,
    /// Perhaps.
    Something,
}

/// Most requests that are taken before those which were taken earlier go on, and most bytes that are written meanwhile. The
/// driver deals with what is done while more is being done: with many at a time it would wait, and with few be interrupted
/// too often.
const BATCH: u16 = 8;
const BATCH_BYTES: usize = 256 << 10;

/// Most requests that go through a buffer at a time, of 256 KiB each.
const MAX_BUFFERED: usize = 64;

// What is watched.
const DOORBELL: u16 = 0;
const STOP: u16 = 1;

impl DiskService {
    /// A service for a queue of up to `size` entries.
    pub(super) fn new(shared: Arc<Shared>, size: u16) -> Result<Self, DiskError> {
        let at_once = if shared.image.direct {
            AtOnce::Never
        } else {
            AtOnce::Untried
        };
        Ok(Self {
            ring: Ring::new(size, Arc::clone(&shared.image.file)).map_err(DiskError::Ring)?,
            shared,
            jobs: (0..size).map(|_| None).collect(),
            free: (0..size).rev().collect(),
            buffered: 0,
            at_once,
            written: 0,
            polling: Polling::default(),
            has_failed: false,
        })
    }

    fn run(&mut self, queue: &mut VirtQueue, features: u64, stop: &Stop) -> io::Result<()> {
        if self.has_failed {
            return Err(io::Error::other("io_uring has failed before"));
        }
        queue.doorbell().has_rung();
        self.ring.watch(queue.doorbell(), DOORBELL)?;
        self.ring.watch(stop, STOP)?;
        let mut rest = Rest::Something;
        loop {
            let is_stopping = stop.is_set();
            if is_stopping && self.is_idle() {
                break;
            }
            if rest != Rest::Nothing && !is_stopping {
                rest = self.take(queue, features, stop)?;
            }
            if rest == Rest::Something && !is_stopping {
                self.ring.submit()?;
            } else {
                self.ring.wait()?;
            }
            // When all is over, it is time to look whether more comes soon.
            if self.handle_events(queue, features, stop)? || self.is_idle() {
                rest = Rest::Something;
            }
        }
        self.ring.end_watches(&[DOORBELL, STOP])
    }

    /// Takes a few requests out of the queue, and starts them.
    fn take(&mut self, queue: &mut VirtQueue, features: u64, stop: &Stop) -> io::Result<Rest> {
        let guest = queue.guest();
        queue.disable_notifications(&guest.view);
        let mut rest = Rest::Something;
        for taken in 0..BATCH {
            if self.written >= BATCH_BYTES {
                break;
            }
            if self.free.is_empty() || self.buffered >= MAX_BUFFERED {
                rest = Rest::Waits;
                break;
            }
            if !self.take_one(queue, &guest, features)? {
                // With the page cache, what has been taken is over soon, and the driver need not notify before that.
                if taken == 0 || self.shared.image.direct {
                    rest = Rest::Nothing;
                }
                break;
            }
        }
        // Those that were over at once.
        queue.interrupt(&guest.view);
        self.written = 0;
        if rest == Rest::Nothing
            && (self.more_comes_soon(queue, &guest, stop)
                || queue.enable_notifications(&guest.view))
        {
            rest = Rest::Something;
        }
        Ok(rest)
    }

    /// Looks for requests that the driver is about to make, without being notified, if there is nothing else to do.
    fn more_comes_soon(&mut self, queue: &mut VirtQueue, guest: &Guest, stop: &Stop) -> bool {
        if !self.is_idle() || !self.polling.is_due() {
            return false;
        }
        let begin = Instant::now();
        let something_came = loop {
            if queue.has_more(&guest.view) {
                break true;
            }
            if stop.is_set() || begin.elapsed() >= LONGEST {
                break false;
            }
            hint::spin_loop();
        };
        self.polling.note(something_came);
        something_came
    }

    /// Takes one request, and returns whether there was one.
    fn take_one(
        &mut self,
        queue: &mut VirtQueue,
        guest: &Guest,
        features: u64,
    ) -> io::Result<bool> {
        let Some(chain) = queue.pop(&guest.view) else {
            return Ok(false);
        };
        let head = chain.head_index();
        match Request::parse(chain, |address, data| guest.read(address, data)) {
            Ok(request) => {
                let shared = Arc::clone(&self.shared);
                let context = shared.context(features);
                let job = Job::new(guest, head, request, &context);
                self.step(job, queue, &context)?;
            }
            Err(error) => {
                log::debug!("queue {}: {error}", queue.index());
                queue.push(&guest.view, head, 0);
            }
        }
        Ok(true)
    }

    /// Deals with what has happened, and returns whether there may be something in the queue.
    fn handle_events(
        &mut self,
        queue: &mut VirtQueue,
        features: u64,
        stop: &Stop,
    ) -> io::Result<bool> {
        let shared = Arc::clone(&self.shared);
        let context = shared.context(features);
        let mut has_rung = false;
        let mut view = None;
        while let Some(event) = self.ring.next() {
            match event {
                Event::Readable { number, is_over } => {
                    has_rung |= number == DOORBELL;
                    match number {
                        DOORBELL if is_over => self.ring.watch(queue.doorbell(), DOORBELL)?,
                        STOP if is_over => self.ring.watch(stop, STOP)?,
                        _ => {}
                    }
                }
                Event::Done {
                    slot,
                    memory,
                    result,
                } => {
                    self.buffered -= usize::from(matches!(memory, Memory::Own(_)));
                    let job = self.jobs.get_mut(usize::from(slot)).and_then(Option::take);
                    self.free.push(slot);
                    let Some(mut job) = job else { continue };
                    job.done(&memory, result);
                    view = Some(job.guest.view.clone());
                    self.step(job, queue, &context)?;
                }
            }
        }
        if let Some(view) = view {
            queue.interrupt(&view);
        }
        Ok(has_rung)
    }

    /// Lets a request go on, or returns it to the driver.
    fn step(
        &mut self,
        mut job: Job,
        queue: &mut VirtQueue,
        context: &Context<'_>,
    ) -> io::Result<()> {
        loop {
            match job.step(context) {
                Step::Finish { written } => {
                    queue.push(&job.guest.view, job.head, written);
                    return Ok(());
                }
                Step::Start(operation, memory) => {
                    if let Some(result) = self.write_at_once(operation, &memory) {
                        job.done(&memory, result);
                        continue;
                    }
                    let slot = self.free.pop().ok_or(io::ErrorKind::ResourceBusy)?;
                    self.buffered += usize::from(matches!(memory, Memory::Own(_)));
                    self.ring.start(slot, operation, memory)?;
                    if let Some(place) = self.jobs.get_mut(usize::from(slot)) {
                        *place = Some(job);
                    }
                    return Ok(());
                }
            }
        }
    }

    /// Does a write without the ring, if that is the better way. `None` if it is not.
    fn write_at_once(&mut self, operation: Operation, memory: &Memory) -> Option<io::Result<u32>> {
        let (Operation::Write { offset, durable }, Memory::Guest(pieces)) = (operation, memory)
        else {
            return None;
        };
        let length = pieces.length();
        if durable || self.at_once == AtOnce::Never || length > MAX_LENGTH {
            return None;
        }
        let begin = Instant::now();
        if !self.at_once.is_due(begin) {
            return None;
        }
        if self.at_once == AtOnce::Untried {
            let result = self.ring.write(pieces, offset, true);
            let error = result.as_ref().err().and_then(io::Error::raw_os_error);
            if error != Some(libc::EOPNOTSUPP) {
                self.at_once = AtOnce::Never;
                return result.ok().map(Ok);
            }
        }
        let result = self.ring.write(pieces, offset, false);
        self.at_once.note(begin, Instant::now());
        self.written += length;
        Some(result)
    }

    fn is_idle(&self) -> bool {
        self.free.len() == self.jobs.len()
    }
}

impl Service for DiskService {
    fn serve(&mut self, activation: &mut Activation, stop: &Stop) {
        let features = activation.features;
        let Some(queue) = activation.queues.first_mut() else {
            return;
        };
        if let Err(error) = self.run(queue, features, stop) {
            self.has_failed = true;
            queue.give_up(&error);
        }
    }
}

impl Shared {
    fn context(&self, features: u64) -> Context<'_> {
        let is_writeback = self.writeback.load(Ordering::SeqCst);
        Context {
            image: &self.image,
            serial: &self.serial,
            durable: writes_through(features, is_writeback),
        }
    }
}
