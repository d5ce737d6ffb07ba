//! The device's config space: what it holds, and which of its bits can be written.

use std::io;

use guest::{CLASS_REVISION, DEVICE, SERIAL_NUMBER, SUBSYSTEM, VENDOR};

use super::part;

/// Bytes in config space.
pub(super) const SIZE: usize = 4096;

/// Offset, value after a reset, writable bits. All else is zero.
const REGISTERS: [(usize, u32, u32); 36] = [
    (0x00, (DEVICE as u32) << 16 | VENDOR as u32, 0),
    (COMMAND, 0x0010_0000, 0x0000_0407), // the status register says that there are capabilities
    (0x08, CLASS_REVISION, 0),
    (0x0c, 0, 0x0000_00ff), // cache line size
    (0x10, 0x0000_0000, 0xffff_f000),
    (0x14, 0x0000_0000, 0xffff_f000),
    (0x18, 0x0000_000c, 0xffff_0000),
    (0x1c, 0x0000_0000, 0xffff_ffff),
    (0x20, 0x0000_0001, 0xffff_ffe0),
    (0x2c, (SUBSYSTEM as u32) << 16 | VENDOR as u32, 0),
    (0x34, 0x0000_0040, 0),
    (0x3c, 0x0000_0100, 0x0000_00ff), // INTA
    // Power management: version 3, keeps its state in D3hot.
    (0x40, 0x0003_5001, 0),
    (0x44, 0x0000_0008, 0x0000_0003),
    // MSI: four messages, 64-bit addresses, mask bits.
    (MSI, 0x0184_7005, 0x0071_0000),
    (0x54, 0, 0xffff_fffc),
    (0x58, 0, 0xffff_ffff),
    (0x5c, 0, 0x0000_ffff),
    (0x60, 0, 0x0000_000f),
    // PCI Express: version 2, an endpoint with a 2.5 GT/s x1 link and role-based error reporting.
    (0x70, 0x0002_b010, 0),
    (0x74, 0x0000_8000, 0),
    (0x78, 0x0000_2810, 0x0000_7fff),
    (0x7c, 0x0000_0011, 0),
    (0x80, 0x0011_0000, 0x0000_0040),
    (0x94, 0x0000_0000, 0),
    (0x98, 0x0000_0000, 0x0000_001f),
    // MSI-X: eight vectors, everything in BAR 1.
    (MSIX, 0x0007_0011, 0xc000_0000),
    (0xb4, 0x0000_0001, 0),
    (0xb8, 0x0000_0801, 0),
    // Device serial number.
    (0x100, 0x1101_0003, 0),
    (0x104, SERIAL_NUMBER[0], 0),
    (0x108, SERIAL_NUMBER[1], 0),
    // Vendor specific: 16 bytes, of which two registers are in use.
    (0x110, 0x0001_000b, 0),
    (0x114, 0x0101_0001, 0),
    (0x118, 0x0000_0000, 0xffff_ffff),
    (0x11c, 0x1234_5678, 0),
];
const COMMAND: usize = 0x04;
const MSI: usize = 0x50;
const MSIX: usize = 0xb0;

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

    pub(super) fn is_msi_enabled(&self) -> bool {
        self.bytes[MSI + 2] & 1 != 0
    }

    pub(super) fn is_msix_enabled(&self) -> bool {
        self.bytes[MSIX + 3] & 1 << 7 != 0
    }
}
