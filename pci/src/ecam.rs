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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recorder::{Access, Recorder};

    /// Bus 0, with one function at 00:1f.7.
    fn ecam() -> (Ecam, Arc<Recorder>) {
        let segment = Arc::new(Segment::new());
        let recorder = Arc::new(Recorder::default());
        segment
            .insert(Bdf::new(0, 0x1f, 7).unwrap(), recorder.clone())
            .unwrap();
        (Ecam::new(segment, 0), recorder)
    }

    #[test]
    fn the_offset_names_function_and_register() {
        let (ecam, recorder) = ecam();
        let mut data = [0; 4];
        ecam.read(0xf_f104, &mut data);
        assert_eq!(data, [0x04, 0x05, 0x06, 0x07]);
        ecam.write(0xf_fffe, &[1, 2]);
        assert_eq!(
            recorder.take(),
            [Access::Read(0x104, 4), Access::Write(0xffe, vec![1, 2])]
        );
    }

    #[test]
    fn what_is_not_there_reads_as_ones() {
        let (ecam, recorder) = ecam();
        assert_eq!(ecam.length(), 0x10_0000);
        for offset in [0, 0xf_e000, 0x1f_f000, 0x10_000f_f000, u64::MAX] {
            let mut data = [0; 8];
            ecam.read(offset, &mut data);
            ecam.write(offset, &data);
            assert_eq!(data, [0xff; 8], "{offset:#x}");
        }
        assert_eq!(recorder.take(), []);
    }

    #[test]
    fn every_bus_can_be_covered() {
        assert_eq!(
            Ecam::new(Arc::new(Segment::new()), 255).length(),
            0x1000_0000
        );
    }
}
