//! The state in which the first vCPU enters a kernel.

use kvm_bindings::{Msrs, kvm_fpu, kvm_msr_entry, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;
use vm_memory::GuestAddress;

use super::{BootError, write_slice};
use crate::layout;
use crate::memory::Ram;

/// Bits of the control registers (Intel SDM, volume 3, 2.5) and of EFER (2.2.1).
const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

/// Page table entries (Intel SDM, volume 3, 4.5): present, writable, maps 2 MiB.
const PRESENT: u64 = 1 << 0;
const WRITABLE: u64 = 1 << 1;
const LARGE: u64 = 1 << 7;

/// MTRR_DEF_TYPE (Intel SDM, volume 3, 11.11.2.1): enabled, and all memory write-back.
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
const MTRR_ENABLED_WRITE_BACK: u64 = 1 << 11 | 6;
/// IA32_MISC_ENABLE: fast string operations (Intel SDM, volume 4, table 2-2).
const MSR_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1 << 0;

/// The x87 control word and MXCSR after FINIT (Intel SDM, volume 1, 8.1.5 and 10.2.3).
const FPU_CONTROL_WORD: u16 = 0x37f;
const MXCSR: u32 = 0x1f80;

/// How the first vCPU enters the kernel.
#[derive(Debug, Clone, Copy)]
pub(crate) enum BootState {
    /// In 64-bit mode, with the zero page in RSI.
    Linux64 {
        /// The entry point.
        entry: u64,
    },
    /// In 32-bit protected mode without paging, with the start info in EBX.
    Pvh {
        /// The entry point.
        entry: u64,
        /// The start info.
        start_info: u64,
    },
}

impl BootState {
    /// Writes the registers of a vCPU at power-on; only the `first` enters the kernel, the others wait for its SIPI.
    pub(crate) fn apply(&self, fd: &VcpuFd, first: bool) -> Result<(), kvm_ioctls::Error> {
        set_msrs(fd)?;
        if first {
            set_fpu(fd)?;
            self.set_registers(fd)?;
            self.set_mode(fd)?;
        }
        Ok(())
    }

    fn set_registers(&self, fd: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
        /// Bit 1 of the flags is always set.
        const RFLAGS: u64 = 2;
        fd.set_regs(&match *self {
            Self::Linux64 { entry } => kvm_regs {
                rip: entry,
                rsi: layout::ZERO_PAGE,
                rsp: layout::BOOT_STACK,
                rbp: layout::BOOT_STACK,
                rflags: RFLAGS,
                ..Default::default()
            },
            Self::Pvh { entry, start_info } => kvm_regs {
                rip: entry,
                rbx: start_info,
                rflags: RFLAGS,
                ..Default::default()
            },
        })
    }

    fn set_mode(&self, fd: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
        let mut sregs = fd.get_sregs()?;
        let long = matches!(self, Self::Linux64 { .. });
        sregs.cs = Segment::Code { long }.for_kvm();
        let data = Segment::Data.for_kvm();
        (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
        sregs.tr = Segment::Task.for_kvm();
        sregs.gdt.base = layout::GDT;
        sregs.gdt.limit = GDT_LIMIT;
        sregs.idt.base = 0;
        sregs.idt.limit = 0;
        sregs.cr0 = CR0_PE | CR0_ET;
        sregs.cr4 = 0;
        if long {
            sregs.cr0 |= CR0_PG;
            sregs.cr3 = layout::PAGE_TABLES;
            sregs.cr4 = CR4_PAE;
            sregs.efer = EFER_LME | EFER_LMA;
        }
        fd.set_sregs(&sregs)
    }
}

fn set_msrs(fd: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
    for (index, data) in [
        (MSR_MTRR_DEF_TYPE, MTRR_ENABLED_WRITE_BACK),
        (MSR_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
    ] {
        let entry = kvm_msr_entry {
            index,
            data,
            ..Default::default()
        };
        let msrs = Msrs::from_entries(&[entry]).map_err(|_| kvm_ioctls::Error::new(libc::E2BIG))?;
        // A CPU that lacks the register does without.
        fd.set_msrs(&msrs)?;
    }
    Ok(())
}

fn set_fpu(fd: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
    fd.set_fpu(&kvm_fpu {
        fcw: FPU_CONTROL_WORD,
        mxcsr: MXCSR,
        ..Default::default()
    })
}

/// The segments of the boot protocols, flat from 0 to 4 GiB but for the task state.
#[derive(Debug, Clone, Copy)]
enum Segment {
    Code { long: bool },
    Data,
    Task,
}

impl Segment {
    /// Its selector: `__BOOT_CS` and `__BOOT_DS` of the 64-bit protocol, and the next one.
    fn selector(self) -> u16 {
        match self {
            Self::Code { .. } => 0x10,
            Self::Data => 0x18,
            Self::Task => 0x20,
        }
    }

    /// The segment's registers behind its selector (Intel SDM, volume 3, 3.4.5).
    fn for_kvm(self) -> kvm_segment {
        let (type_, s, limit) = match self {
            Self::Code { .. } => (0xb, 1, u32::MAX),
            Self::Data => (0x3, 1, u32::MAX),
            Self::Task => (0xb, 0, 0x67),
        };
        let long = matches!(self, Self::Code { long: true });
        let flat = matches!(self, Self::Code { .. } | Self::Data);
        kvm_segment {
            base: 0,
            limit,
            selector: self.selector(),
            type_,
            present: 1,
            dpl: 0,
            db: u8::from(flat && !long),
            s,
            l: u8::from(long),
            g: u8::from(flat),
            avl: 0,
            unusable: 0,
            padding: 0,
        }
    }

    /// The descriptor in the table from which a guest may load it again.
    fn descriptor(self) -> u64 {
        let segment = self.for_kvm();
        let limit = u64::from(if segment.g == 1 {
            segment.limit >> 12
        } else {
            segment.limit
        });
        let bits = |value: u8, shift| u64::from(value) << shift;
        limit & 0xffff
            | bits(segment.type_, 40)
            | bits(segment.s, 44)
            | bits(segment.present, 47)
            | (limit >> 16) << 48
            | bits(segment.l, 53)
            | bits(segment.db, 54)
            | bits(segment.g, 55)
    }
}

/// Entries up to the task state's, which takes two places in 64-bit mode.
const GDT_ENTRIES: usize = 6;
/// The offset of the table's last byte.
const GDT_LIMIT: u16 = 47;
const _: () = assert!(GDT_LIMIT as usize == GDT_ENTRIES * size_of::<u64>() - 1);

/// Writes the descriptor table, whose code segment is that of a `long` or a 32-bit entry.
pub(super) fn write_gdt(ram: &Ram, long: bool) -> Result<(), BootError> {
    let mut table = [0; GDT_ENTRIES];
    for segment in [Segment::Code { long }, Segment::Data, Segment::Task] {
        if let Some(entry) = table.get_mut(usize::from(segment.selector() / 8)) {
            *entry = segment.descriptor();
        }
    }
    write_words(ram, layout::GDT, &table)
}

/// Writes page tables that map the first GiB one to one, in pages of 2 MiB.
pub(super) fn write_page_tables(ram: &Ram) -> Result<(), BootError> {
    const TABLE: u64 = 0x1000;
    const ENTRIES: usize = 512;
    const LARGE_PAGE: u64 = 2 << 20;
    let pdpt = layout::PAGE_TABLES + TABLE;
    let directory = pdpt + TABLE;
    // Whole tables: after a reset there is something else in the memory.
    let first_only = |entry| {
        let mut table = [0; ENTRIES];
        table[0] = entry;
        table
    };
    write_words(
        ram,
        layout::PAGE_TABLES,
        &first_only(pdpt | PRESENT | WRITABLE),
    )?;
    write_words(ram, pdpt, &first_only(directory | PRESENT | WRITABLE))?;
    let mut address = 0;
    let pages = [(); ENTRIES].map(|()| {
        let page = address | PRESENT | WRITABLE | LARGE;
        address += LARGE_PAGE;
        page
    });
    write_words(ram, directory, &pages)
}

fn write_words(ram: &Ram, address: u64, words: &[u64]) -> Result<(), BootError> {
    let bytes: Vec<_> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    write_slice(ram, &bytes, GuestAddress(address))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_the_well_known_ones() {
        assert_eq!(
            Segment::Code { long: true }.descriptor(),
            0x00af_9b00_0000_ffff
        );
        assert_eq!(
            Segment::Code { long: false }.descriptor(),
            0x00cf_9b00_0000_ffff
        );
        assert_eq!(Segment::Data.descriptor(), 0x00cf_9300_0000_ffff);
        assert_eq!(Segment::Task.descriptor(), 0x0000_8b00_0000_0067);
    }
}
