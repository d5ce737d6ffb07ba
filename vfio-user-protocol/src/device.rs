//! `DEVICE_GET_INFO`.

use bitflags::bitflags;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::argsz;

/// Payload of `DEVICE_GET_INFO`, in both directions.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct DeviceInfo {
    /// Command: bytes of reply payload that are wanted. Reply: bytes that there are.
    pub argsz: u32,
    /// See [`DeviceFlags`].
    pub flags: u32,
    /// Number of regions.
    pub num_regions: u32,
    /// Number of kinds of interrupt.
    pub num_irqs: u32,
}

impl DeviceInfo {
    /// The command's payload.
    pub fn query() -> Self {
        Self {
            argsz: argsz::<Self>(),
            ..Self::default()
        }
    }
}

bitflags! {
    /// What kind of device it is (`VFIO_DEVICE_FLAGS_*` of `linux/vfio.h`).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct DeviceFlags: u32 {
        /// The device can be reset.
        const RESET = 1 << 0;
        /// The device is a PCI device.
        const PCI = 1 << 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_info_has_the_layout_of_the_specification() {
        let info = DeviceInfo {
            argsz: 16,
            flags: 3,
            num_regions: 9,
            num_irqs: 5,
        };
        assert_eq!(
            info.as_bytes(),
            [16, 0, 0, 0, 3, 0, 0, 0, 9, 0, 0, 0, 5, 0, 0, 0]
        );
        assert_eq!(DeviceInfo::query().as_bytes().first(), Some(&16));
    }
}
