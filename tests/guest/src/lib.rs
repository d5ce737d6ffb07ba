//! The demo device as its driver knows it. The server documents the registers: `device_servers::demo`. The foreign device
//! (`tests::foreign`) has some of them.
//!
//! Besides, what tests and their guests agree upon: what is written to disks, and sent over networks.

pub mod ledger;
pub mod offload;
pub mod stream;
pub mod transfer;

use core::ops::Range;

/// Vendor id; nobody's in the public list.
pub const VENDOR: u16 = 0x4f52;
/// Device id.
pub const DEVICE: u16 = 0x0001;
/// Subsystem id; the subsystem vendor is [`VENDOR`].
pub const SUBSYSTEM: u16 = 0x0002;
/// Revision and class code, as config space offset 8 reads: revision 3, class ff (fits none).
pub const CLASS_REVISION: u32 = 0xff00_0003;
/// The Device Serial Number, lower half first; its capability is the first extended one.
pub const SERIAL_NUMBER: [u32; 2] = [0x6967_6765, 0x4f75_7472];

/// Bytes in each BAR.
pub const BAR_SIZES: [u64; 6] = [0x1000, 0x1000, 0x1_0000, 0, 0x20, 0];
/// What of BAR 2 the server offers for mapping.
pub const MAPPED: Range<u64> = 0x4000..0xc000;
/// Where in BAR 1 the pending bits are.
pub const PBA_OFFSET: u64 = 0x800;
/// MSI vectors.
pub const MSI_VECTORS: u16 = 4;

/// Reads as [`MAGIC_VALUE`].
pub const MAGIC: u64 = 0x00;
/// What [`MAGIC`] reads as.
pub const MAGIC_VALUE: u32 = 0x6d61_676f;
/// How often the device was reset since its server started.
pub const RESETS: u64 = 0x04;
/// Eight bytes that keep what is written to them until the device is reset.
pub const SCRATCH: u64 = 0x08;
/// Write n: send vector n of MSI-X or MSI, whichever config space has enabled.
pub const RAISE: u64 = 0x10;
/// Level of the INTx line: bit 0.
pub const INTX: u64 = 0x14;
/// Guest-physical address of a transfer, low and high half.
pub const DMA_ADDRESS: u64 = 0x18;
/// Bytes in a transfer, at most [`DMA_MAX`].
pub const DMA_LENGTH: u64 = 0x20;
/// Where the [`pattern`] of a [`DMA_WRITE`] starts.
pub const DMA_SEED: u64 = 0x24;
/// Write [`DMA_WRITE`] or [`DMA_READ`]: do the transfer, which is finished when the write is. With [`DMA_LATER`] it is
/// not, and goes on beside what the guest does.
pub const DMA_COMMAND: u64 = 0x28;
/// 0 when the last transfer went well, 1 when not, [`DMA_BUSY`] when it is not finished.
pub const DMA_STATUS: u64 = 0x2c;
/// The [`checksum`] of what the last [`DMA_READ`] read.
pub const DMA_SUM: u64 = 0x30;
/// Offset into BAR 2 of what [`RAM_DATA`] shows.
pub const RAM_OFFSET: u64 = 0x34;
/// Four bytes of BAR 2 as the device sees them.
pub const RAM_DATA: u64 = 0x38;
/// How many accesses to BAR 2 reached the server as messages.
pub const RAM_TRAPS: u64 = 0x3c;
/// Number of MSI-X vectors.
pub const VECTORS: u64 = 0x40;

/// How often each of the [`DOORBELLS`] has rung, 32 bits for each.
pub const RUNG: u64 = 0x80;

/// [`DMA_COMMAND`]: write the [`pattern`] to guest memory.
pub const DMA_WRITE: u32 = 1;
/// [`DMA_COMMAND`]: read guest memory.
pub const DMA_READ: u32 = 2;
/// [`DMA_COMMAND`], with one of the others: don't let the guest wait.
pub const DMA_LATER: u32 = 1 << 8;
/// [`DMA_STATUS`]: not finished.
pub const DMA_BUSY: u32 = 2;
/// Longest transfer in bytes.
pub const DMA_MAX: u32 = 1 << 20;

/// The doorbells.
pub const DOORBELLS: [Doorbell; 7] = [
    doorbell(0, 0x800, 4, None),
    doorbell(0, 0x804, 4, Some(1)),
    doorbell(0, 0x804, 4, Some(2)),
    doorbell(0, 0x808, 8, None),
    doorbell(0, 0x810, 2, None),
    doorbell(0, 0x812, 1, Some(0xa5)),
    doorbell(4, 0x10, 2, None),
];

/// A place that rings when it is written to.
#[derive(Clone, Copy, Debug)]
pub struct Doorbell {
    /// The BAR.
    pub bar: usize,
    /// The offset in the BAR.
    pub offset: u64,
    /// How many bytes have to be written: 1, 2, 4 or 8.
    pub size: u8,
    /// The value that has to be written, or any.
    pub value: Option<u64>,
}

const fn doorbell(bar: usize, offset: u64, size: u8, value: Option<u64>) -> Doorbell {
    Doorbell {
        bar,
        offset,
        size,
        value,
    }
}

/// Byte `index` of the pattern of `seed`.
#[must_use]
pub fn pattern(seed: u32, index: u32) -> u8 {
    let [.., byte] = seed
        .wrapping_add(index)
        .wrapping_mul(0x9e37_79b1)
        .to_le_bytes();
    byte
}

/// FNV-1a, 32 bits.
#[must_use]
pub fn checksum(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0x811c_9dc5, |sum, byte| {
        (sum ^ u32::from(*byte)).wrapping_mul(0x0100_0193)
    })
}
