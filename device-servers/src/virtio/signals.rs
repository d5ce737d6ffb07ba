//! What the device tells the driver: interrupts, and that it needs a reset.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use vfio_user_server::{InterruptMode, Interrupts};

use super::layout;

/// "No vector" (virtio 1.2, 4.1.5.1.2: `VIRTIO_MSI_NO_VECTOR`).
pub(super) const NO_VECTOR: u16 = 0xffff;

// Bits of the ISR status (virtio 1.2, 4.1.4.5).
const QUEUE: u8 = 1;
const CONFIG: u8 = 2;

/// What the threads that serve queues share with the registers.
#[derive(Debug)]
pub(super) struct Signals {
    interrupts: Interrupts,
    /// The ISR status. The level of the wired interrupt changes while it is locked, so that the two agree.
    isr: Mutex<u8>,
    config_vector: AtomicU16,
    queue_vectors: Vec<AtomicU16>,
    generation: AtomicU8,
    needs_reset: AtomicBool,
    has_warned: AtomicBool,
}

/// Tells the driver that the device's configuration has changed. It may be used while the device is active.
#[derive(Clone, Debug)]
pub struct ConfigSignal(pub(super) Arc<Signals>);

impl ConfigSignal {
    /// The configuration reads otherwise from now on.
    pub fn changed(&self) {
        self.0.generation.fetch_add(1, Ordering::SeqCst);
        self.0.interrupt(&self.0.config_vector, CONFIG);
    }
}

impl Signals {
    pub(super) fn new(interrupts: Interrupts, queues: u16) -> Self {
        Self {
            interrupts,
            isr: Mutex::new(0),
            config_vector: AtomicU16::new(NO_VECTOR),
            queue_vectors: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            generation: AtomicU8::new(0),
            needs_reset: AtomicBool::new(false),
            has_warned: AtomicBool::new(false),
        }
    }

    /// Tells the driver that buffers of a queue have been used.
    pub(super) fn used(&self, queue: u16) {
        if let Some(vector) = self.queue_vectors.get(usize::from(queue)) {
            self.interrupt(vector, QUEUE);
        }
    }

    /// Says that the device cannot go on until it is reset, and why.
    pub(super) fn need_reset(&self, reason: &dyn std::fmt::Display) {
        // A guest can cause this as often as it likes.
        if self.has_warned.swap(true, Ordering::SeqCst) {
            log::debug!("the device needs a reset: {reason}");
        } else {
            log::warn!("the device needs a reset: {reason}");
        }
        if !self.needs_reset.swap(true, Ordering::SeqCst) {
            self.interrupt(&self.config_vector, CONFIG);
        }
    }

    pub(super) fn needs_reset(&self) -> bool {
        self.needs_reset.load(Ordering::SeqCst)
    }

    pub(super) fn generation(&self) -> u8 {
        self.generation.load(Ordering::SeqCst)
    }

    pub(super) fn config_vector(&self) -> u16 {
        self.config_vector.load(Ordering::SeqCst)
    }

    /// Sets a vector; one that does not exist becomes none, which the driver finds when it reads it back.
    pub(super) fn set_config_vector(&self, vector: u16) {
        let vector = self.existing(vector);
        self.config_vector.store(vector, Ordering::SeqCst);
    }

    pub(super) fn queue_vector(&self, queue: u16) -> u16 {
        let vector = self.queue_vectors.get(usize::from(queue));
        vector.map_or(NO_VECTOR, |vector| vector.load(Ordering::SeqCst))
    }

    /// As [`set_config_vector`](Self::set_config_vector), for a queue.
    pub(super) fn set_queue_vector(&self, queue: u16, vector: u16) {
        let vector = self.existing(vector);
        if let Some(place) = self.queue_vectors.get(usize::from(queue)) {
            place.store(vector, Ordering::SeqCst);
        }
    }

    /// Reads the ISR status, which clears it and lowers the wired interrupt.
    pub(super) fn take_isr(&self) -> u8 {
        let mut isr = self.isr.lock().unwrap_or_else(PoisonError::into_inner);
        self.interrupts.set_intx(false);
        std::mem::take(&mut *isr)
    }

    /// The ISR status, for migration.
    pub(super) fn isr(&self) -> u8 {
        *self.isr.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn reset(&self) {
        self.take_isr();
        self.set_config_vector(NO_VECTOR);
        for vector in &self.queue_vectors {
            vector.store(NO_VECTOR, Ordering::SeqCst);
        }
        self.needs_reset.store(false, Ordering::SeqCst);
    }

    /// Takes over what another device had. The library has restored the level of the wired interrupt.
    pub(super) fn restore(&self, isr: u8, generation: u8, needs_reset: bool) {
        *self.isr.lock().unwrap_or_else(PoisonError::into_inner) = isr & (QUEUE | CONFIG);
        self.generation.store(generation, Ordering::SeqCst);
        self.needs_reset.store(needs_reset, Ordering::SeqCst);
    }

    fn interrupt(&self, vector: &AtomicU16, bit: u8) {
        if self.interrupts.mode() == InterruptMode::Msix {
            let vector = vector.load(Ordering::SeqCst);
            if vector != NO_VECTOR {
                self.interrupts.trigger(vector);
            }
            return;
        }
        let mut isr = self.isr.lock().unwrap_or_else(PoisonError::into_inner);
        *isr |= bit;
        self.interrupts.set_intx(true);
    }

    fn existing(&self, vector: u16) -> u16 {
        let queues = u16::try_from(self.queue_vectors.len()).unwrap_or(0);
        if vector < layout::vectors(queues) {
            vector
        } else {
            NO_VECTOR
        }
    }
}
