//! A queue, as the thread that serves it has it.

use std::fmt::Display;
use std::num::Wrapping;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use vfio_user_server::{DoorbellEvent, Memory, PageLog, View};
use virtio_bindings::bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{DescriptorChain, Error, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::guest::Guest;
use super::signals::Signals;

/// A chain of descriptors: a buffer, as the driver has made it available.
///
/// It has at most as many descriptors as its table, and may be cut off where it is not valid.
pub type Chain<'a> = DescriptorChain<&'a GuestMemoryMmap<PageLog>>;

/// A split virtqueue (virtio 1.2, 2.7) that the driver has enabled.
#[derive(Debug)]
pub struct VirtQueue {
    index: u16,
    queue: Queue,
    memory: Memory,
    doorbell: DoorbellEvent,
    signals: Arc<Signals>,
    /// Where the used ring was when it was last decided about an interrupt.
    told: u16,
    is_broken: bool,
    /// Whether something has been pushed that the driver may have to be interrupted for.
    has_pushed: bool,
}

impl VirtQueue {
    pub(super) fn new(
        index: u16,
        queue: Queue,
        memory: Memory,
        doorbell: DoorbellEvent,
        signals: Arc<Signals>,
    ) -> Self {
        Self {
            index,
            told: queue.next_used(),
            queue,
            memory,
            doorbell,
            signals,
            is_broken: false,
            has_pushed: false,
        }
    }

    /// Its number.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// How many entries it has: most buffers that can have been popped and not pushed.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// What is readable when the driver has notified the device.
    pub fn doorbell(&self) -> &DoorbellEvent {
        &self.doorbell
    }

    /// Guest memory as it is now.
    pub fn guest(&self) -> Guest {
        Guest::new(&self.memory)
    }

    /// Takes the next buffer that the driver has made available, if there is one.
    pub fn pop<'a>(&mut self, view: &'a View) -> Option<Chain<'a>> {
        if self.is_broken {
            return None;
        }
        match self.try_pop(view) {
            Ok(chain) => chain,
            Err(error) => {
                self.fail(&error);
                None
            }
        }
    }

    /// Whether there is a buffer to be taken. It may still fail to be.
    pub fn has_more(&mut self, view: &View) -> bool {
        if self.is_broken {
            return false;
        }
        let result = self.has_available(view);
        result.unwrap_or_else(|error| {
            self.fail(&error);
            false
        })
    }

    /// Puts the last `count` buffers that were popped back, to be popped again. None of them has been pushed.
    pub fn unpop(&mut self, count: u16) {
        let next = self.queue.next_avail().wrapping_sub(count);
        self.queue.set_next_avail(next);
    }

    /// Returns a buffer, of which the first `written` bytes of what can be written have been.
    pub fn push(&mut self, view: &View, head: u16, written: u32) {
        if self.is_broken {
            return;
        }
        self.has_pushed = true;
        if let Err(error) = self.queue.add_used(&**view, head, written) {
            self.fail(&error);
        }
    }

    /// Returns several buffers at once, each as [`push`](Self::push) does: the driver sees all of them or none.
    pub fn push_together(&mut self, view: &View, used: impl Iterator<Item = (u16, u32)>) {
        if self.is_broken {
            return;
        }
        self.has_pushed = true;
        if let Err(error) = self.try_push(view, used) {
            self.fail(&error);
        }
    }

    /// Interrupts the driver for what has been pushed since the last time, if it wants that.
    pub fn interrupt(&mut self, view: &View) {
        if self.is_broken || !std::mem::take(&mut self.has_pushed) {
            return;
        }
        match self.wants_interrupt(view) {
            Ok(true) => self.signals.used(self.index),
            Ok(false) => {}
            Err(error) => self.fail(&error),
        }
    }

    /// Tells the driver that it need not notify.
    pub fn disable_notifications(&mut self, view: &View) {
        if !self.is_broken
            && let Err(error) = self.queue.disable_notification(&**view)
        {
            self.fail(&error);
        }
    }

    /// Tells the driver to notify. Returns whether there are buffers already, which it may not have notified of.
    pub fn enable_notifications(&mut self, view: &View) -> bool {
        if self.is_broken {
            return false;
        }
        let result = self.queue.enable_notification(&**view);
        result.unwrap_or_else(|error| {
            self.fail(&error);
            false
        })
    }

    /// Says that the device cannot serve the queue, and why. It is not usable until the device is reset.
    pub fn give_up(&mut self, reason: &dyn Display) {
        self.is_broken = true;
        let index = self.index;
        self.signals
            .need_reset(&format_args!("queue {index} is not usable: {reason}"));
    }

    /// Where the next buffers are in the available ring and in the used ring.
    pub(super) fn position(&self) -> (u16, u16) {
        (self.queue.next_avail(), self.queue.next_used())
    }

    /// Something went wrong. What is not in memory now may be there later: the client may have to map it yet, or the guest
    /// has to make the device bus master. All else cannot be put right.
    fn fail(&mut self, error: &Error) {
        match error {
            Error::GuestMemory(error) => log::debug!("queue {}: {error}", self.index),
            error => self.give_up(error),
        }
    }

    fn has_available(&self, view: &View) -> Result<bool, Error> {
        let available = self.queue.avail_idx(&**view, Ordering::Acquire)?;
        Ok(available != Wrapping(self.queue.next_avail()))
    }

    fn try_pop<'a>(&mut self, view: &'a View) -> Result<Option<Chain<'a>>, Error> {
        if !self.has_available(view)? {
            return Ok(None);
        }
        let memory: &GuestMemoryMmap<PageLog> = view;
        let chain = self.queue.iter(memory)?.next();
        // The ring says that there is one.
        let chain = chain.ok_or(Error::InvalidAvailRingIndex)?;
        if chain.head_index() >= self.queue.size() {
            return Err(Error::InvalidDescriptorIndex);
        }
        Ok(Some(chain))
    }

    /// The library writes the index of the used ring with each buffer.
    fn try_push(
        &mut self,
        view: &View,
        used: impl Iterator<Item = (u16, u32)>,
    ) -> Result<(), Error> {
        let mut next = self.queue.next_used();
        for (head, written) in used {
            let place = 4 + 8 * u64::from(next % self.queue.size());
            let place = in_ring(self.queue.used_ring(), place)?;
            let element = u64::from(head) | u64::from(written) << 32;
            view.write_obj(element.to_le(), place)
                .map_err(Error::GuestMemory)?;
            next = next.wrapping_add(1);
        }
        self.queue.set_next_used(next);
        let place = in_ring(self.queue.used_ring(), 2)?;
        view.store(next.to_le(), place, Ordering::Release)
            .map_err(Error::GuestMemory)
    }

    /// The library does not look at the flag of drivers without event index, and counts only what it has pushed itself.
    fn wants_interrupt(&mut self, view: &View) -> Result<bool, Error> {
        let next = self.queue.next_used();
        let pushed = next.wrapping_sub(std::mem::replace(&mut self.told, next));
        if pushed == 0 {
            return Ok(false);
        }
        // What has been pushed is seen before what the driver then says.
        fence(Ordering::SeqCst);
        let load = |offset| -> Result<u16, Error> {
            let place = in_ring(self.queue.avail_ring(), offset)?;
            let value = view.load(place, Ordering::Relaxed);
            value.map(u16::from_le).map_err(Error::GuestMemory)
        };
        if self.queue.event_idx_enabled() {
            // Whether `used_event` is among what has been pushed (virtio 1.2, 2.7.7.1).
            let event = load(4 + 2 * u64::from(self.queue.size()))?;
            return Ok(next.wrapping_sub(event).wrapping_sub(1) < pushed);
        }
        Ok(u32::from(load(0)?) & VRING_AVAIL_F_NO_INTERRUPT == 0)
    }
}

/// A place in a ring, by its offset in bytes (virtio 1.2, 2.7.6 and 2.7.8).
fn in_ring(ring: u64, offset: u64) -> Result<GuestAddress, Error> {
    let place = ring.checked_add(offset).ok_or(Error::AddressOverflow)?;
    Ok(GuestAddress(place))
}
