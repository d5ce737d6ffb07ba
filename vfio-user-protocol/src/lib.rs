//! The vfio-user protocol: every message once, as plain structs, and the negotiation of versions and limits.
//!
//! This crate knows what a message looks like and what its fields may hold. It knows nothing of sockets, of threads, or
//! of who sends what: the client and the server both build on it. Field layouts follow the vfio-user specification
//! (QEMU's `docs/interop/vfio-user.rst`, document version 0.9.2); where libvfio-user differs, both readings are taken
//! and the item says so.
//!
//! A message is a [`Header`] and a payload. A payload begins with the struct of its command, in the host's byte order,
//! and may go on with data. [`take`] reads such a struct from the head of bytes that a peer sent; every parser here
//! treats its input as hostile: nothing panics, loops, or allocates more than the input's own length.

#![forbid(unsafe_code)]
#![warn(clippy::indexing_slicing)]

mod device;
mod dma;
mod error;
mod feature;
mod header;
mod irq;
mod region;
mod region_io_fds;
mod version;

pub use device::{DeviceFlags, DeviceInfo};
pub use dma::{DirtyBitmap, DmaAccess, DmaMap, DmaMapFlags, DmaUnmap, DmaUnmapFlags};
pub use error::ProtocolError;
pub use feature::{
    DeviceState, Feature, FeatureFlags, FeatureId, LoggingRange, LoggingReport, LoggingStart,
    MigrationData, MigrationFlags, MigrationState,
};
pub use header::{Command, Header, MessageFlags};
pub use irq::{IrqFlags, IrqInfo, IrqSet, IrqSetFlags};
pub use region::{
    RegionAccess, RegionFlags, RegionInfo, RegionWrites, SparseArea, WriteMulti,
    encode_sparse_areas, sparse_areas,
};
pub use region_io_fds::{IoFd, IoFdFlags, RegionIoFds, encode_io_fds, io_fds};
pub use version::{Capabilities, Limits, TwinSocket, Version};

use zerocopy::FromBytes;

/// Splits `payload` into the struct at its head and the bytes that follow.
///
/// # Errors
///
/// [`ProtocolError::Short`] if `payload` is shorter than `T`.
pub fn take<T: FromBytes>(payload: &[u8]) -> Result<(T, &[u8]), ProtocolError> {
    T::read_from_prefix(payload).map_err(|_| ProtocolError::Short {
        need: size_of::<T>(),
        have: payload.len(),
    })
}

/// The size of `T` as an `argsz` field holds it, in bytes.
#[expect(
    clippy::cast_possible_truncation,
    reason = "no struct here is larger than 48 bytes"
)]
const fn argsz<T>() -> u32 {
    size_of::<T>() as u32
}
