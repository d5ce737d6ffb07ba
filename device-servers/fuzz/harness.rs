//! What the fuzz target does with its input. An ordinary test does the same with the corpus.

use std::thread;
use std::time::{Duration, Instant};

use vfio_user_client::DeviceState;

use crate::drive::{Disk, Image, OK, USUAL};
use crate::support::{BASE, BUFFERS, EVENT_IDX, INDIRECT, SIZE};

/// A guest with a disk, which it does to whatever it likes.
pub(crate) struct Guest {
    pub(crate) image: Image,
    disk: Disk,
    is_mapped: bool,
    /// How long it waits for the answer to a notification. There may be none.
    patience: Duration,
}

/// Region of configuration space.
const CONFIG: u32 = 7;

/// What a driver of the best kind negotiates, and how long its queue is.
const FEATURES: u64 = USUAL | EVENT_IDX | INDIRECT;
const QUEUE: u16 = 16;

impl Guest {
    pub(crate) fn new(patience: Duration) -> Self {
        let image = Image::new();
        Self {
            disk: Disk::new(&image.options(), FEATURES),
            image,
            is_mapped: true,
            patience,
        }
    }

    /// Does what `bytes` say, one step after the other, and then uses the disk as it should.
    ///
    /// # Panics
    ///
    /// If the disk does not read what is in its image.
    pub(crate) fn act(&mut self, bytes: &[u8]) {
        let mut rest = bytes;
        while let Some(([kind, low, high, size], after)) = rest.split_first_chunk() {
            let offset = u64::from(u16::from_le_bytes([*low, *high]));
            let size = usize::from(*size);
            let (data, after) = after.split_at(match kind % 8 {
                0..=4 => size.min(after.len()),
                _ => 0,
            });
            self.step(kind % 8, offset, size, data);
            rest = after;
        }
        self.is_well();
    }

    /// One step. What the server refuses is nothing to the guest.
    fn step(&mut self, kind: u8, offset: u64, size: usize, data: &[u8]) {
        let client = &self.disk.machine.client;
        let common = self.disk.machine.places.common;
        match kind {
            0 => drop(client.region_write(0, offset, data)),
            1 => drop(client.region_write(0, common + offset % 0x40, data)),
            2 => drop(client.region_write(CONFIG, offset % 0x1000, data)),
            // The first queue, and what its descriptors may be of.
            3 => self.disk.ram().write(BASE + offset, data),
            4 => self.disk.ram().write(BUFFERS + offset, data),
            5 => {
                let mut data = vec![0; size];
                let region = if size.is_multiple_of(2) { 0 } else { CONFIG };
                drop(client.region_read(region, offset, &mut data));
            }
            6 => self.notify(),
            _ => match size % 8 {
                0 => drop(client.reset()),
                1 => drop(client.set_device_state(DeviceState::Stop)),
                2 => drop(client.set_device_state(DeviceState::Running)),
                3 if self.is_mapped => {
                    client.dma_unmap(BASE, SIZE).unwrap();
                    self.is_mapped = false;
                }
                4 if !self.is_mapped => {
                    self.disk.machine.map();
                    self.is_mapped = true;
                }
                5 => self.start(),
                // An access by the register that firmware has for it.
                _ => {
                    let at = self.disk.machine.places.window + 16;
                    drop(client.region_write(CONFIG, at, &offset.to_le_bytes()[..4]));
                }
            },
        }
    }

    /// Notifies the disk, and waits for what comes of that.
    fn notify(&mut self) {
        let ram = self.disk.ram().clone();
        let queue = &mut self.disk.queues[0];
        let index = queue.used() + 2;
        let (before, start) = (ram.read16(index), Instant::now());
        queue.ring();
        while ram.read16(index) == before && start.elapsed() < self.patience {
            thread::yield_now();
        }
    }

    /// Begins anew, as a driver does that finds the device in whatever state.
    fn start(&mut self) {
        let machine = &mut self.disk.machine;
        machine.client.reset().unwrap();
        machine.enable();
        machine.enable_msix();
        self.disk.queues = machine.start(FEATURES, 1, QUEUE);
    }

    fn is_well(&mut self) {
        if !self.is_mapped {
            self.disk.machine.map();
            self.is_mapped = true;
        }
        self.start();
        let (status, data) = self.disk.read(8, 4096);
        assert!(status == OK && data == self.image.read(8, 4096));
    }
}
