//! Interrupts: `DEVICE_GET_IRQ_INFO` and `DEVICE_SET_IRQS`.

use bitflags::bitflags;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::argsz;

/// Payload of `DEVICE_GET_IRQ_INFO`, in both directions.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct IrqInfo {
    /// Size of this struct, in bytes.
    pub argsz: u32,
    /// See [`IrqFlags`].
    pub flags: u32,
    /// Kind of interrupt.
    pub index: u32,
    /// How many interrupts of this kind the device has.
    pub count: u32,
}

impl IrqInfo {
    /// The command's payload.
    pub fn query(index: u32) -> Self {
        Self {
            argsz: argsz::<Self>(),
            index,
            ..Self::default()
        }
    }
}

bitflags! {
    /// What can be done with a kind of interrupt (`VFIO_IRQ_INFO_*` of `linux/vfio.h`).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct IrqFlags: u32 {
        /// The interrupt can signal an eventfd.
        const EVENTFD = 1 << 0;
        /// The interrupt can be masked and unmasked.
        const MASKABLE = 1 << 1;
        /// The device masks the interrupt when it signals it.
        const AUTOMASKED = 1 << 2;
        /// Interrupts cannot be added one by one: the whole index is set up at once.
        const NORESIZE = 1 << 3;
    }
}

/// Head of the payload of `DEVICE_SET_IRQS`. The reply has none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct IrqSet {
    /// Size in bytes of this struct and of the booleans after it.
    pub argsz: u32,
    /// One flag of `DATA_*` and one of `ACTION_*`; see [`IrqSetFlags`].
    pub flags: u32,
    /// Kind of interrupt.
    pub index: u32,
    /// First interrupt of that kind.
    pub start: u32,
    /// Number of interrupts.
    pub count: u32,
}

impl IrqSet {
    /// The head of a command for `count` interrupts from `start`, followed by `data` bytes.
    pub fn new(flags: IrqSetFlags, index: u32, start: u32, count: u32, data: u32) -> Self {
        Self {
            argsz: argsz::<Self>().saturating_add(data),
            flags: flags.bits(),
            index,
            start,
            count,
        }
    }
}

bitflags! {
    /// What to do with interrupts, and by what (`VFIO_IRQ_SET_*` of `linux/vfio.h`).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct IrqSetFlags: u32 {
        /// To all interrupts of the range, now.
        const DATA_NONE = 1 << 0;
        /// To those whose byte in the data is not 0, now.
        const DATA_BOOL = 1 << 1;
        /// Whenever the eventfd sent for it is signalled; for a trigger: signal that eventfd.
        const DATA_EVENTFD = 1 << 2;
        /// Mask.
        const ACTION_MASK = 1 << 3;
        /// Unmask.
        const ACTION_UNMASK = 1 << 4;
        /// Trigger.
        const ACTION_TRIGGER = 1 << 5;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn irq_info_has_the_layout_of_the_specification() {
        let info = IrqInfo {
            argsz: 16,
            flags: 9,
            index: 2,
            count: 0x800,
        };
        assert_eq!(
            info.as_bytes(),
            [16, 0, 0, 0, 9, 0, 0, 0, 2, 0, 0, 0, 0, 8, 0, 0]
        );
        assert_eq!(
            IrqInfo::query(2).as_bytes(),
            [16, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]
        );
    }

    #[test]
    fn irq_set_has_the_layout_of_the_specification() {
        let flags = IrqSetFlags::DATA_BOOL | IrqSetFlags::ACTION_TRIGGER;
        let bytes = [
            23, 0, 0, 0, 0x22, 0, 0, 0, // argsz with three booleans, flags
            2, 0, 0, 0, 5, 0, 0, 0, 3, 0, 0, 0, // index, start, count
        ];
        assert_eq!(IrqSet::new(flags, 2, 5, 3, 3).as_bytes(), bytes);
    }
}
