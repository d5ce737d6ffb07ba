//! An io_uring, with one image and the memory that it is read into and written from.
#![expect(
    unsafe_code,
    reason = "the kernel is given addresses, and uses them until it says that it is done"
)]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;

use io_uring::register::Restriction;
use io_uring::types::{Fd, FsyncFlags};
use io_uring::{IoUring, cqueue, opcode, squeue};
use vfio_user_server::View;
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestAddress, GuestMemory, GuestMemoryMmap, Permissions};

use super::image::Geometry;
use crate::virtio::guest::Segment;

/// A ring, and what is under way in it: one operation at most for each slot.
pub(super) struct Ring {
    uring: IoUring,
    /// The image. It is not registered with the ring: the kernel takes rings apart some time after the end of a process,
    /// and until then a registered file stays locked. What is under way keeps it locked all the same, as it should.
    image: Arc<File>,
    /// The memory that operations use. It is neither freed nor unmapped before the kernel has done with it.
    slots: Vec<Option<Memory>>,
    in_flight: usize,
    /// How many watches are armed.
    watches: usize,
}

/// What an operation does to the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    /// Reads from an offset in bytes.
    Read(u64),
    /// Writes from an offset in bytes on; with `durable`, it is over when it survives a loss of power.
    Write { offset: u64, durable: bool },
    /// Has all that has been written survive a loss of power.
    Sync,
    /// Deallocates bytes, which then read as zeroes.
    Punch { offset: u64, length: u64 },
    /// Makes bytes zeroes, and keeps them allocated.
    Zero { offset: u64, length: u64 },
}

/// The memory of an operation.
#[derive(Debug)]
pub(super) enum Memory {
    /// None.
    None,
    /// The guest's.
    Guest(GuestPieces),
    /// The disk's own.
    Own(Buffer),
}

/// What has happened.
#[derive(Debug)]
pub(super) enum Event {
    /// Something that is [watched](Ring::watch) has become readable, perhaps several times. If the watch is over, it has
    /// to be watched again.
    Readable { number: u16, is_over: bool },
    /// The operation in this slot is over, and has transferred so many bytes.
    Done {
        slot: u16,
        memory: Memory,
        result: io::Result<u32>,
    },
}

// What `user_data` holds: the kind of an entry in the upper bits, and a number in the lower 16.
const OPERATION: u64 = 0;
const WATCH: u64 = 1 << 32;
const CANCEL: u64 = 2 << 32;
const KIND: u64 = !0 << 32;

/// What else than operations there is in the ring: watches, and what ends them.
const EXTRA: u32 = 8;

impl Ring {
    /// A ring with so many slots. The thread that makes it is the only one that may use it.
    pub(super) fn new(slots: u16, image: Arc<File>) -> io::Result<Self> {
        Ok(Self {
            uring: build(u32::from(slots) + EXTRA)?,
            image,
            slots: (0..slots).map(|_| None).collect(),
            in_flight: 0,
            watches: 0,
        })
    }

    /// Starts an operation in a slot in which there is none. It begins with the next [`wait`](Self::wait).
    pub(super) fn start(
        &mut self,
        slot: u16,
        operation: Operation,
        memory: Memory,
    ) -> io::Result<()> {
        let place = self.slots.get_mut(usize::from(slot));
        let place = place.filter(|place| place.is_none());
        let memory = place.ok_or(io::ErrorKind::ResourceBusy)?.insert(memory);
        let entry = entry(Fd(self.image.as_raw_fd()), operation, memory);
        let entry = entry.map(|entry| entry.user_data(OPERATION | u64::from(slot)));
        let result = entry.and_then(|entry| self.push(&entry));
        if result.is_ok() {
            self.in_flight += 1;
        } else if let Some(place) = self.slots.get_mut(usize::from(slot)) {
            // The kernel has not seen it.
            *place = None;
        }
        result
    }

    /// Writes memory of the guest in this thread, and returns when that is done. With `nowait`, it fails rather than wait:
    /// with `EOPNOTSUPP`, if the file system cannot do it like this at all.
    pub(super) fn write(&self, pieces: &GuestPieces, offset: u64, nowait: bool) -> io::Result<u32> {
        let iovecs = &pieces.iovecs;
        let count = i32::try_from(iovecs.len()).map_err(io::Error::other)?;
        let offset = i64::try_from(offset).map_err(io::Error::other)?;
        let flags = if nowait { libc::RWF_NOWAIT } else { 0 };
        let fd = self.image.as_raw_fd();
        // SAFETY: the descriptor is open, and there are as many pieces as that. They are mapped as long as the view of the
        // guest's memory is there that they are borrowed with, and are only read.
        let count = unsafe { libc::pwritev2(fd, iovecs.as_ptr(), count, offset, flags) };
        if count < 0 {
            return Err(io::Error::last_os_error());
        }
        u32::try_from(count).map_err(io::Error::other)
    }

    /// Says from now on when a descriptor is, or becomes, readable, by a number of the caller's. It has to be open until
    /// the next [`wait`](Self::wait), and is not read.
    pub(super) fn watch(&mut self, fd: &impl AsFd, number: u16) -> io::Result<()> {
        const READABLE: u32 = 1; // POLLIN
        let fd = Fd(fd.as_fd().as_raw_fd());
        let entry = opcode::PollAdd::new(fd, READABLE).multi(true).build();
        self.push(&entry.user_data(WATCH | u64::from(number)))?;
        self.watches += 1;
        Ok(())
    }

    /// Ends the watches, and returns when they have ended. Nothing else is under way.
    pub(super) fn end_watches(&mut self, numbers: &[u16]) -> io::Result<()> {
        for number in numbers {
            // `PollRemove` does nothing to one that is just being signalled.
            let entry = opcode::AsyncCancel::new(WATCH | u64::from(*number)).build();
            self.push(&entry.user_data(CANCEL))?;
        }
        while self.watches > 0 {
            self.wait()?;
            while self.next().is_some() {}
        }
        Ok(())
    }

    /// Submits what has been started, and waits for an event.
    pub(super) fn wait(&mut self) -> io::Result<()> {
        self.enter(1)
    }

    /// Submits what has been started, and has the kernel do what it has put off, without waiting.
    pub(super) fn submit(&mut self) -> io::Result<()> {
        let queue = self.uring.submission();
        if queue.is_empty() && !queue.taskrun() && !queue.cq_overflow() {
            return Ok(());
        }
        drop(queue);
        self.enter(0)
    }

    fn enter(&self, events: usize) -> io::Result<()> {
        match self.uring.submit_and_wait(events) {
            Ok(_) => Ok(()),
            Err(error) => match error.raw_os_error() {
                // Interrupted, or there are events to be taken first: the caller looks, and waits again.
                Some(libc::EINTR | libc::EBUSY | libc::EAGAIN) => Ok(()),
                _ => Err(error),
            },
        }
    }

    /// The next of what has happened.
    pub(super) fn next(&mut self) -> Option<Event> {
        loop {
            let completion = self.uring.completion().next()?;
            let data = completion.user_data();
            let number = u16::try_from(data & u64::from(u16::MAX)).unwrap_or(0);
            if data & KIND == WATCH {
                let is_over = !cqueue::more(completion.flags());
                self.watches -= usize::from(is_over);
                return Some(Event::Readable { number, is_over });
            }
            let slot = self.slots.get_mut(usize::from(number));
            if data & KIND != OPERATION {
                continue;
            }
            if let Some(memory) = slot.and_then(Option::take) {
                self.in_flight -= 1;
                return Some(Event::Done {
                    slot: number,
                    memory,
                    result: result(completion.result()),
                });
            }
        }
    }

    fn push(&mut self, entry: &squeue::Entry) -> io::Result<()> {
        loop {
            // SAFETY: the memory that an entry names is in a slot, which is emptied when the kernel is done with it and
            // not before, also when the ring is dropped. Entries that name no memory need nothing to be kept.
            let pushed = unsafe { self.uring.submission().push(entry) };
            if pushed.is_ok() {
                return Ok(());
            }
            self.uring.submit()?;
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        while self.in_flight > 0 {
            if self.wait().is_err() {
                // Nobody knows when the kernel is done: the memory stays.
                std::mem::forget(std::mem::take(&mut self.slots));
                return;
            }
            while self.next().is_some() {}
        }
    }
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut debug = f.debug_struct("Ring");
        debug.field("in_flight", &self.in_flight);
        debug.finish_non_exhaustive()
    }
}

/// Memory of the guest, in the order of its use. It stays mapped as long as this is there.
#[derive(Debug)]
pub(super) struct GuestPieces {
    view: View,
    segments: Vec<Segment>,
    /// Where the segments are in this process: in the view.
    iovecs: Vec<libc::iovec>,
}

impl GuestPieces {
    /// Bytes in all of it.
    pub(super) fn length(&self) -> usize {
        self.iovecs.iter().map(|piece| piece.iov_len).sum()
    }

    /// The pieces that are the segments. `None` if some are not mapped, not aligned as the image wants it, or there are
    /// too many of them.
    pub(super) fn new(view: &View, segments: &[Segment], geometry: &Geometry) -> Option<Self> {
        const MAX_IOVECS: usize = 1024; // UIO_MAXIOV
        let memory: &GuestMemoryMmap<_> = view;
        let address_alignment = usize::try_from(geometry.memory).ok()?;
        let length_alignment = usize::try_from(geometry.piece).ok()?;
        let mut iovecs = Vec::with_capacity(segments.len());
        for segment in segments {
            let address = GuestAddress(segment.address);
            let slices = memory.get_slices(address, segment.length, Permissions::ReadWrite);
            for slice in slices.ok()? {
                let slice = slice.ok()?;
                let iov_base = slice.ptr_guard_mut().as_ptr();
                let iov_len = slice.len();
                let is_aligned = iov_base.addr().is_multiple_of(address_alignment)
                    && iov_len.is_multiple_of(length_alignment);
                if !is_aligned || iovecs.len() >= MAX_IOVECS {
                    return None;
                }
                let iov_base = iov_base.cast();
                iovecs.push(libc::iovec { iov_base, iov_len });
            }
        }
        Some(Self {
            view: view.clone(),
            segments: segments.to_vec(),
            iovecs,
        })
    }

    /// Logs that all of it may have been written, for migration: the kernel has done so past `vm-memory`.
    pub(super) fn mark_written(&self) {
        let memory: &GuestMemoryMmap<_> = &self.view;
        for segment in &self.segments {
            let address = GuestAddress(segment.address);
            let slices = memory.get_slices(address, segment.length, Permissions::Write);
            for slice in slices.into_iter().flatten().flatten() {
                slice.bitmap().mark_dirty(0, slice.len());
            }
        }
    }
}

/// Memory of the disk's own, aligned as every image wants it.
#[derive(Debug)]
pub(super) struct Buffer {
    bytes: Vec<u8>,
    start: usize,
    length: usize,
}

impl Buffer {
    /// So many bytes, all of them 0.
    pub(super) fn new(length: usize) -> Self {
        const ALIGNMENT: usize = 4096;
        let bytes = vec![0_u8; length + ALIGNMENT];
        // It is less than the alignment: bytes can be at any address.
        let start = bytes.as_ptr().align_offset(ALIGNMENT).min(ALIGNMENT);
        Self {
            bytes,
            start,
            length,
        }
    }

    pub(super) fn bytes(&self) -> &[u8] {
        let end = self.start + self.length;
        self.bytes.get(self.start..end).unwrap_or(&[])
    }

    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        let end = self.start + self.length;
        self.bytes.get_mut(self.start..end).unwrap_or(&mut [])
    }
}

/// An entry for an operation with some memory. What it names is in the view or on the heap, and stays where it is.
fn entry(image: Fd, operation: Operation, memory: &mut Memory) -> io::Result<squeue::Entry> {
    let own = |buffer: &mut Buffer| {
        let bytes = buffer.bytes_mut();
        (bytes.as_mut_ptr(), u32::try_from(bytes.len()).unwrap_or(0))
    };
    Ok(match (operation, memory) {
        (Operation::Read(offset), Memory::Guest(GuestPieces { iovecs, .. })) => {
            if let [libc::iovec { iov_base, iov_len }] = **iovecs {
                let length = u32::try_from(iov_len).map_err(io::Error::other)?;
                let read = opcode::Read::new(image, iov_base.cast(), length);
                read.offset(offset).build()
            } else {
                let count = u32::try_from(iovecs.len()).map_err(io::Error::other)?;
                let read = opcode::Readv::new(image, iovecs.as_ptr(), count);
                read.offset(offset).build()
            }
        }
        (Operation::Read(offset), Memory::Own(buffer)) => {
            let (start, length) = own(buffer);
            let read = opcode::Read::new(image, start, length);
            read.offset(offset).build()
        }
        (Operation::Write { offset, durable }, Memory::Guest(GuestPieces { iovecs, .. })) => {
            let count = u32::try_from(iovecs.len()).map_err(io::Error::other)?;
            let write = opcode::Writev::new(image, iovecs.as_ptr(), count);
            write.offset(offset).rw_flags(flags(durable)).build()
        }
        (Operation::Write { offset, durable }, Memory::Own(buffer)) => {
            let (start, length) = own(buffer);
            let write = opcode::Write::new(image, start, length);
            write.offset(offset).rw_flags(flags(durable)).build()
        }
        (Operation::Sync, Memory::None) => opcode::Fsync::new(image)
            .flags(FsyncFlags::DATASYNC)
            .build(),
        (Operation::Punch { offset, length }, Memory::None) => {
            allocate(image, offset, length, libc::FALLOC_FL_PUNCH_HOLE)
        }
        (Operation::Zero { offset, length }, Memory::None) => {
            allocate(image, offset, length, libc::FALLOC_FL_ZERO_RANGE)
        }
        _ => return Err(io::ErrorKind::InvalidInput.into()),
    })
}

fn allocate(image: Fd, offset: u64, length: u64, mode: i32) -> squeue::Entry {
    opcode::Fallocate::new(image, length)
        .offset(offset)
        .mode(mode | libc::FALLOC_FL_KEEP_SIZE)
        .build()
}

/// Flags of a write, as of pwritev2(2).
fn flags(durable: bool) -> i32 {
    if durable { libc::RWF_DSYNC } else { 0 }
}

fn result(result: i32) -> io::Result<u32> {
    u32::try_from(result).map_err(|_| io::Error::from_raw_os_error(result.saturating_neg()))
}

/// Makes a ring in the way that costs least, of those that the kernel has. It can do nothing but what a disk needs: a
/// ring is not asked by seccomp.
fn build(entries: u32) -> io::Result<IoUring> {
    let newest = IoUring::builder()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_taskrun_flag()
        .setup_r_disabled()
        .build(entries);
    let uring = newest.or_else(|_| {
        let mut builder = IoUring::builder();
        builder
            .setup_coop_taskrun()
            .setup_taskrun_flag()
            .setup_r_disabled()
            .build(entries)
    })?;
    let mut restrictions = [
        opcode::Read::CODE,
        opcode::Readv::CODE,
        opcode::Write::CODE,
        opcode::Writev::CODE,
        opcode::Fsync::CODE,
        opcode::Fallocate::CODE,
        opcode::PollAdd::CODE,
        opcode::AsyncCancel::CODE,
    ]
    .map(Restriction::sqe_op);
    let submitter = uring.submitter();
    submitter.register_restrictions(&mut restrictions)?;
    submitter.register_enable_rings()?;
    Ok(uring)
}
