//! The 64-bit boot protocol of Linux (Documentation/arch/x86/boot.rst and zero-page.rst).

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::{ByteValued, GuestAddress};

use super::memory_map::memory_map;
use super::{BootError, Initramfs, Source, write_slice};
use crate::layout;
use crate::memory::Ram;

/// Offset of the setup header in a bzImage and in the zero page.
const HEADER_OFFSET: u64 = 0x1f1;
/// `xloadflags`: the kernel has a 64-bit entry point, 0x200 behind its load address.
const XLF_KERNEL_64: u16 = 1 << 0;
/// The first protocol version with `xloadflags`, 2.12.
const VERSION_XLOADFLAGS: u16 = 0x20c;
/// Offset of the 64-bit entry point from the load address.
const ENTRY_64BIT: u64 = 0x200;
/// `type_of_loader`: one without a number of its own.
const LOADER_UNDEFINED: u8 = 0xff;
/// `loadflags`: the heap end pointer is valid, the kernel is loaded high.
const LOADED_HIGH: u8 = 1 << 0;

/// The setup header of a bzImage.
#[derive(Debug)]
pub(super) struct Header(setup_header);

impl Header {
    /// Reads it; a file that is too short has one of zeros, which [`Header::has_64bit_entry`] refuses.
    pub(super) fn read(kernel: &Source) -> Result<Self, BootError> {
        let mut header = setup_header::default();
        kernel.read_at(header.as_mut_slice(), HEADER_OFFSET)?;
        if header.header != u32::from_le_bytes(*b"HdrS") {
            return Err(BootError::NotAKernel(kernel.path.clone()));
        }
        Ok(Self(header))
    }

    pub(super) fn has_64bit_entry(&self) -> bool {
        self.0.version >= VERSION_XLOADFLAGS
            && self.0.xloadflags & XLF_KERNEL_64 != 0
            && self.0.loadflags & LOADED_HIGH != 0
    }

    /// Where to enter a kernel that was loaded at `address`.
    pub(super) fn entry_64bit(&self, address: u64) -> u64 {
        address + ENTRY_64BIT
    }

    /// The end of the memory that a kernel loaded at `address` unpacks itself into.
    pub(super) fn unpacked_end(&self, address: u64) -> u64 {
        address
            .max(self.0.pref_address)
            .saturating_add(self.0.init_size.into())
    }

    /// The last address that an initramfs may occupy.
    pub(super) fn initramfs_max(&self) -> u64 {
        self.0.initrd_addr_max.into()
    }

    /// How long a command line may be, without its NUL.
    pub(super) fn cmdline_max(&self) -> usize {
        self.0.cmdline_size as usize
    }
}

/// Writes the zero page.
pub(super) fn write_zero_page(
    ram: &Ram,
    setup: setup_header,
    rsdp: u64,
    cmdline_length: usize,
    initramfs: Option<Initramfs>,
) -> Result<(), BootError> {
    let mut params = Box::new(boot_params {
        hdr: setup,
        acpi_rsdp_addr: rsdp,
        ..Default::default()
    });
    let below_4g = |value: u64| u32::try_from(value).map_err(|_| BootError::Structure);
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.cmd_line_ptr = below_4g(layout::CMDLINE)?;
    params.hdr.cmdline_size = below_4g(cmdline_length as u64)?;
    if let Some(Initramfs { address, size }) = initramfs {
        params.hdr.ramdisk_image = below_4g(address)?;
        params.hdr.ramdisk_size = below_4g(size)?;
    }
    let map = memory_map(ram);
    for (slot, entry) in params.e820_table.iter_mut().zip(&map) {
        *slot = boot_e820_entry {
            addr: entry.start,
            size: entry.size,
            r#type: entry.kind as u32,
        };
    }
    params.e820_entries = u8::try_from(map.len()).map_err(|_| BootError::Structure)?;
    write_slice(ram, params.as_slice(), GuestAddress(layout::ZERO_PAGE))
}
