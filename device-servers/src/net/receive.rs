//! What comes from the tap.

use std::collections::VecDeque;
use std::io::{self, ErrorKind};

use super::config::{HEADER, MAX_PACKET, NUM_BUFFERS};
use super::packet::{self, MAX_SLICES};
use super::pair::{BATCH, Wait};
use super::tap::Tap;
use crate::virtio::VirtQueue;
use crate::virtio::guest::{self, Guest, GuestSlice, Segment};

/// Gives packets to the driver.
///
/// A packet is read straight into the driver's buffers. As nobody knows before how long it is, there are as many as those
/// before it have been long lately. If it is longer, or buffers are not mapped, or there are none, then it is put together
/// in a buffer of the server's own, and kept there until there is room for it. Until then nothing is read from the tap,
/// which does the dropping.
#[derive(Debug)]
pub(super) struct Receiver {
    own: Box<[u8]>,
    /// How long the packet in `own` is. 0: there is none.
    held: usize,
    /// How long a packet is expected to be.
    expected: usize,
    /// Whether a packet may be in several buffers.
    mergeable: bool,
    rhythm: Rhythm,
}

/// How long a packet is always expected to be: one that is not merged by anybody.
const USUAL: usize = 1526;

impl Receiver {
    pub(super) fn new() -> Self {
        Self {
            own: vec![0; MAX_PACKET].into(),
            held: 0,
            expected: USUAL,
            mergeable: false,
            rhythm: Rhythm::default(),
        }
    }

    /// Begins anew, for a driver that takes packets in several buffers or not.
    pub(super) fn begin(&mut self, mergeable: bool) {
        self.held = 0;
        self.expected = USUAL;
        self.mergeable = mergeable;
    }

    /// Gives a batch of packets to the driver, and says what to wait for.
    pub(super) fn receive(&mut self, queue: &mut VirtQueue, tap: &Tap) -> Wait {
        let guest = queue.guest();
        queue.disable_notifications(&guest.view);
        let mut pool = Pool::new(self.mergeable);
        let most = self.rhythm.most();
        // If only one is read, the wait tells whether there are more.
        let mut wait = if most == 1 { Wait::Tap } else { Wait::No };
        let mut count = 0;
        for _ in 0..most {
            let result = if self.held == 0 {
                self.read(&mut pool, queue, &guest, tap)
            } else {
                Ok(())
            };
            if let Err(error) = result {
                wait = wait_after(&error);
                break;
            }
            if self.held > 0 && !self.place(&mut pool, queue, &guest) {
                wait = Wait::Driver;
                break;
            }
            count += 1;
        }
        self.rhythm.came(count);
        queue.unpop(pool.len());
        queue.interrupt(&guest.view);
        wait
    }

    /// Reads a packet, into the driver's buffers if there are enough.
    fn read<'v>(
        &mut self,
        pool: &mut Pool<'v>,
        queue: &mut VirtQueue,
        guest: &'v Guest,
        tap: &Tap,
    ) -> io::Result<()> {
        pool.fill(queue, guest, self.expected);
        let mapped: usize = pool.slices().map(GuestSlice::len).sum();
        let rest = self.own.get_mut(mapped..).unwrap_or(&mut []);
        let length = packet::read(tap, pool.slices(), rest)?;
        if length == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        self.expected = length.max(self.expected - self.expected / 8).max(USUAL);
        if length < HEADER {
            return Ok(());
        }
        if length > mapped {
            pool.copy_to(&mut self.own);
            self.held = length.min(self.own.len());
            return Ok(());
        }
        let used = pool.take(length);
        write_at(&used, NUM_BUFFERS, &count(&used));
        finish(&used, queue, guest);
        Ok(())
    }

    /// Copies the packet that is kept to the driver's buffers. Returns whether it is not kept any more.
    fn place<'v>(&mut self, pool: &mut Pool<'v>, queue: &mut VirtQueue, guest: &'v Guest) -> bool {
        loop {
            pool.fill(queue, guest, self.held);
            if pool.capacity >= self.held {
                break;
            }
            if pool.is_full(queue) {
                log::debug!("a packet is dropped, for which the driver has no room");
                self.held = 0;
                return true;
            }
            // There is nothing left to be popped, so the driver notifies of what comes.
            if !queue.enable_notifications(&guest.view) {
                return false;
            }
        }
        let used = pool.take(self.held);
        let packet = self.own.get_mut(..self.held).unwrap_or(&mut []);
        if let Some(place) = packet
            .get_mut(NUM_BUFFERS..)
            .and_then(<[u8]>::first_chunk_mut)
        {
            *place = count(&used);
        }
        if !guest.scatter(used.iter().flat_map(|used| &used.buffer.segments), packet) {
            log::debug!("a part of a packet is lost: the driver's buffer is not in memory");
        }
        finish(&used, queue, guest);
        self.held = 0;
        true
    }
}

/// Whether packets come alone or several at a time.
///
/// To read until there are no more takes one system call in vain each time. For packets that come alone, as answers do,
/// that would be every other one.
#[derive(Debug, Default)]
struct Rhythm {
    /// How often in a row a packet was alone.
    alone: u32,
}

impl Rhythm {
    /// How many packets to read before the next wait.
    fn most(&self) -> usize {
        // How often a packet has to be alone, and how often it is looked whether that is still so.
        const USUALLY: u32 = 4;
        const SOMETIMES: u32 = 8;
        if self.alone < USUALLY || self.alone.is_multiple_of(SOMETIMES) {
            BATCH
        } else {
            1
        }
    }

    /// So many came since the last wait.
    fn came(&mut self, count: usize) {
        match count {
            0 => {}
            1 => self.alone = self.alone.wrapping_add(1),
            _ => self.alone = 0,
        }
    }
}

/// What to wait for after an error of the tap.
fn wait_after(error: &io::Error) -> Wait {
    match error.raw_os_error() {
        Some(libc::EAGAIN) => Wait::Tap,
        // Also if guest memory is not there any more: the packet is lost, and others follow.
        Some(libc::EINTR | libc::EFAULT) => Wait::No,
        _ => {
            log::debug!("nothing can be read from the tap: {error}");
            Wait::Change
        }
    }
}

/// The driver's buffers that have been popped, in order, and not used.
struct Pool<'v> {
    buffers: VecDeque<Buffer<'v>>,
    /// Bytes in all of them.
    capacity: usize,
    mergeable: bool,
}

struct Buffer<'v> {
    head: u16,
    segments: Vec<Segment>,
    /// Where they are in this process, if all of them are mapped.
    slices: Option<Vec<GuestSlice<'v>>>,
    capacity: usize,
}

/// A buffer of which so many bytes are a packet's.
struct Used<'v> {
    buffer: Buffer<'v>,
    written: usize,
}

impl<'v> Pool<'v> {
    fn new(mergeable: bool) -> Self {
        Self {
            buffers: VecDeque::new(),
            capacity: 0,
            mergeable,
        }
    }

    fn len(&self) -> u16 {
        u16::try_from(self.buffers.len()).unwrap_or(u16::MAX)
    }

    /// Whether the driver cannot give any more buffers for one packet.
    fn is_full(&self, queue: &VirtQueue) -> bool {
        let most = if self.mergeable { queue.size() } else { 1 };
        self.len() >= most
    }

    /// Pops buffers until they have so many bytes, if there are as many.
    fn fill(&mut self, queue: &mut VirtQueue, guest: &'v Guest, wanted: usize) {
        while self.capacity < wanted && !self.is_full(queue) {
            let Some(chain) = queue.pop(&guest.view) else {
                return;
            };
            let head = chain.head_index();
            let segments = guest::segments(chain, true);
            let capacity = guest::length(&segments);
            self.capacity += capacity;
            self.buffers.push_back(Buffer {
                head,
                slices: guest.slices(&segments),
                segments,
                capacity,
            });
        }
    }

    /// What can be read into: the first buffers, as far as they are mapped and not too many pieces.
    fn slices(&self) -> impl Iterator<Item = &GuestSlice<'v>> + Clone {
        let mapped = self
            .buffers
            .iter()
            .map_while(|buffer| buffer.slices.as_ref());
        mapped.flatten().take(MAX_SLICES)
    }

    /// Copies what can be read into.
    fn copy_to(&self, bytes: &mut [u8]) {
        let mut at = 0;
        for slice in self.slices() {
            let Some(place) = bytes.get_mut(at..) else {
                return;
            };
            at += slice.copy_to(place);
        }
    }

    /// Takes the buffers that a packet of this length is in.
    fn take(&mut self, length: usize) -> Vec<Used<'v>> {
        let mut used = Vec::new();
        let mut rest = length;
        while rest > 0
            && let Some(buffer) = self.buffers.pop_front()
        {
            let written = buffer.capacity.min(rest);
            rest -= written;
            self.capacity -= buffer.capacity;
            used.push(Used { buffer, written });
        }
        used
    }
}

/// `num_buffers` of a packet's header.
fn count(used: &[Used<'_>]) -> [u8; 2] {
    u16::try_from(used.len()).unwrap_or(u16::MAX).to_le_bytes()
}

/// Writes something at an offset in mapped buffers.
fn write_at(used: &[Used<'_>], offset: usize, bytes: &[u8]) {
    let slices = used.iter().flat_map(|used| &used.buffer.slices).flatten();
    let (mut offset, mut rest) = (offset, bytes);
    for slice in slices {
        let Ok(place) = slice.offset(offset) else {
            offset -= slice.len();
            continue;
        };
        let (now, later) = rest.split_at(place.len().min(rest.len()));
        place.copy_from(now);
        if later.is_empty() {
            return;
        }
        (offset, rest) = (0, later);
    }
}

/// Returns buffers to the driver, which sees all of a packet or nothing.
fn finish(used: &[Used<'_>], queue: &mut VirtQueue, guest: &Guest) {
    let written = used.iter().map(|used| {
        let written = u32::try_from(used.written).unwrap_or(u32::MAX);
        (used.buffer.head, written)
    });
    queue.push_together(&guest.view, written);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_is_read_in_batches_and_packets_alone_are_not_asked_for_more() {
        let mut rhythm = Rhythm::default();
        // The system calls that it takes to read so many packets one after the other: a wait, and reads with one in vain.
        let calls = |rhythm: &mut Rhythm, packets: u32| -> u32 {
            let call = |_| {
                let calls = if rhythm.most() == 1 { 2 } else { 3 };
                rhythm.came(1);
                calls
            };
            (0..packets).map(call).sum()
        };
        assert!(calls(&mut rhythm, 800) < 800 * 9 / 4);
        // A stream is noticed soon.
        let noticed = (0..8).find(|_| {
            let most = rhythm.most();
            rhythm.came(most.min(20));
            most == BATCH
        });
        assert!(noticed.is_some());
        assert_eq!(rhythm.most(), BATCH);
        // Nothing says nothing.
        rhythm.came(0);
        assert_eq!(rhythm.most(), BATCH);
    }
}
