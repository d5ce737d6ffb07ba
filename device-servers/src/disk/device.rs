//! The device: its registers, and what becomes of it when it stops, migrates and starts.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Once};

use super::config::{Config, WRITEBACK};
use super::error::DiskError;
use super::job::SERIAL;
use super::service::{DiskService, Shared};
use crate::virtio::{Activation, Identity, VirtQueue, VirtioDevice, Worker};

/// A virtio disk. Its module says what it does.
#[derive(Debug)]
pub struct Disk {
    shared: Arc<Shared>,
    config: Config,
    workers: Vec<Worker>,
    has_warned: Once,
}

/// Type of a block device (virtio 1.2, 5.2.1), and its class: mass storage, SCSI, as other makers of such disks have it.
const IDENTITY: Identity = Identity {
    kind: 2,
    class: 0x01_00_00,
};

/// Version of the state.
const VERSION: u32 = 1;

impl Disk {
    /// Makes the threads of the queues.
    pub(super) fn new(shared: Shared, config: Config) -> Result<Self, DiskError> {
        let shared = Arc::new(shared);
        let worker = |queue| {
            let shared = Arc::clone(&shared);
            let make = move || DiskService::new(shared, config.queue_size);
            Worker::spawn(&format!("disk-{queue}"), make)
        };
        Ok(Self {
            workers: (0..config.queues)
                .map(worker)
                .collect::<Result<_, DiskError>>()?,
            shared,
            config,
            has_warned: Once::new(),
        })
    }

    fn writeback(&self) -> &AtomicBool {
        &self.shared.writeback
    }

    /// What has to be the same on both ends of a migration.
    fn nature(&self) -> Vec<u8> {
        let mut bytes = VERSION.to_le_bytes().to_vec();
        bytes.extend(self.config.size.to_le_bytes());
        bytes.extend(self.config.geometry.block.to_le_bytes());
        bytes.push(self.config.readonly.into());
        let serial: &[u8; SERIAL] = &self.shared.serial;
        bytes.extend(serial);
        bytes
    }
}

impl VirtioDevice for Disk {
    fn identity(&self) -> Identity {
        IDENTITY
    }

    fn features(&self) -> u64 {
        self.config.features()
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![self.config.queue_size; self.config.queues.into()]
    }

    fn config(&self) -> Vec<u8> {
        self.config.bytes(self.writeback().load(Ordering::SeqCst))
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let writeback = match (offset, data) {
            (WRITEBACK, [0]) => false,
            (WRITEBACK, [1]) => true,
            _ => return,
        };
        self.writeback().store(writeback, Ordering::SeqCst);
        if !writeback {
            // What was written before is not to be flushed by the driver any more. If this fails, it has been logged.
            let _ = self.shared.image.sync();
        }
    }

    fn activate(&mut self, activation: Activation) -> io::Result<()> {
        // It is, unless the disk was to wait for a migration, and none came.
        self.lock()?;
        let Activation {
            features,
            queues,
            config,
        } = activation;
        for queue in queues {
            let worker = self.workers.get_mut(usize::from(queue.index()));
            let worker = worker.ok_or(io::ErrorKind::InvalidInput)?;
            let started = worker.start(Activation {
                features,
                queues: vec![queue],
                config: config.clone(),
            });
            if let Err(error) = started {
                self.deactivate();
                return Err(error);
            }
        }
        Ok(())
    }

    fn deactivate(&mut self) -> Vec<VirtQueue> {
        self.workers.iter().for_each(Worker::request_stop);
        self.workers.iter_mut().flat_map(Worker::stop).collect()
    }

    fn reset(&mut self) {
        self.writeback().store(true, Ordering::SeqCst);
    }

    fn stop(&mut self) -> io::Result<()> {
        self.shared.image.sync()
    }

    fn start(&mut self) -> io::Result<()> {
        self.lock()
    }

    fn migrates(&self) -> bool {
        let obstacle = self.shared.image.obstacle();
        if let Some(obstacle) = &obstacle {
            self.has_warned
                .call_once(|| log::warn!("the disk cannot migrate: {obstacle}"));
        }
        obstacle.is_none()
    }

    fn save(&self) -> Vec<u8> {
        let mut state = self.nature();
        state.push(self.writeback().load(Ordering::SeqCst).into());
        state
    }

    fn saved(&mut self) {
        self.shared.image.unlock();
    }

    fn restore(&mut self, state: &[u8]) -> io::Result<()> {
        let (writeback, nature) = state.split_last().ok_or(io::ErrorKind::InvalidData)?;
        if nature != self.nature() || *writeback > 1 {
            log::warn!(
                "the disk that is to be taken over has another size, serial number or block size, or only one of the two \
                 is read-only"
            );
            return Err(io::ErrorKind::InvalidData.into());
        }
        self.writeback().store(*writeback == 1, Ordering::SeqCst);
        Ok(())
    }
}

impl Disk {
    /// Locks the image, if it is not. Until now, somebody else may have written it.
    fn lock(&self) -> io::Result<()> {
        let image = &self.shared.image;
        match image.lock() {
            Ok(was_unlocked) => {
                if was_unlocked {
                    image.drop_caches();
                }
                Ok(())
            }
            Err(error) => {
                log::error!("the disk cannot run: {error}");
                let kind = match error {
                    DiskError::InUse { .. } => io::ErrorKind::ResourceBusy,
                    _ => io::ErrorKind::Other,
                };
                Err(io::Error::new(kind, error))
            }
        }
    }
}
