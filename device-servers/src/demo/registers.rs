//! The registers: where they are, and what they hold.

use vfio_user_server::Doorbell;

/// Offsets of the registers in BAR 0. The table in [`demo`](crate::demo) says what they are.
pub(super) mod offset {
    pub(crate) const MAGIC: u64 = 0x00;
    pub(crate) const RESETS: u64 = 0x04;
    pub(crate) const SCRATCH: u64 = 0x08;
    pub(crate) const SCRATCH_HIGH: u64 = 0x0c;
    pub(crate) const RAISE: u64 = 0x10;
    pub(crate) const INTX: u64 = 0x14;
    pub(crate) const DMA_ADDRESS: u64 = 0x18;
    pub(crate) const DMA_ADDRESS_HIGH: u64 = 0x1c;
    pub(crate) const DMA_LENGTH: u64 = 0x20;
    pub(crate) const DMA_SEED: u64 = 0x24;
    pub(crate) const DMA_COMMAND: u64 = 0x28;
    pub(crate) const DMA_STATUS: u64 = 0x2c;
    pub(crate) const DMA_SUM: u64 = 0x30;
    pub(crate) const RAM_OFFSET: u64 = 0x34;
    pub(crate) const RAM_DATA: u64 = 0x38;
    pub(crate) const RAM_TRAPS: u64 = 0x3c;
    pub(crate) const VECTORS: u64 = 0x40;
    pub(crate) const DOORBELLS: u64 = 0x44;
    pub(crate) const FAULT: u64 = 0x48;
    pub(crate) const FAULT_DATA: u64 = 0x4c;
    pub(crate) const DELAY: u64 = 0x50;
    pub(crate) const DELAY_DATA: u64 = 0x54;
    pub(crate) const RESET_DELAY: u64 = 0x58;
    pub(crate) const STATE_FAULT: u64 = 0x5c;
    pub(crate) const STATE_SIZE: u64 = 0x60;
    pub(crate) const EARLY_SIZE: u64 = 0x64;
    pub(crate) const WRITER_PERIOD: u64 = 0x68;
    pub(crate) const WRITER_COUNT: u64 = 0x6c;
    pub(crate) const WRITER_ERRORS: u64 = 0x70;
    pub(crate) const RUNG: u64 = 0x80;
}

/// What `MAGIC` reads as.
pub(super) const MAGIC: u32 = 0x6d61_676f;

/// `DMA_COMMAND`: write guest memory, or read it.
pub(super) const DMA_WRITE: u32 = 1;
pub(super) const DMA_READ: u32 = 2;
/// `DMA_COMMAND`: do it later.
pub(super) const DMA_LATER: u32 = 1 << 8;
/// Longest transfer in bytes.
pub(super) const DMA_MAX: u32 = 1 << 20;

/// `DMA_STATUS`.
pub(super) const DMA_DONE: u32 = 0;
pub(super) const DMA_FAILED: u32 = 1;
pub(super) const DMA_BUSY: u32 = 2;

/// The doorbells.
pub(super) const BELLS: [Doorbell; 7] = [
    bell(0, 0x800, 4, None),
    bell(0, 0x804, 4, Some(1)),
    bell(0, 0x804, 4, Some(2)),
    bell(0, 0x808, 8, None),
    bell(0, 0x810, 2, None),
    bell(0, 0x812, 1, Some(0xa5)),
    bell(4, 0x10, 2, None),
];

const fn bell(bar: u8, offset: u64, size: u8, value: Option<u64>) -> Doorbell {
    Doorbell {
        bar,
        offset,
        size,
        value,
    }
}

/// What the registers hold, where that is more than what they are written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Values {
    pub(super) resets: u32,
    pub(super) ram_traps: u32,
    pub(super) scratch: [u32; 2],
    pub(super) intx: u32,
    pub(super) transfer: Transfer,
    /// What is left to be done of `DMA_COMMAND`; 0 if nothing is.
    pub(super) pending: u32,
    pub(super) dma_status: u32,
    pub(super) dma_sum: u32,
    pub(super) ram_offset: u32,
    pub(super) fault: [u32; 2],
    pub(super) delay: [u32; 2],
    pub(super) reset_delay: u32,
    pub(super) state_fault: u32,
    pub(super) state_size: u32,
    pub(super) early_size: u32,
    pub(super) writer: Writer,
    pub(super) rung: [u32; BELLS.len()],
}

/// A transfer, and what the writer writes to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Transfer {
    pub(super) address: [u32; 2],
    pub(super) length: u32,
    pub(super) seed: u32,
}

/// What the writer does and has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Writer {
    pub(super) period: u32,
    pub(super) count: u32,
    pub(super) errors: u32,
}

impl Values {
    /// What is left of them after a reset.
    pub(super) fn reset(&mut self) {
        *self = Self {
            resets: self.resets.wrapping_add(1),
            ram_traps: self.ram_traps,
            ..Self::default()
        };
    }

    /// All of them in an order that stays, for migration.
    pub(super) fn words(&mut self) -> impl Iterator<Item = &mut u32> {
        let Self {
            resets,
            ram_traps,
            scratch,
            intx,
            transfer,
            pending,
            dma_status,
            dma_sum,
            ram_offset,
            fault,
            delay,
            reset_delay,
            state_fault,
            state_size,
            early_size,
            writer,
            rung,
        } = self;
        let Transfer {
            address,
            length,
            seed,
        } = transfer;
        let Writer {
            period,
            count,
            errors,
        } = writer;
        let single = [
            resets,
            ram_traps,
            intx,
            length,
            seed,
            pending,
            dma_status,
            dma_sum,
            ram_offset,
            reset_delay,
            state_fault,
            state_size,
            early_size,
            period,
            count,
            errors,
        ];
        let several = [scratch, address, fault, delay].into_iter().flatten();
        single.into_iter().chain(several).chain(rung)
    }
}

impl Transfer {
    /// The guest-physical address.
    pub(super) fn address(&self) -> u64 {
        let [low, high] = self.address.map(u64::from);
        high << 32 | low
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
