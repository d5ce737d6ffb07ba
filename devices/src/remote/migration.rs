//! Migration of a device behind a vfio-user connection.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vfio_user_client::{Client, ConnError, DeviceState, LoggingRange, MigrationFlags};

use crate::backend::BackendError;
use crate::migration::{Chunk, Migration, Next};

/// The migration of one device. Chunks of any size go to and from the server in messages that it takes.
#[derive(Debug)]
pub(super) struct RemoteMigration {
    client: Arc<Client>,
    flags: MigrationFlags,
    /// Whether the device runs, so that the end of its data is not the end of all.
    runs: AtomicBool,
}

impl RemoteMigration {
    /// The device's migration, if it can migrate. It runs.
    pub(super) fn ask(client: &Arc<Client>) -> Result<Option<Self>, ConnError> {
        let flags = match client.migration_flags() {
            Ok(flags) => flags,
            Err(ConnError::Refused { .. }) => return Ok(None),
            Err(error) => return Err(error),
        };
        Ok(Self::new(client, flags))
    }

    /// The migration of a device that has said how it can migrate, if it can.
    pub(super) fn new(client: &Arc<Client>, flags: MigrationFlags) -> Option<Self> {
        let can_migrate = flags.contains(MigrationFlags::STOP_COPY);
        can_migrate.then(|| Self {
            client: Arc::clone(client),
            flags,
            runs: AtomicBool::new(true),
        })
    }
}

impl Migration for RemoteMigration {
    /// The protocol does not use the states in which a device leaves others alone.
    fn flags(&self) -> MigrationFlags {
        self.flags - MigrationFlags::P2P
    }

    fn state(&self) -> Result<DeviceState, BackendError> {
        Ok(self.client.device_state()?)
    }

    fn set_state(&self, state: DeviceState) -> Result<(), BackendError> {
        self.client.set_device_state(state)?;
        let runs = matches!(state, DeviceState::Running | DeviceState::PreCopy);
        self.runs.store(runs, Ordering::Relaxed);
        Ok(())
    }

    fn read(&self, data: &mut [u8]) -> Result<Chunk, BackendError> {
        let length = self.client.migration_read(data)?;
        let next = if length == data.len() {
            Next::More
        } else if self.runs.load(Ordering::Relaxed) {
            Next::Later
        } else {
            Next::End
        };
        Ok(Chunk { length, next })
    }

    fn write(&self, data: &[u8]) -> Result<(), BackendError> {
        Ok(self.client.migration_write(data)?)
    }

    fn remaining(&self) -> Option<u64> {
        None
    }

    fn start_dirty(&self, page_size: u64, ranges: &[Range<u64>]) -> Result<u64, BackendError> {
        let range = |range: &Range<u64>| LoggingRange {
            iova: range.start,
            length: range.end.saturating_sub(range.start),
        };
        let ranges: Vec<_> = ranges.iter().map(range).collect();
        Ok(self.client.start_dma_logging(page_size, &ranges)?)
    }

    fn dirty(&self, range: Range<u64>, page_size: u64) -> Result<Vec<u64>, BackendError> {
        let length = range.end.saturating_sub(range.start);
        Ok(self.client.dma_log(range.start, length, page_size)?)
    }

    fn stop_dirty(&self) -> Result<(), BackendError> {
        Ok(self.client.stop_dma_logging()?)
    }
}
