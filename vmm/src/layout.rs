//! Where things are in the guest's physical address space and in its I/O ports.
//!
//! ```text
//! 0                 real-mode data, boot structures (see below), low RAM
//! 0x000e_0000       ACPI tables and the reset vector, to 1 MiB
//! 0x0010_0000       kernel, initramfs, RAM
//! 0xc000_0000       end of low RAM; 32-bit window of the PCI host bridge
//! 0xe000_0000       ECAM of bus 0 to 255
//! 0xf000_0000       nothing but the interrupt controllers
//! 0x1_0000_0000     the rest of RAM
//! beyond RAM        64-bit window of the PCI host bridge, see [`pci_windows`]
//! ```

use std::ops::RangeInclusive;

use pci::{Window, Windows};

/// Bytes in a page.
pub(crate) const PAGE_SIZE: u64 = 4096;

/// End of the RAM below 4 GiB, and start of the hole that PCI needs there.
pub(crate) const LOW_RAM_END: u64 = 0xc000_0000;
/// Start of the RAM above 4 GiB.
pub(crate) const HIGH_RAM_START: u64 = 0x1_0000_0000;

/// The conventional memory that a kernel may use below the legacy video and BIOS areas.
pub(crate) const CONVENTIONAL_RAM_END: u64 = 0x9_fc00;
/// The global descriptor table that the first vCPU starts with.
pub(crate) const GDT: u64 = 0x500;
/// The PVH start info and what it points to (a page).
pub(crate) const PVH_START_INFO: u64 = 0x6000;
/// The zero page of the 64-bit boot protocol.
pub(crate) const ZERO_PAGE: u64 = 0x7000;
/// The stack of the 64-bit boot protocol grows down from here.
pub(crate) const BOOT_STACK: u64 = 0x8ff0;
/// Page tables that map the first GiB one to one: three pages.
pub(crate) const PAGE_TABLES: u64 = 0x9000;
/// The kernel's command line.
pub(crate) const CMDLINE: u64 = 0x2_0000;
/// The most that a command line may take, its final NUL included.
pub(crate) const CMDLINE_MAX: usize = 0x1_0000;
/// The RSDP and the tables behind it.
pub(crate) const ACPI_TABLES: RangeInclusive<u64> = 0xe_0000..=RESET_VECTOR - 1;
/// Where a PC's BIOS is entered in real mode: f000:fff0. Reserved with the ACPI tables.
pub(crate) const RESET_VECTOR: u64 = 0xf_fff0;
/// Where a kernel is loaded that does not ask for another address.
pub(crate) const HIGH_MEMORY: u64 = 0x10_0000;

/// The host bridge's 32-bit memory window.
const PCI_WINDOW32: Window = Window {
    start: LOW_RAM_END,
    length: *ECAM.start() - LOW_RAM_END,
};
/// The host bridge's I/O window.
const PCI_WINDOW_IO: Window = Window {
    start: 0x1000,
    length: 0xf000,
};
/// Configuration space of all buses, memory mapped, 1 MiB for each (PCI Firmware 3.3, 4.1.2).
pub(crate) const ECAM: RangeInclusive<u64> = 0xe000_0000..=0xefff_ffff;
/// The last bus of the segment.
pub(crate) const LAST_BUS: u8 = 255;
/// The unit in which the 64-bit window is placed: it starts at the first multiple of this beyond RAM, and is as long.
/// On a machine with up to 255 GiB of RAM it so ends at 512 GiB, which every host's address bits reach.
const PCI_WINDOW64_UNIT: u64 = 256 << 30;

/// The I/O APIC's registers, where the kernel's own model has them.
pub(crate) const IO_APIC: u32 = 0xfec0_0000;
/// The local APICs' registers, where the kernel's own model has them.
pub(crate) const LOCAL_APIC: u32 = 0xfee0_0000;
/// A page for KVM on Intel CPUs that cannot run real mode: KVM_SET_IDENTITY_MAP_ADDR.
pub(crate) const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// Three more pages of that kind: KVM_SET_TSS_ADDR.
pub(crate) const KVM_TSS: u64 = 0xfffb_d000;

/// The first serial port, as on a PC.
pub(crate) const COM1: RangeInclusive<u64> = 0x3f8..=0x3ff;
/// The keyboard controller's command port: writing 0xfe there resets a PC.
pub(crate) const I8042: RangeInclusive<u64> = 0x60..=0x64;
/// ACPI's sleep control, sleep status and reset registers, a byte each.
pub(crate) const POWER: RangeInclusive<u64> = 0x600..=0x602;
/// The CONFIG_ADDRESS and CONFIG_DATA registers of PCI (PCI Local Bus 3.0, 3.2.2.3.2).
pub(crate) const PCI_CONFIG_PORTS: RangeInclusive<u64> = 0xcf8..=0xcff;

/// The serial port's interrupt.
pub(crate) const COM1_GSI: u32 = 4;
/// The interrupt of the generic event device: its power button.
pub(crate) const POWER_BUTTON_GSI: u32 = 5;
/// The four interrupt lines of PCI's root bus start here.
pub(crate) const PCI_INTX_GSI: u32 = 16;
/// How many pins the I/O APIC has; message signalled interrupts get the GSIs from here on.
pub(crate) const IO_APIC_PINS: u32 = 24;

/// The windows of the PCI host bridge on a machine whose RAM ends at `ram_end`. They depend upon the VM's configuration
/// only, so that the VM finds them unchanged on another host.
pub(crate) fn pci_windows(ram_end: u64) -> Windows {
    let start = ram_end.next_multiple_of(PCI_WINDOW64_UNIT);
    let memory64 = Window {
        start,
        length: PCI_WINDOW64_UNIT,
    };
    Windows {
        io: PCI_WINDOW_IO,
        memory32: PCI_WINDOW32,
        memory64,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn window64_follows_ram() {
        let start = |ram_end| pci_windows(ram_end).memory64.start;
        assert_eq!(start(64 << 20), 256 << 30);
        assert_eq!(start(256 << 30), 256 << 30);
        assert_eq!(start((256 << 30) + 1), 512 << 30);
    }

    #[test]
    fn ecam_has_room_for_all_buses() {
        assert_eq!(
            ECAM.end() - ECAM.start() + 1,
            (u64::from(LAST_BUS) + 1) << 20
        );
        assert_eq!(PCI_WINDOW32.start + PCI_WINDOW32.length, *ECAM.start());
    }
}
