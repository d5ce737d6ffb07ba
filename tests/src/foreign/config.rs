//! The device's config space: what it holds, and which of its bits can be written.

use std::io;

use guest::{CLASS_REVISION, DEVICE, SUBSYSTEM, VENDOR};

use super::{VECTORS, part};

/// Bytes in config space.
pub(super) const SIZE: usize = 256;

/// Offset, value after a reset, writable bits. All else is zero.
const REGISTERS: [(usize, u32, u32); 14] = [
    (0x00, (DEVICE as u32) << 16 | VENDOR as u32, 0),
    (COMMAND, 0x0010_0000, 0x0000_0407), // the status register says that there are capabilities
    (0x08, CLASS_REVISION, 0),
    (0x10, 0x0000_0000, 0xffff_f000),
    (0x14, 0x0000_0000, 0xffff_f000),
    (0x18, 0x0000_000c, 0xffff_0000),
    (0x1c, 0x0000_0000, 0xffff_ffff),
    (0x20, 0x0000_0001, 0xffff_ffe0),
    (0x2c, (SUBSYSTEM as u32) << 16 | VENDOR as u32, 0),
    (0x34, 0x40, 0),                  // MSIX
    (0x3c, 0x0000_0100, 0x0000_00ff), // INTA
    // MSI-X: the table at the start of BAR 1, the pending bits behind it.
    (MSIX, (VECTORS as u32 - 1) << 16 | 0x11, 0xc000_0000),
    (MSIX + 4, 0x0000_0001, 0),
    (MSIX + 8, 0x0000_0801, 0),
];
const COMMAND: usize = 0x04;
const MSIX: usize = 0x40;

#[derive(Debug)]
pub(super) struct ConfigSpace {
    bytes: [u8; SIZE],
    writable: [u8; SIZE],
}

impl ConfigSpace {
    /// Config space as it is after a reset.
    pub(super) fn new() -> Self {
        let mut config = Self {
            bytes: [0; SIZE],
            writable: [0; SIZE],
        };
        for (offset, value, writable) in REGISTERS {
            config.bytes[offset..][..4].copy_from_slice(&value.to_le_bytes());
            config.writable[offset..][..4].copy_from_slice(&writable.to_le_bytes());
        }
        config
    }

    pub(super) fn read(&mut self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        data.copy_from_slice(part(&mut self.bytes, offset, data.len())?);
        Ok(())
    }

    pub(super) fn write(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        let bytes = part(&mut self.bytes, offset, data.len())?.iter_mut();
        let writable = part(&mut self.writable, offset, data.len())?.iter();
        for (byte, (writable, new)) in bytes.zip(writable.zip(data)) {
            *byte = *byte & !writable | new & writable;
        }
        Ok(())
    }

    /// The interrupt status bit follows the INTx line, whether or not the line may interrupt.
    pub(super) fn set_interrupt_status(&mut self, high: bool) {
        self.bytes[COMMAND + 2] = self.bytes[COMMAND + 2] & !(1 << 3) | u8::from(high) << 3;
    }

    pub(super) fn is_bus_master(&self) -> bool {
        self.bytes[COMMAND] & 1 << 2 != 0
    }

    pub(super) fn is_intx_disabled(&self) -> bool {
        self.bytes[COMMAND + 1] & 1 << 2 != 0
    }

    pub(super) fn is_msix_enabled(&self) -> bool {
        self.bytes[MSIX + 3] & 1 << 7 != 0
    }
}
