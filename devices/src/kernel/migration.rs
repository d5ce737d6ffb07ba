//! Migration of a device of the host.

use std::fs::File;
use std::io::{self, Read, Write};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vfio_user_client::{DeviceState, MigrationFlags};

use super::device::SharedFile;
use super::{KernelError, ioctls};
use crate::backend::BackendError;
use crate::migration::{Chunk, Migration, Next};

/// The migration of one device, which its driver in the kernel knows how to do.
#[derive(Debug)]
pub(super) struct KernelMigration {
    device: SharedFile,
    flags: MigrationFlags,
    session: Mutex<Session>,
}

/// What is under way.
#[derive(Debug, Default)]
struct Session {
    /// The device's data, while it is read or written.
    data: Option<Arc<File>>,
    /// Whether the device runs, so that the end of its data is not the end of all.
    runs: bool,
    /// Whether the device has refused some of what was written. It may run nevertheless, if it is let: mtty of the
    /// kernel's samples does.
    refused: bool,
}

impl KernelMigration {
    /// The device's migration, if it can migrate.
    pub(super) fn new(device: SharedFile) -> Option<Self> {
        let flags = device.with(|file| {
            ioctls::migration_flags(file.as_fd())
                .map_err(KernelError::step("know how the device migrates"))
        });
        let flags = MigrationFlags::from_bits_retain(flags.ok()?);
        flags.contains(MigrationFlags::STOP_COPY).then(|| Self {
            device,
            flags,
            session: Mutex::default(),
        })
    }

    /// The device has been reset or closed, and has no more data.
    pub(super) fn forget(&self) {
        *self.session() = Session::default();
    }

    fn session(&self) -> MutexGuard<'_, Session> {
        self.session.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Calls `with` with the device.
    fn step<R>(
        &self,
        step: &'static str,
        with: impl FnOnce(BorrowedFd<'_>) -> io::Result<R>,
    ) -> Result<R, BackendError> {
        self.device
            .with(|file| with(file.as_fd()).map_err(KernelError::step(step)))
    }

    fn data(&self) -> Result<Arc<File>, KernelError> {
        self.session().data.clone().ok_or(KernelError::NoData)
    }
}

impl Migration for KernelMigration {
    fn flags(&self) -> MigrationFlags {
        self.flags
    }

    fn state(&self) -> Result<DeviceState, BackendError> {
        let number = self.step("tell the device's state", ioctls::device_state)?;
        let state = DeviceState::try_from(number).map_err(|_| KernelError::UnknownState(number))?;
        Ok(state)
    }

    fn set_state(&self, state: DeviceState) -> Result<(), BackendError> {
        if self.session().refused {
            return Err(KernelError::HalfRestored.into());
        }
        let changed = self.step("change the device's state", |device| {
            ioctls::set_device_state(device, state as u32)
        });
        let mut session = self.session();
        match changed {
            Ok(data) => {
                if let Some(data) = data {
                    session.data = Some(Arc::new(data.into()));
                } else if !has_data(state) {
                    session.data = None;
                }
                session.runs = runs(state);
                Ok(())
            }
            Err(error) => {
                // Wherever it is: its data, if it has any, may be incomplete.
                session.data = None;
                Err(error)
            }
        }
    }

    fn read(&self, data: &mut [u8]) -> Result<Chunk, BackendError> {
        let file = self.data()?;
        let end = if self.session().runs {
            Next::Later
        } else {
            Next::End
        };
        loop {
            let (length, next) = match (&*file).read(data) {
                // mtty of the kernel's samples ends while it runs like this, too.
                Ok(0) if !data.is_empty() => (0, end),
                Ok(length) => (length, Next::More),
                Err(error) if error.raw_os_error() == Some(libc::ENOMSG) => (0, Next::Later),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    return Err(KernelError::step("read the device's state")(error).into());
                }
            };
            return Ok(Chunk { length, next });
        }
    }

    fn write(&self, data: &[u8]) -> Result<(), BackendError> {
        let written = (&*self.data()?).write_all(data);
        written.map_err(|error| {
            self.session().refused = true;
            KernelError::step("take the device's state")(error).into()
        })
    }

    fn remaining(&self) -> Option<u64> {
        let stopped = self.step(
            "tell the size of the device's state",
            ioctls::stop_copy_size,
        );
        let running = match &self.session().data {
            Some(data) => ioctls::precopy_info(data.as_fd()).unwrap_or_default(),
            None => [0; 2],
        };
        let stopped = stopped.ok()?;
        Some(running.into_iter().fold(stopped, u64::saturating_add))
    }

    fn start_dirty(&self, page_size: u64, ranges: &[Range<u64>]) -> Result<u64, BackendError> {
        let page_size = self.step("log what the device writes", |device| {
            ioctls::start_dma_logging(device, page_size, ranges)
        })?;
        Ok(page_size)
    }

    fn dirty(&self, range: Range<u64>, page_size: u64) -> Result<Vec<u64>, BackendError> {
        self.step("tell what the device wrote", |device| {
            ioctls::dma_log(device, &range, page_size)
        })
    }

    fn stop_dirty(&self) -> Result<(), BackendError> {
        self.step(
            "stop logging what the device writes",
            ioctls::stop_dma_logging,
        )
    }
}

/// Whether a device in this state has data that is read or written.
fn has_data(state: DeviceState) -> bool {
    matches!(
        state,
        DeviceState::PreCopy
            | DeviceState::PreCopyP2p
            | DeviceState::StopCopy
            | DeviceState::Resuming
    )
}

fn runs(state: DeviceState) -> bool {
    matches!(
        state,
        DeviceState::Running
            | DeviceState::RunningP2p
            | DeviceState::PreCopy
            | DeviceState::PreCopyP2p
    )
}
