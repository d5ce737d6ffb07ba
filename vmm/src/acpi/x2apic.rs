//! The MADT's entry for a processor with an x2APIC id (ACPI 6.5, 5.2.12.12), which acpi_tables lacks.

use acpi_tables::{Aml, AmlSink};
use zerocopy::byteorder::little_endian::U32;
use zerocopy::{Immutable, IntoBytes};

/// The structure's type and length.
const TYPE: u8 = 9;
const LENGTH: u8 = 16;
const _: () = assert!(size_of::<LocalX2Apic>() == LENGTH as usize);
/// Local APIC flags (5.2.12.2.1): enabled.
const ENABLED: u32 = 1 << 0;

#[derive(Debug, Clone, Copy, IntoBytes, Immutable)]
#[repr(C)]
pub(super) struct LocalX2Apic {
    kind: u8,
    length: u8,
    reserved: [u8; 2],
    x2apic_id: U32,
    flags: U32,
    processor_uid: U32,
}

impl LocalX2Apic {
    pub(super) fn new(id: u32) -> Self {
        Self {
            kind: TYPE,
            length: LENGTH,
            reserved: [0; 2],
            x2apic_id: id.into(),
            flags: ENABLED.into(),
            processor_uid: id.into(),
        }
    }
}

impl Aml for LocalX2Apic {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(self.as_bytes());
    }
}
