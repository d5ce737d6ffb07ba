//! The Enhanced Configuration Access Mechanism: configuration space in memory (7.2.2).

use std::sync::Arc;

use crate::address::Bdf;
use crate::bus::Segment;

/// A range of guest memory in which each function of a segment has 4096 bytes, in the order of their addresses.
#[derive(Debug)]
pub struct Ecam {
    segment: Arc<Segment>,
    last_bus: u8,
}

impl Ecam {
    /// The buses from 0 to `last_bus` of this segment.
    pub fn new(segment: Arc<Segment>, last_bus: u8) -> Self {
        Self { segment, last_bus }
    }

    /// How many bytes the range takes: 1 MiB for each bus.
    pub fn length(&self) -> u64 {
        (u64::from(self.last_bus) + 1) << 20
    }

    /// Reads at `offset` bytes from the start of the range. What is beyond its end, or beyond that of the function
    /// where the access starts, reads as all-ones.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((bdf, register)) = self.decode(offset) {
            self.segment.config_read(bdf, register, data);
        }
    }

    /// Writes at `offset` bytes from the start of the range. What is beyond is dropped.
    pub fn write(&self, offset: u64, data: &[u8]) {
        if let Some((bdf, register)) = self.decode(offset) {
            self.segment.config_write(bdf, register, data);
        }
    }

    /// Bits 27:20 are the bus, 19:15 the device, 14:12 the function and 11:0 the register (7.2.2, table 7-1).
    fn decode(&self, offset: u64) -> Option<(Bdf, u16)> {
        let bdf = Bdf::from_bits(u16::try_from(offset >> 12).ok()?);
        (bdf.bus() <= self.last_bus).then_some((bdf, (offset & 0xfff) as u16))
    }
}
