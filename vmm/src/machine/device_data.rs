//! The devices' own state, as bytes that nobody but they understand: read out of one and written into another, by the
//! piece.

use std::io;

use devices::{BackendError, DeviceState, Migration, Next, Passthrough, TransitionError};

/// How much is read at once, in bytes.
pub(crate) const PIECE: usize = 1 << 20;

/// Why the state of a device could not be taken out or put back.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DeviceDataError {
    /// It has none that could be.
    #[error("{0} has no migration interface")]
    Unmigratable(String),
    /// It does not give its state, or does not take one.
    #[error("{id} does not {what}")]
    Device {
        /// The device.
        id: String,
        /// What it does not do.
        what: &'static str,
        /// What it says.
        #[source]
        source: BackendError,
    },
    /// It does not say whether that is all.
    #[error("{0} neither gives the rest of its state nor says that there is none")]
    Stalled(String),
    /// It does not begin to give its state away.
    #[error("{id} does not give its state")]
    Begin {
        /// The device.
        id: String,
        /// Why not.
        #[source]
        source: TransitionError,
    },
    /// It does not change its state.
    #[error("{id} does not take the state that was saved")]
    Transition {
        /// The device.
        id: String,
        /// Why not.
        #[source]
        source: TransitionError,
    },
    /// The other side does not take the bytes, or has none.
    #[error("cannot copy the state of {id}")]
    Copy {
        /// The device.
        id: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

fn migration(device: &Passthrough) -> Result<&dyn Migration, DeviceDataError> {
    let migration = device.migration();
    migration.ok_or_else(|| DeviceDataError::Unmigratable(device.id().to_owned()))
}

/// Reads all that a stopped device has, and returns how many bytes that was. How many there are is up to the device: an
/// error of `sink` ends it.
pub(crate) fn read(
    device: &Passthrough,
    sink: impl FnMut(&[u8]) -> io::Result<()>,
) -> Result<u64, DeviceDataError> {
    match read_some(device, u64::MAX, sink)? {
        (total, Next::End) => Ok(total),
        _ => Err(DeviceDataError::Stalled(device.id().to_owned())),
    }
}

/// Reads what a device has for now, but not much more than `limit` bytes of it, and returns how many bytes that was and
/// what comes after them.
pub(crate) fn read_some(
    device: &Passthrough,
    limit: u64,
    mut sink: impl FnMut(&[u8]) -> io::Result<()>,
) -> Result<(u64, Next), DeviceDataError> {
    let id = || device.id().to_owned();
    let migration = migration(device)?;
    let mut piece = vec![0; PIECE];
    let mut total: u64 = 0;
    loop {
        let chunk = migration
            .read(&mut piece)
            .map_err(|source| DeviceDataError::Device {
                id: id(),
                what: "give its state",
                source,
            })?;
        let bytes = piece.get(..chunk.length).unwrap_or_default();
        sink(bytes).map_err(|source| DeviceDataError::Copy { id: id(), source })?;
        total += bytes.len() as u64;
        if chunk.next != Next::More || total >= limit {
            return Ok((total, chunk.next));
        }
    }
}

/// Writes the state that `source` has, piece by piece until it has no more, into a device that runs. The device then
/// stands still, with that state.
pub(crate) fn write(
    device: &Passthrough,
    mut source: impl FnMut(&mut [u8]) -> io::Result<usize>,
) -> Result<(), DeviceDataError> {
    let taking = Taking::begin(device)?;
    let mut piece = vec![0; PIECE];
    loop {
        let length = source(&mut piece).map_err(|source| DeviceDataError::Copy {
            id: device.id().to_owned(),
            source,
        })?;
        let bytes = piece.get(..length).unwrap_or_default();
        if bytes.is_empty() {
            return taking.end();
        }
        taking.write(bytes)?;
    }
}

/// A device that takes the state of another.
#[derive(Debug)]
pub(crate) struct Taking<'d> {
    device: &'d Passthrough,
    migration: &'d dyn Migration,
}

impl<'d> Taking<'d> {
    /// Has a device, which runs, wait for the state of another.
    pub(crate) fn begin(device: &'d Passthrough) -> Result<Self, DeviceDataError> {
        let migration = migration(device)?;
        change_state(device, DeviceState::Resuming)?;
        Ok(Self { device, migration })
    }

    /// Gives it the next piece.
    pub(crate) fn write(&self, piece: &[u8]) -> Result<(), DeviceDataError> {
        let written = self.migration.write(piece);
        written.map_err(|source| DeviceDataError::Device {
            id: self.device.id().to_owned(),
            what: "take the state that was saved",
            source,
        })
    }

    /// That was all. Only now does the device look at all of it. It then stands still, with that state.
    pub(crate) fn end(self) -> Result<(), DeviceDataError> {
        change_state(self.device, DeviceState::Stop)
    }
}

fn change_state(device: &Passthrough, state: DeviceState) -> Result<(), DeviceDataError> {
    device
        .change_state(state)
        .map_err(|source| DeviceDataError::Transition {
            id: device.id().to_owned(),
            source,
        })
}
