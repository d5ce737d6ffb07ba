//! A VM that needs no device: memory, one CPU, an interrupt controller, an ioeventfd and an irqfd.
#![expect(unsafe_code, reason = "guest memory is given to KVM by its address")]

use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context;
use kvm_bindings::{
    KVM_IRQ_ROUTING_MSI, KVM_MEM_LOG_DIRTY_PAGES, KvmIrqRouting, kvm_irq_routing_entry,
    kvm_irq_routing_entry__bindgen_ty_1, kvm_irq_routing_msi, kvm_regs, kvm_segment,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{IoEventAddress, Kvm, NoDatamatch, VcpuFd, VmFd};
use linux_loader::loader::{Elf, KernelLoader};
use rustix::fs::{MemfdFlags, memfd_create};
use tests::tiny::{CODE, LOCAL_APIC};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use crate::device::{DOORBELL, MEMORY, VECTOR};
use crate::plain_copy::fresh;

/// Pages that KVM for Intel's processors wants for itself, where a PC has its firmware.
const TSS: usize = 0xfffb_d000;
/// The interrupt that the device has: the first behind the I/O APIC's.
const GSI: u32 = 24;
/// Where the segment descriptors are, from which an interrupt loads its code segment.
const SEGMENT_TABLE: u64 = 0x500;
/// No descriptor, none, flat code, flat data (Intel SDM, volume 3, 3.4.5).
const SEGMENTS: [u64; 4] = [0, 0, 0x00cf_9b00_0000_ffff, 0x00cf_9300_0000_ffff];

/// The VM. Its memory is shared with the device.
pub(super) struct Machine {
    pub(super) vcpu: VcpuFd,
    _vm: VmFd,
    file: File,
    doorbell: EventFd,
    interrupt: EventFd,
    // Last, for the VM has it.
    _memory: GuestMemoryMmap,
}

impl Machine {
    /// A VM that is about to enter a tiny guest, with the doorbell where the device's BAR 0 is.
    pub(super) fn new(kernel: &Path, bar: u32) -> anyhow::Result<Self> {
        let file = File::from(memfd_create("ram", MemfdFlags::CLOEXEC)?);
        file.set_len(MEMORY)?;
        let size = usize::try_from(MEMORY)?;
        let part = FileOffset::new(file.try_clone()?, 0);
        let memory = GuestMemoryMmap::from_ranges_with_files([(GuestAddress(0), size, Some(part))])
            .context("mapping guest memory")?;
        let mut kernel = File::open(kernel).context("opening the guest")?;
        Elf::load(&memory, None, &mut kernel, None).context("loading the guest")?;

        let kvm = Kvm::new().context("opening KVM")?;
        let vm = kvm.create_vm()?;
        vm.set_tss_address(TSS)?;
        vm.create_irq_chip()?;
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: MEMORY,
            userspace_addr: memory.get_host_address(GuestAddress(0))? as u64,
        };
        // SAFETY: there are as many bytes mapped at that address, which nothing in Rust refers to, and the mapping goes
        // after the VM, whose only CPU is that of the same structure.
        unsafe { vm.set_user_memory_region(region) }?;

        let doorbell = EventFd::new(0)?;
        let place = IoEventAddress::Mmio(u64::from(bar) + DOORBELL);
        vm.register_ioevent(&doorbell, &place, NoDatamatch)?;
        let interrupt = EventFd::new(0)?;
        vm.set_gsi_routing(&route()?)?;
        vm.register_irqfd(&interrupt, GSI)?;

        let table: Vec<_> = SEGMENTS.into_iter().flat_map(u64::to_le_bytes).collect();
        memory.write_slice(&table, GuestAddress(SEGMENT_TABLE))?;
        let vcpu = vm.create_vcpu(0)?;
        enter(&vcpu)?;
        Ok(Self {
            vcpu,
            _vm: vm,
            file,
            doorbell,
            interrupt,
            _memory: memory,
        })
    }

    /// What the device is to have: memory, doorbell and interrupt.
    pub(super) fn shared(&self) -> [RawFd; 3] {
        [
            self.file.as_raw_fd(),
            self.doorbell.as_raw_fd(),
            self.interrupt.as_raw_fd(),
        ]
    }
}

/// How long KVM takes to say which of so many bytes of guest memory were written to.
///
/// # Errors
/// When there is no KVM.
pub(crate) fn dirty_scan(bytes: u64) -> anyhow::Result<Duration> {
    let memory = fresh(bytes)?;
    let vm = Kvm::new().context("opening KVM")?.create_vm()?;
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: KVM_MEM_LOG_DIRTY_PAGES,
        guest_phys_addr: 0,
        memory_size: bytes,
        userspace_addr: memory.get_host_address(GuestAddress(0))? as u64,
    };
    // SAFETY: there are as many bytes mapped at that address, which nothing in Rust refers to, and the VM has no CPU that
    // could use them.
    unsafe { vm.set_user_memory_region(region) }?;
    let size = usize::try_from(bytes)?;
    // A migration has asked before, too.
    vm.get_dirty_log(0, size)?;
    let began = Instant::now();
    vm.get_dirty_log(0, size)?;
    Ok(began.elapsed())
}

/// The interrupt as a message to the only CPU.
fn route() -> anyhow::Result<KvmIrqRouting> {
    let entry = kvm_irq_routing_entry {
        gsi: GSI,
        type_: KVM_IRQ_ROUTING_MSI,
        u: kvm_irq_routing_entry__bindgen_ty_1 {
            msi: kvm_irq_routing_msi {
                address_lo: LOCAL_APIC,
                data: VECTOR.into(),
                ..Default::default()
            },
        },
        ..Default::default()
    };
    Ok(KvmIrqRouting::from_entries(&[entry])?)
}

/// 32-bit protected mode without paging, as PVH has it.
fn enter(vcpu: &VcpuFd) -> anyhow::Result<()> {
    /// CR0's protection enable, and its bit that is always set (Intel SDM, volume 3, 2.5).
    const PROTECTED: u64 = 0x11;
    let flat = |selector, type_| kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    let mut special = vcpu.get_sregs()?;
    special.cs = flat(0x10, 0xb);
    let data = flat(0x18, 0x3);
    (special.ds, special.es, special.fs) = (data, data, data);
    (special.gs, special.ss) = (data, data);
    special.gdt.base = SEGMENT_TABLE;
    special.gdt.limit = u16::try_from(size_of_val(&SEGMENTS))? - 1;
    special.cr0 = PROTECTED;
    vcpu.set_sregs(&special)?;
    vcpu.set_regs(&kvm_regs {
        rip: CODE.into(),
        rflags: 2,
        ..Default::default()
    })?;
    Ok(())
}
