//! The devices' own state, as bytes that nobody but they understand: read out of one and written into another, by the
//! piece.

use std::io;

use devices::{BackendError, DeviceState, Migration, Next, Passthrough, TransitionError};

/// How much is read at once, in bytes.
const PIECE: usize = 1 << 20;

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
    mut sink: impl FnMut(&[u8]) -> io::Result<()>,
) -> Result<u64, DeviceDataError> {
    let id = || device.id().to_owned();
    let migration = migration(device)?;
    let mut piece = vec![0; PIECE];
    let mut total = 0;
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
        match chunk.next {
            Next::End => return Ok(total),
            Next::More => {}
            Next::Later => return Err(DeviceDataError::Stalled(id())),
        }
    }
}

/// Writes the state that `source` has, piece by piece until it has no more, into a device that is waiting for it, or else
/// runs. The device then stands still, with that state.
pub(crate) fn write(
    device: &Passthrough,
    mut source: impl FnMut(&mut [u8]) -> io::Result<usize>,
) -> Result<(), DeviceDataError> {
    let id = || device.id().to_owned();
    let migration = migration(device)?;
    change_state(device, DeviceState::Resuming)?;
    let mut piece = vec![0; PIECE];
    loop {
        let length =
            source(&mut piece).map_err(|source| DeviceDataError::Copy { id: id(), source })?;
        let bytes = piece.get(..length).unwrap_or_default();
        if bytes.is_empty() {
            break;
        }
        migration
            .write(bytes)
            .map_err(|source| DeviceDataError::Device {
                id: id(),
                what: "take the state that was saved",
                source,
            })?;
    }
    // Only now does it look at all of it.
    change_state(device, DeviceState::Stop)
}

fn change_state(device: &Passthrough, state: DeviceState) -> Result<(), DeviceDataError> {
    device
        .change_state(state)
        .map_err(|source| DeviceDataError::Transition {
            id: device.id().to_owned(),
            source,
        })
}
