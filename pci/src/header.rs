//! The type 0 configuration header (7.5.1): where its registers are, and the bits of the two that matter.

use bitflags::bitflags;

/// Vendor ID, 2 bytes (7.5.1.1.1).
pub const VENDOR_ID: u16 = 0x00;
/// Device ID, 2 bytes (7.5.1.1.2).
pub const DEVICE_ID: u16 = 0x02;
/// [`Command`], 2 bytes (7.5.1.1.3).
pub const COMMAND: u16 = 0x04;
/// [`Status`], 2 bytes (7.5.1.1.4).
pub const STATUS: u16 = 0x06;
/// Revision ID, 1 byte (7.5.1.1.5).
pub const REVISION_ID: u16 = 0x08;
/// Class code, 3 bytes: programming interface, sub-class, base class (7.5.1.1.6).
pub const CLASS_CODE: u16 = 0x09;
/// Cache line size, 1 byte (7.5.1.1.7).
pub const CACHE_LINE_SIZE: u16 = 0x0c;
/// Latency timer, 1 byte, always zero on PCI Express (7.5.1.1.8).
pub const LATENCY_TIMER: u16 = 0x0d;
/// Header type, 1 byte: the layout, and [`MULTI_FUNCTION`] (7.5.1.1.9).
pub const HEADER_TYPE: u16 = 0x0e;
/// Built-in self test, 1 byte (7.5.1.1.10).
pub const BIST: u16 = 0x0f;
/// The first of the six base address registers, 4 bytes each (7.5.1.2.1).
pub const BARS: u16 = 0x10;
/// The end of the last of them.
pub const BARS_END: u16 = 0x28;
/// Cardbus CIS pointer, 4 bytes, always zero on PCI Express (7.5.1.2.2).
pub const CARDBUS_CIS: u16 = 0x28;
/// Subsystem vendor ID, 2 bytes (7.5.1.2.3).
pub const SUBSYSTEM_VENDOR_ID: u16 = 0x2c;
/// Subsystem ID, 2 bytes (7.5.1.2.3).
pub const SUBSYSTEM_ID: u16 = 0x2e;
/// Expansion ROM base address, 4 bytes (7.5.1.2.4).
pub const EXPANSION_ROM: u16 = 0x30;
/// Where the first capability is, 1 byte (7.5.1.1.11).
pub const CAPABILITIES: u16 = 0x34;
/// Interrupt line, 1 byte: for software only (7.5.1.1.12).
pub const INTERRUPT_LINE: u16 = 0x3c;
/// Interrupt pin, 1 byte: see [`InterruptPin`](crate::InterruptPin) (7.5.1.1.13).
pub const INTERRUPT_PIN: u16 = 0x3d;
/// Min_Gnt, 1 byte, always zero on PCI Express (7.5.1.2.5).
pub const MIN_GNT: u16 = 0x3e;
/// Max_Lat, 1 byte, always zero on PCI Express (7.5.1.2.5).
pub const MAX_LAT: u16 = 0x3f;
/// The end of the header; capabilities start here.
pub const END: u16 = 0x40;

/// The bit of [`HEADER_TYPE`] by which function 0 tells that the device may have others.
pub const MULTI_FUNCTION: u8 = 0x80;

bitflags! {
    /// The Command register (7.5.1.1.3).
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
    pub struct Command: u16 {
        /// I/O BARs are decoded.
        const IO_SPACE = 1 << 0;
        /// Memory BARs are decoded.
        const MEMORY_SPACE = 1 << 1;
        /// The function may send memory requests: DMA and message signalled interrupts.
        const BUS_MASTER = 1 << 2;
        /// Zero on PCI Express.
        const SPECIAL_CYCLES = 1 << 3;
        /// Zero on PCI Express.
        const MEMORY_WRITE_AND_INVALIDATE = 1 << 4;
        /// Zero on PCI Express.
        const VGA_PALETTE_SNOOP = 1 << 5;
        /// Poisoned requests are reported in [`Status::MASTER_DATA_PARITY_ERROR`].
        const PARITY_ERROR_RESPONSE = 1 << 6;
        /// Non-fatal and fatal errors are reported to the root complex.
        const SERR = 1 << 8;
        /// Zero on PCI Express.
        const FAST_BACK_TO_BACK = 1 << 9;
        /// The function does not assert INTx.
        const INTX_DISABLE = 1 << 10;
    }

    /// The Status register (7.5.1.1.4). Writing a one to an error bit clears it.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
    pub struct Status: u16 {
        /// The function needs no delay after a reset.
        const IMMEDIATE_READINESS = 1 << 0;
        /// An INTx interrupt is pending, whether or not [`Command::INTX_DISABLE`] is set.
        const INTERRUPT = 1 << 3;
        /// There is a list of capabilities.
        const CAPABILITIES = 1 << 4;
        /// A poisoned request was sent or received.
        const MASTER_DATA_PARITY_ERROR = 1 << 8;
        /// A request was answered with Completer Abort.
        const SIGNALED_TARGET_ABORT = 1 << 11;
        /// A completion with status Completer Abort was received.
        const RECEIVED_TARGET_ABORT = 1 << 12;
        /// A completion with status Unsupported Request was received.
        const RECEIVED_MASTER_ABORT = 1 << 13;
        /// An error was reported to the root complex.
        const SIGNALED_SYSTEM_ERROR = 1 << 14;
        /// Something poisoned was received.
        const DETECTED_PARITY_ERROR = 1 << 15;
    }
}
