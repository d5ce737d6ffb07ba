//! What a guest is told of its physical memory.

use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::layout;
use crate::memory::Ram;

/// The kinds of memory, as the BIOS call E820 numbers them (ACPI 6.5, 15.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Kind {
    Ram = 1,
    Reserved = 2,
}

/// A piece of the guest's physical address space.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) start: u64,
    pub(super) size: u64,
    pub(super) kind: Kind,
}

/// The memory map of a machine with this RAM. What is not in it is free for devices.
pub(super) fn memory_map(ram: &Ram) -> Vec<Entry> {
    let entry = |kind, start, end| Entry {
        start,
        size: end - start,
        kind,
    };
    let mut map = vec![
        entry(Kind::Ram, 0, layout::CONVENTIONAL_RAM_END),
        entry(
            Kind::Reserved,
            *layout::ACPI_TABLES.start(),
            layout::HIGH_MEMORY,
        ),
    ];
    for region in ram.iter() {
        let start = region.start_addr().0;
        let end = start + region.len();
        map.push(entry(Kind::Ram, start.max(layout::HIGH_MEMORY), end));
    }
    // Linux uses the ECAM only if it is reserved here (or in ACPI; it is in both).
    map.push(entry(
        Kind::Reserved,
        *layout::ECAM.start(),
        *layout::ECAM.end() + 1,
    ));
    map
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::GuestAddress;

    #[test]
    fn map_covers_ram_and_reserves_the_ecam() {
        let ram = Ram::from_ranges(&[
            (GuestAddress(0), 64 << 20),
            (GuestAddress(layout::HIGH_RAM_START), 1 << 20),
        ])
        .unwrap();
        let map = memory_map(&ram);
        let kinds = |kind| {
            let of_kind = move |entry: &&Entry| entry.kind == kind;
            map.iter()
                .filter(of_kind)
                .map(|entry| (entry.start, entry.size))
                .collect::<Vec<_>>()
        };
        assert_eq!(
            kinds(Kind::Ram),
            [
                (0, 0x9_fc00),
                (1 << 20, 63 << 20),
                (layout::HIGH_RAM_START, 1 << 20)
            ]
        );
        assert!(kinds(Kind::Reserved).contains(&(*layout::ECAM.start(), 256 << 20)));
    }
}
