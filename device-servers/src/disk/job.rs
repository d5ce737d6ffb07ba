//! A request that is being served, one operation after the other.

use std::collections::VecDeque;
use std::io;
use std::ops::Range;

use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
};

use super::config::{MAX_DISCARD, MAX_EXTENTS, MAX_ZEROES};
use super::image::{Image, SECTOR};
use super::request::{self, Extent, Request};
use super::ring::{Buffer, GuestPieces, Memory, Operation};
use crate::virtio::guest::{self, Guest};

/// What requests have in common.
#[derive(Debug)]
pub(super) struct Context<'a> {
    pub(super) image: &'a Image,
    pub(super) serial: &'a [u8; SERIAL],
    /// Whether what is written has to survive a loss of power before the driver hears of it.
    pub(super) durable: bool,
}

/// Bytes of a serial number (`VIRTIO_BLK_ID_BYTES`).
pub(super) const SERIAL: usize = 20;

/// A request that is being served.
#[derive(Debug)]
pub(super) struct Job {
    /// Guest memory as it was when the request came. Its result goes there too.
    pub(super) guest: Guest,
    /// The number of its chain.
    pub(super) head: u16,
    /// What is left of it: its data begins where it is not done.
    request: Request,
    task: Task,
    /// Bytes that have been written to its data.
    written: u32,
}

/// What there is to do for a request.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Task {
    /// Data goes between memory and this position of the image, in bytes.
    Transfer { is_write: bool, position: u64 },
    /// Everything written is to survive.
    Sync,
    /// These bytes are discarded.
    Discard(VecDeque<Range<u64>>),
    /// These bytes become zeroes, the first of them by this method.
    Zero(VecDeque<(Range<u64>, bool)>, Method),
    /// The serial number is read.
    SerialNumber,
    /// There is nothing to be done any more.
    Done(Status),
}

/// How bytes become zeroes. The next is tried when one is not possible.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Method {
    Punch,
    Zero,
    Write,
}

/// How a request has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Status {
    Ok,
    Failed,
    Unsupported,
}

/// What to do next.
#[derive(Debug)]
pub(super) enum Step {
    Start(Operation, Memory),
    /// Nothing: it is over, and this is for the used ring.
    Finish {
        written: u32,
    },
}

/// Most bytes that go through a buffer at once.
const CHUNK: usize = 256 << 10;

impl Job {
    pub(super) fn new(guest: &Guest, head: u16, request: Request, context: &Context<'_>) -> Self {
        Self {
            guest: guest.clone(),
            head,
            task: task(&request, guest, context).unwrap_or_else(Task::Done),
            request,
            written: 0,
        }
    }

    /// Goes on, after what was started has ended.
    pub(super) fn step(&mut self, context: &Context<'_>) -> Step {
        loop {
            match &mut self.task {
                Task::Done(status) => {
                    let status = *status;
                    return self.finish(status);
                }
                Task::Transfer { .. } if self.request.data.is_empty() => {
                    self.task = Task::Done(Status::Ok);
                }
                Task::Transfer { is_write, position } => {
                    let (is_write, position) = (*is_write, *position);
                    match self.memory(is_write, context) {
                        Some(memory) => {
                            return Step::Start(transfer(is_write, position, context), memory);
                        }
                        None => self.task = Task::Done(Status::Failed),
                    }
                }
                Task::Sync => return Step::Start(Operation::Sync, Memory::None),
                Task::Discard(ranges) => match ranges.front() {
                    Some(Range { start, end }) => {
                        let (offset, length) = (*start, end - start);
                        return Step::Start(Operation::Punch { offset, length }, Memory::None);
                    }
                    None => self.task = Task::Done(Status::Ok),
                },
                Task::Zero(ranges, method) => match ranges.front() {
                    Some((range, _)) => return zero(range, *method),
                    None if context.durable => self.task = Task::Sync,
                    None => self.task = Task::Done(Status::Ok),
                },
                Task::SerialNumber => {
                    let serial = context.serial.get(..self.request.length);
                    let serial = serial.unwrap_or(context.serial);
                    let is_written = self.guest.scatter(&self.request.data, serial);
                    self.written = u32::try_from(serial.len()).unwrap_or(0);
                    self.task = Task::Done(if is_written {
                        Status::Ok
                    } else {
                        Status::Failed
                    });
                }
            }
        }
    }

    /// Notes what has become of what was started.
    pub(super) fn done(&mut self, memory: &Memory, result: io::Result<u32>) {
        if let Memory::Guest(pieces) = memory
            && matches!(self.task, Task::Transfer { is_write, .. } if !is_write)
        {
            // Whatever the result is, something may have been written.
            pieces.mark_written();
        }
        let count = match result {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return,
            Err(error) => return self.failed(&error),
        };
        match &mut self.task {
            Task::Transfer { is_write, position } => {
                let length = usize::try_from(count).unwrap_or(usize::MAX);
                // Less than a file of this size has: somebody has cut it off.
                let mut is_done = count > 0;
                if let Memory::Own(buffer) = memory
                    && !*is_write
                {
                    let bytes = buffer.bytes().get(..length).unwrap_or(&[]);
                    is_done &= self.guest.scatter(&self.request.data, bytes);
                }
                if !is_done {
                    self.task = Task::Done(Status::Failed);
                    return;
                }
                if !*is_write {
                    self.written = self.written.saturating_add(count);
                }
                *position += u64::from(count);
                request::skip(&mut self.request.data, length);
            }
            Task::Sync => self.task = Task::Done(Status::Ok),
            Task::Discard(ranges) => {
                ranges.pop_front();
            }
            Task::Zero(ranges, method) => {
                let rest = ranges.front_mut().filter(|_| *method == Method::Write);
                if let Some((range, _)) = rest {
                    range.start += u64::from(count);
                    if !range.is_empty() && count > 0 {
                        return;
                    }
                }
                ranges.pop_front();
                *method = first_method(ranges);
            }
            Task::SerialNumber | Task::Done(_) => {}
        }
    }

    /// What was started has failed. There may be another way.
    fn failed(&mut self, error: &io::Error) {
        let is_impossible = error.raw_os_error() == Some(libc::EOPNOTSUPP);
        match &mut self.task {
            // It was but a hint.
            Task::Discard(ranges) if is_impossible => ranges.clear(),
            Task::Zero(_, method @ Method::Punch) if is_impossible => *method = Method::Zero,
            Task::Zero(_, method @ Method::Zero) if is_impossible => *method = Method::Write,
            task => {
                log::debug!("a request has failed: {error}");
                *task = Task::Done(Status::Failed);
            }
        }
    }

    /// The memory that the rest of the data is in, or a buffer for some of it. `None` if it cannot be read.
    fn memory(&self, is_write: bool, context: &Context<'_>) -> Option<Memory> {
        let data = &self.request.data;
        if let Some(pieces) = GuestPieces::new(&self.guest.view, data, &context.image.geometry) {
            return Some(Memory::Guest(pieces));
        }
        let mut buffer = Buffer::new(guest::length(data).min(CHUNK));
        let is_there = !is_write || self.guest.gather(data, buffer.bytes_mut());
        is_there.then_some(Memory::Own(buffer))
    }

    fn finish(&self, status: Status) -> Step {
        let code = match status {
            Status::Ok => VIRTIO_BLK_S_OK,
            Status::Failed => VIRTIO_BLK_S_IOERR,
            Status::Unsupported => VIRTIO_BLK_S_UNSUPP,
        };
        let [code, ..] = code.to_le_bytes();
        if !self.guest.write(self.request.status, &[code]) {
            log::debug!("a request has no place for its status");
        }
        // What was written of a read that failed is not of use to anybody, but its status is.
        Step::Finish {
            written: self.written.saturating_add(1),
        }
    }
}

/// What there is to do for a request, or how it ends without.
fn task(request: &Request, guest: &Guest, context: &Context<'_>) -> Result<Task, Status> {
    let image = context.image;
    let transfer = |is_write, sector| {
        let range =
            request::range(sector, request.length as u64, image.size).ok_or(Status::Failed)?;
        is_aligned(&range, image)
            .then_some(Task::Transfer {
                is_write,
                position: range.start,
            })
            .ok_or(Status::Failed)
    };
    let changes = matches!(
        request.operation,
        request::Operation::Write { .. }
            | request::Operation::Discard
            | request::Operation::WriteZeroes
    );
    if changes && image.readonly {
        return Err(Status::Failed);
    }
    match request.operation {
        request::Operation::Read { sector } => transfer(false, sector),
        request::Operation::Write { sector } => transfer(true, sector),
        // There is nothing to flush.
        request::Operation::Flush if image.readonly => Err(Status::Ok),
        request::Operation::Flush => Ok(Task::Sync),
        request::Operation::SerialNumber => Ok(Task::SerialNumber),
        request::Operation::Discard => {
            let extents = extents(request, guest, image, MAX_DISCARD)?;
            if extents.iter().any(|(_, may_unmap)| *may_unmap) {
                return Err(Status::Unsupported);
            }
            let ranges = extents.into_iter().map(|(range, _)| range);
            Ok(Task::Discard(ranges.collect()))
        }
        request::Operation::WriteZeroes => {
            let ranges = extents(request, guest, image, MAX_ZEROES)?;
            let method = first_method(&ranges);
            Ok(Task::Zero(ranges, method))
        }
        request::Operation::Unknown => Err(Status::Unsupported),
    }
}

/// The extents in the data of a request, without empty ones, and whether they may be deallocated.
fn extents(
    request: &Request,
    guest: &Guest,
    image: &Image,
    max_sectors: u32,
) -> Result<VecDeque<(Range<u64>, bool)>, Status> {
    let length = request.length;
    let most = usize::try_from(MAX_EXTENTS).map_err(|_| Status::Failed)? * Extent::SIZE;
    if length > most || length == 0 {
        return Err(Status::Failed);
    }
    let mut bytes = vec![0; length];
    if !guest.gather(&request.data, &mut bytes) {
        return Err(Status::Failed);
    }
    let (extents, rest) = bytes.as_chunks();
    if !rest.is_empty() {
        return Err(Status::Failed);
    }
    let max_bytes = u64::from(max_sectors) * u64::from(SECTOR);
    let mut ranges = VecDeque::new();
    for extent in extents {
        let extent = Extent::parse(*extent);
        if extent.has_other_flags() {
            return Err(Status::Unsupported);
        }
        let range = extent.range(image.size).ok_or(Status::Failed)?;
        if range.end - range.start > max_bytes || !is_aligned(&range, image) {
            return Err(Status::Failed);
        }
        if !range.is_empty() {
            ranges.push_back((range, extent.may_unmap()));
        }
    }
    Ok(ranges)
}

fn is_aligned(range: &Range<u64>, image: &Image) -> bool {
    (range.start | range.end).is_multiple_of(image.geometry.block.into())
}

fn transfer(is_write: bool, offset: u64, context: &Context<'_>) -> Operation {
    if is_write {
        let durable = context.durable;
        Operation::Write { offset, durable }
    } else {
        Operation::Read(offset)
    }
}

/// How the first range becomes zeroes, if all is possible.
fn first_method(ranges: &VecDeque<(Range<u64>, bool)>) -> Method {
    match ranges.front() {
        Some((_, true)) => Method::Punch,
        _ => Method::Zero,
    }
}

fn zero(range: &Range<u64>, method: Method) -> Step {
    let (offset, length) = (range.start, range.end - range.start);
    match method {
        Method::Punch => Step::Start(Operation::Punch { offset, length }, Memory::None),
        Method::Zero => Step::Start(Operation::Zero { offset, length }, Memory::None),
        Method::Write => {
            let length = usize::try_from(length).unwrap_or(CHUNK).min(CHUNK);
            // If it has to be durable, that is done at the end.
            let durable = false;
            let write = Operation::Write { offset, durable };
            Step::Start(write, Memory::Own(Buffer::new(length)))
        }
    }
}
