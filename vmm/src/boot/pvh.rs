//! The PVH start info (Xen's include/public/arch-x86/hvm/start_info.h).

use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::elf::start_info::{
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::GuestAddress;

use super::memory_map::memory_map;
use super::{BootError, Initramfs};
use crate::layout;
use crate::memory::Ram;

/// `XEN_HVM_START_MAGIC_VALUE`.
const MAGIC: u32 = 0x336e_c578;
/// The first version with a memory map.
const VERSION: u32 = 1;

/// Where the module list and the memory map lie in the start info's page.
const MODULES: u64 = layout::PVH_START_INFO + size_of::<hvm_start_info>() as u64;
const MEMORY_MAP: u64 = MODULES + size_of::<hvm_modlist_entry>() as u64;

/// Writes the start info.
pub(super) fn write_start_info(
    ram: &Ram,
    rsdp: u64,
    initramfs: Option<Initramfs>,
) -> Result<(), BootError> {
    let map: Vec<_> = memory_map(ram)
        .iter()
        .map(|entry| hvm_memmap_table_entry {
            addr: entry.start,
            size: entry.size,
            type_: entry.kind as u32,
            reserved: 0,
        })
        .collect();
    let modules: Vec<_> = initramfs
        .iter()
        .map(|initramfs| hvm_modlist_entry {
            paddr: initramfs.address,
            size: initramfs.size,
            ..Default::default()
        })
        .collect();
    let start_info = hvm_start_info {
        magic: MAGIC,
        version: VERSION,
        flags: 0,
        nr_modules: u32::from(initramfs.is_some()),
        modlist_paddr: MODULES,
        cmdline_paddr: layout::CMDLINE,
        rsdp_paddr: rsdp,
        memmap_paddr: MEMORY_MAP,
        memmap_entries: u32::try_from(map.len()).map_err(|_| BootError::Structure)?,
        reserved: 0,
    };
    let mut params = BootParams::new(&start_info, GuestAddress(layout::PVH_START_INFO));
    params.set_sections(&map, GuestAddress(MEMORY_MAP));
    if !modules.is_empty() {
        params.set_modules(&modules, GuestAddress(MODULES));
    }
    PvhBootConfigurator::write_bootparams(&params, ram).map_err(|_| BootError::Structure)
}
