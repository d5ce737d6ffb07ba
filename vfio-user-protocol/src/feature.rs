//! `DEVICE_FEATURE`, and the migration data of `MIG_DATA_READ` and `MIG_DATA_WRITE`.

use bitflags::bitflags;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::{ProtocolError, argsz};

/// Head of the payload of `DEVICE_FEATURE`, in both directions. The feature's data follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Feature {
    /// Command: bytes of reply payload that are wanted. Reply: bytes that there are.
    pub argsz: u32,
    /// The feature in the low 16 bits, and [`FeatureFlags`].
    pub flags: u32,
}

impl Feature {
    /// The head of a command, for a reply payload of up to `argsz` bytes.
    pub fn new(id: FeatureId, flags: FeatureFlags, argsz: u32) -> Self {
        Self {
            argsz,
            flags: id as u32 | flags.bits(),
        }
    }
}

/// The features that the protocol defines, numbered as `VFIO_DEVICE_FEATURE_*` of `linux/vfio.h`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum FeatureId {
    /// How the device can migrate. Get: a `u64` of [`MigrationFlags`].
    Migration = 1,
    /// The state of the device. Get and set: [`MigrationState`].
    MigrationState = 2,
    /// Start to log what the device writes. Set: [`LoggingStart`] and [`LoggingRange`]s.
    DmaLoggingStart = 6,
    /// Stop logging. Set: no data.
    DmaLoggingStop = 7,
    /// Read and clear what was logged. Get: [`LoggingReport`], in the reply with a bitmap.
    DmaLoggingReport = 8,
}

bitflags! {
    /// What to do with a feature (`VFIO_DEVICE_FEATURE_*` of `linux/vfio.h`).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct FeatureFlags: u32 {
        /// Read it.
        const GET = 1 << 16;
        /// Write it.
        const SET = 1 << 17;
        /// Ask whether it can be read or written, as the other flags say.
        const PROBE = 1 << 18;
    }
}

bitflags! {
    /// How a device can migrate (`VFIO_MIGRATION_*` of `linux/vfio.h`).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct MigrationFlags: u64 {
        /// By way of [`DeviceState::StopCopy`].
        const STOP_COPY = 1 << 0;
        /// With states in which it leaves other devices alone.
        const P2P = 1 << 1;
        /// By way of [`DeviceState::PreCopy`].
        const PRE_COPY = 1 << 2;
    }
}

/// Data of [`FeatureId::MigrationState`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct MigrationState {
    /// A [`DeviceState`].
    pub state: u32,
    /// Unused: migration data goes through messages.
    pub data_fd: u32,
}

/// The state of a device that can migrate (`enum vfio_device_mig_state` of `linux/vfio.h`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum DeviceState {
    /// Nothing works but a reset.
    Error = 0,
    /// The device is stopped.
    Stop = 1,
    /// The device runs.
    Running = 2,
    /// The device is stopped and its state can be read.
    StopCopy = 3,
    /// The device is stopped and its state can be written.
    Resuming = 4,
    /// The device runs and leaves other devices alone.
    RunningP2p = 5,
    /// The device runs and its state can be read.
    PreCopy = 6,
    /// The device runs, leaves other devices alone, and its state can be read.
    PreCopyP2p = 7,
}

impl TryFrom<u32> for DeviceState {
    type Error = ProtocolError;

    fn try_from(number: u32) -> Result<Self, ProtocolError> {
        Ok(match number {
            0 => Self::Error,
            1 => Self::Stop,
            2 => Self::Running,
            3 => Self::StopCopy,
            4 => Self::Resuming,
            5 => Self::RunningP2p,
            6 => Self::PreCopy,
            7 => Self::PreCopyP2p,
            _ => return Err(ProtocolError::DeviceState(number)),
        })
    }
}

/// Head of the data of [`FeatureId::DmaLoggingStart`]. [`LoggingRange`]s follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct LoggingStart {
    /// Bytes that a bit of the log stands for. The reply may hold another value.
    pub page_size: u64,
    /// Number of ranges that follow; 0 for all that is mapped.
    pub num_ranges: u32,
    /// Reserved.
    pub reserved: u32,
}

/// A range of addresses to log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct LoggingRange {
    /// First address, as mapped.
    pub iova: u64,
    /// Size in bytes.
    pub length: u64,
}

/// Head of the data of [`FeatureId::DmaLoggingReport`].
///
/// In the reply, a bitmap of 64-bit words follows. Bit `(address - iova) / page_size` is set if that page was written;
/// the formula in the specification is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct LoggingReport {
    /// First address, as mapped.
    pub iova: u64,
    /// Size in bytes.
    pub length: u64,
    /// Bytes that a bit stands for.
    pub page_size: u64,
}

/// Head of the payload of `MIG_DATA_READ`, in both directions, and of `MIG_DATA_WRITE`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct MigrationData {
    /// Size in bytes of this struct and of the data.
    pub argsz: u32,
    /// Size of the data in bytes. In the reply to a read, less than was asked for means that the stream ends here;
    /// libvfio-user pads such a reply to the size that was asked for.
    pub size: u32,
}

impl MigrationData {
    /// The payload, or its head, for `size` bytes of data.
    pub fn new(size: u32) -> Self {
        Self {
            argsz: argsz::<Self>().saturating_add(size),
            size,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn feature_has_the_layout_of_the_specification() {
        let set = Feature::new(FeatureId::MigrationState, FeatureFlags::SET, 16);
        assert_eq!(set.as_bytes(), [16, 0, 0, 0, 2, 0, 2, 0]);
        let probe = FeatureFlags::PROBE | FeatureFlags::GET;
        let probe = Feature::new(FeatureId::DmaLoggingReport, probe, 8);
        assert_eq!(probe.as_bytes(), [8, 0, 0, 0, 8, 0, 5, 0]);
    }

    #[test]
    fn migration_state_has_the_layout_of_the_specification() {
        let state = MigrationState {
            state: DeviceState::StopCopy as u32,
            data_fd: 0,
        };
        assert_eq!(state.as_bytes(), [3, 0, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn every_state_keeps_its_number() {
        for number in 0..8 {
            assert_eq!(DeviceState::try_from(number).unwrap() as u32, number);
        }
        assert!(DeviceState::try_from(8).is_err());
        assert!(DeviceState::try_from(u32::MAX).is_err());
    }

    #[test]
    fn dma_logging_has_the_layout_of_the_specification() {
        let start = LoggingStart {
            page_size: 4096,
            num_ranges: 1,
            reserved: 0,
        };
        assert_eq!(
            start.as_bytes(),
            [0, 0x10, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]
        );
        let range = LoggingRange {
            iova: 0x1000,
            length: 0x2000,
        };
        assert_eq!(
            range.as_bytes(),
            [0, 0x10, 0, 0, 0, 0, 0, 0, 0, 0x20, 0, 0, 0, 0, 0, 0]
        );
        let report = LoggingReport {
            iova: 1,
            length: 2,
            page_size: 3,
        };
        let mut bytes = [0; 24];
        (bytes[0], bytes[8], bytes[16]) = (1, 2, 3);
        assert_eq!(report.as_bytes(), bytes);
    }

    #[test]
    fn migration_data_has_the_layout_of_the_specification() {
        assert_eq!(MigrationData::new(256).as_bytes(), [8, 1, 0, 0, 0, 1, 0, 0]);
    }
}
