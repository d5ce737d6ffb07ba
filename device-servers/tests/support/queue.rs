//! A split queue, as its driver has it.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::{BASE, EVENT_IDX, Machine, Ram, wait_for};

// Flags of descriptors.
pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT_TABLE: u16 = 4;

/// A split queue (virtio 1.2, 2.7).
pub(crate) struct Queue {
    pub(crate) index: u16,
    pub(crate) size: u16,
    /// Where it is: descriptors, and the rings behind them.
    pub(crate) area: u64,
    event_idx: bool,
    ram: Ram,
    pub(crate) doorbell: Arc<OwnedFd>,
    pub(crate) vector: Option<Arc<OwnedFd>>,
    free: Vec<u16>,
    chains: Vec<Vec<u16>>,
    next_available: u16,
    last_kick: u16,
    last_used: u16,
    /// How often the doorbell was rung, and how often there was an interrupt.
    pub(crate) kicks: u64,
    pub(crate) interrupts: u64,
}

impl Queue {
    pub(super) fn new(machine: &Machine, index: u16, size: u16, features: u64) -> Self {
        Self {
            index,
            size,
            area: BASE + u64::from(index) * 0x1_0000,
            event_idx: features & EVENT_IDX != 0,
            ram: machine.ram.clone(),
            doorbell: machine.doorbell(index),
            vector: machine.vectors.get(usize::from(index) + 1).cloned(),
            free: (0..size).rev().collect(),
            chains: vec![Vec::new(); size.into()],
            next_available: 0,
            last_kick: 0,
            last_used: 0,
            kicks: 0,
            interrupts: 0,
        }
    }

    pub(crate) fn available(&self) -> u64 {
        self.area + 0x8000
    }

    pub(crate) fn used(&self) -> u64 {
        self.area + 0xa000
    }

    /// Goes on with another device that has taken over this one's state.
    pub(crate) fn move_to(&mut self, machine: &Machine) {
        self.doorbell = machine.doorbell(self.index);
        self.vector = machine.vectors.get(usize::from(self.index) + 1).cloned();
    }

    pub(crate) fn set_descriptor(&self, at: u64, (address, length, flags, next): RawDescriptor) {
        let bytes = descriptor((address, length, flags, next));
        self.ram.write(at, &bytes);
    }

    /// Adds a chain of buffers: address, length, and whether the device writes it. `None` if there is no room.
    pub(crate) fn try_add(&mut self, buffers: &[(u64, u32, bool)]) -> Option<u16> {
        if self.free.len() < buffers.len() {
            return None;
        }
        let chain: Vec<_> = buffers.iter().map(|_| self.free.pop().unwrap()).collect();
        for (at, (address, length, write)) in buffers.iter().enumerate() {
            let next = chain.get(at + 1);
            let flags = (u16::from(*write) * WRITE) | (u16::from(next.is_some()) * NEXT);
            let next = next.copied().unwrap_or(0);
            let place = self.area + 16 * u64::from(chain[at]);
            self.set_descriptor(place, (*address, *length, flags, next));
        }
        let head = chain[0];
        self.chains[usize::from(head)] = chain;
        self.offer(head);
        Some(head)
    }

    pub(crate) fn add(&mut self, buffers: &[(u64, u32, bool)]) -> u16 {
        self.try_add(buffers).unwrap()
    }

    /// Adds a chain by a table of its own.
    pub(crate) fn add_indirect(&mut self, table: u64, buffers: &[(u64, u32, bool)]) -> u16 {
        for (at, (address, length, write)) in (0_u16..).zip(buffers) {
            let is_last = usize::from(at) + 1 == buffers.len();
            let flags = (u16::from(*write) * WRITE) | (u16::from(!is_last) * NEXT);
            let place = table + 16 * u64::from(at);
            self.set_descriptor(place, (*address, *length, flags, at + 1));
        }
        let head = self.free.pop().unwrap();
        let length = 16 * u32::try_from(buffers.len()).unwrap();
        let place = self.area + 16 * u64::from(head);
        self.set_descriptor(place, (table, length, INDIRECT_TABLE, 0));
        self.chains[usize::from(head)] = vec![head];
        self.offer(head);
        head
    }

    /// Makes a head available, whatever there is at it.
    pub(crate) fn offer(&mut self, head: u16) {
        let slot = u64::from(self.next_available % self.size);
        let place = self.available() + 4 + 2 * slot;
        self.ram.write(place, &head.to_le_bytes());
        self.next_available = self.next_available.wrapping_add(1);
        self.ram
            .write(self.available() + 2, &self.next_available.to_le_bytes());
    }

    /// Notifies the device, unless it has said that it need not be.
    pub(crate) fn kick(&mut self) {
        let (new, old) = (self.next_available, self.last_kick);
        self.last_kick = new;
        let wanted = if self.event_idx {
            let event = self.ram.read16(self.used() + 4 + 8 * u64::from(self.size));
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            self.ram.read16(self.used()) & 1 == 0
        };
        if wanted {
            self.ring();
        }
    }

    pub(crate) fn ring(&mut self) {
        self.kicks += 1;
        rustix::io::write(&self.doorbell, &1_u64.to_ne_bytes()).unwrap();
    }

    /// A chain that the device has used, if there is one: its head, and how much was written.
    pub(crate) fn pop(&mut self) -> Option<(u16, u32)> {
        if self.ram.read16(self.used() + 2) == self.last_used {
            return None;
        }
        let place = self.used() + 4 + 8 * u64::from(self.last_used % self.size);
        let (head, written) = (self.ram.read32(place), self.ram.read32(place + 4));
        self.last_used = self.last_used.wrapping_add(1);
        let head = u16::try_from(head).unwrap();
        let chain = std::mem::take(&mut self.chains[usize::from(head)]);
        self.free.extend(chain);
        Some((head, written))
    }

    /// The next chain that the device uses. It sleeps until the device interrupts, as a driver does.
    pub(crate) fn wait(&mut self) -> (u16, u32) {
        loop {
            if self.event_idx {
                let place = self.available() + 4 + 2 * u64::from(self.size);
                self.ram.write(place, &self.last_used.to_le_bytes());
            }
            if let Some(used) = self.pop() {
                return used;
            }
            let vector = self.vector.clone().unwrap();
            let count = wait_for(&vector);
            assert!(count > 0, "no interrupt came");
            self.interrupts += count;
        }
    }

    /// How many chains are under way.
    pub(crate) fn in_flight(&self) -> u16 {
        self.next_available.wrapping_sub(self.last_used)
    }
}

/// Address, length, flags and next of a descriptor.
pub(crate) type RawDescriptor = (u64, u32, u16, u16);

pub(crate) fn descriptor((address, length, flags, next): RawDescriptor) -> Vec<u8> {
    let mut bytes = address.to_le_bytes().to_vec();
    bytes.extend(length.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes.extend(next.to_le_bytes());
    bytes
}
