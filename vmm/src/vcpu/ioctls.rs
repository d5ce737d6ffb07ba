//! What kvm-ioctls cannot say of a vCPU, or cannot say safely.
#![expect(unsafe_code, reason = "ioctls")]

use std::ptr;

use kvm_bindings::{
    KVM_SREGS2_FLAGS_PDPTRS_VALID, KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVMIO, Xsave,
    kvm_device_attr, kvm_sregs, kvm_sregs2, kvm_xsave,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd};
use vmm_sys_util::errno;
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref};

/// The macros make undocumented public functions.
mod numbers {
    use super::{KVMIO, kvm_device_attr, kvm_sregs2};
    use vmm_sys_util::{ioctl_ior_nr, ioctl_iow_nr};

    ioctl_ior_nr!(KVM_GET_SREGS2, KVMIO, 0xcc, kvm_sregs2);
    ioctl_iow_nr!(KVM_SET_SREGS2, KVMIO, 0xcd, kvm_sregs2);
    ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
    ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);
}

fn check(result: i32) -> Result<(), errno::Error> {
    if result == 0 {
        Ok(())
    } else {
        Err(errno::Error::last())
    }
}

/// The table entries that a CPU in PAE mode keeps when it loads CR3. They may differ from those in memory.
pub(super) type Pdptrs = [u64; 4];

/// Reads the system registers by KVM_GET_SREGS2. What they have beyond KVM_GET_SREGS, there only in PAE mode, comes
/// second; what they lack, the interrupts to be injected, is in the vCPU's events.
pub(super) fn sregs2(fd: &VcpuFd) -> Result<(kvm_sregs, Option<Pdptrs>), errno::Error> {
    let mut sregs2 = kvm_sregs2::default();
    // SAFETY: the ioctl writes a `kvm_sregs2`.
    check(unsafe { ioctl_with_mut_ref(fd, numbers::KVM_GET_SREGS2(), &mut sregs2) })?;
    let kvm_sregs2 {
        cs,
        ds,
        es,
        fs,
        gs,
        ss,
        tr,
        ldt,
        gdt,
        idt,
        cr0,
        cr2,
        cr3,
        cr4,
        cr8,
        efer,
        apic_base,
        flags,
        pdptrs,
    } = sregs2;
    let sregs = kvm_sregs {
        cs,
        ds,
        es,
        fs,
        gs,
        ss,
        tr,
        ldt,
        gdt,
        idt,
        cr0,
        cr2,
        cr3,
        cr4,
        cr8,
        efer,
        apic_base,
        interrupt_bitmap: [0; 4],
    };
    let valid = flags & u64::from(KVM_SREGS2_FLAGS_PDPTRS_VALID) != 0;
    Ok((sregs, valid.then_some(pdptrs)))
}

/// Writes what [`sregs2`] has read.
pub(super) fn set_sregs2(
    fd: &VcpuFd,
    sregs: &kvm_sregs,
    pdptrs: Option<Pdptrs>,
) -> Result<(), errno::Error> {
    let flags = pdptrs.map_or(0, |_| KVM_SREGS2_FLAGS_PDPTRS_VALID.into());
    let kvm_sregs {
        cs,
        ds,
        es,
        fs,
        gs,
        ss,
        tr,
        ldt,
        gdt,
        idt,
        cr0,
        cr2,
        cr3,
        cr4,
        cr8,
        efer,
        apic_base,
        interrupt_bitmap: _,
    } = *sregs;
    let sregs2 = kvm_sregs2 {
        cs,
        ds,
        es,
        fs,
        gs,
        ss,
        tr,
        ldt,
        gdt,
        idt,
        cr0,
        cr2,
        cr3,
        cr4,
        cr8,
        efer,
        apic_base,
        flags,
        pdptrs: pdptrs.unwrap_or_default(),
    };
    // SAFETY: the ioctl reads a `kvm_sregs2`.
    check(unsafe { ioctl_with_ref(fd, numbers::KVM_SET_SREGS2(), &sregs2) })
}

/// The size in bytes of the FPU's and the extended state. The legacy part comes first; KVM speaks of it in this way even
/// on a CPU without XSAVE.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct XsaveSize {
    bytes: usize,
    /// Whether KVM has KVM_GET_XSAVE2; without it, it knows no state beyond [`LEGACY_XSAVE`].
    two: bool,
}

/// The size of `struct kvm_xsave`, which is the least that KVM takes and tells.
const LEGACY_XSAVE: usize = size_of::<kvm_xsave>();

impl XsaveSize {
    /// What `kvm` has for every vCPU of this process, which never asks for dynamic features with arch_prctl(2).
    pub(crate) fn new(kvm: &Kvm) -> Self {
        let bytes = usize::try_from(kvm.check_extension_int(Cap::Xsave2)).unwrap_or(0);
        Self {
            bytes: bytes.max(LEGACY_XSAVE),
            two: bytes > 0,
        }
    }

    /// How many bytes there are.
    pub(crate) fn bytes(self) -> usize {
        self.bytes
    }

    fn buffer(self) -> Result<Xsave, errno::Error> {
        let words = (self.bytes - LEGACY_XSAVE).div_ceil(size_of::<u32>());
        Xsave::new(words).map_err(|_| errno::Error::new(libc::ENOMEM))
    }
}

/// Reads the FPU's and the extended state.
pub(super) fn xsave(fd: &VcpuFd, size: XsaveSize) -> Result<Vec<u8>, errno::Error> {
    let (legacy, beyond) = if size.two {
        let mut xsave = size.buffer()?;
        // SAFETY: the buffer has the size that KVM says it writes.
        unsafe { fd.get_xsave2(&mut xsave) }?;
        let beyond = xsave.as_slice().to_vec();
        (xsave.as_fam_struct_ref().xsave.region, beyond)
    } else {
        (fd.get_xsave()?.region, Vec::new())
    };
    let words = legacy.iter().chain(&beyond);
    Ok(words.flat_map(|word| word.to_ne_bytes()).collect())
}

/// Writes what [`xsave`] has read, here or on another host: all of it must fit, and what it lacks is put into its
/// initial state.
pub(super) fn set_xsave(fd: &VcpuFd, size: XsaveSize, bytes: &[u8]) -> Result<(), errno::Error> {
    let mut xsave = size.buffer()?;
    let (words, rest) = bytes.as_chunks();
    let mut words = words.iter().map(|word| u32::from_ne_bytes(*word));
    // SAFETY: the number of words behind the structure is not touched.
    let region = unsafe { &mut xsave.as_mut_fam_struct().xsave.region };
    region
        .iter_mut()
        .zip(&mut words)
        .for_each(|(to, from)| *to = from);
    let beyond = xsave.as_mut_slice();
    beyond
        .iter_mut()
        .zip(&mut words)
        .for_each(|(to, from)| *to = from);
    if words.next().is_some() || !rest.is_empty() {
        return Err(errno::Error::new(libc::E2BIG));
    }
    // SAFETY: the buffer has the size that KVM says it reads.
    unsafe { fd.set_xsave2(&xsave) }
}

/// What KVM adds to the host's time stamp counter to get the guest's, if it tells (it does since Linux 5.16).
pub(super) fn tsc_offset(fd: &VcpuFd) -> Option<u64> {
    let mut offset = 0u64;
    let attribute = tsc_offset_at(ptr::from_mut(&mut offset));
    // SAFETY: the ioctl reads a `kvm_device_attr`, and writes an u64 to the address in it.
    let result = unsafe { ioctl_with_ref(fd, numbers::KVM_GET_DEVICE_ATTR(), &attribute) };
    check(result).is_ok().then_some(offset)
}

/// Sets what [`tsc_offset`] reads.
pub(super) fn set_tsc_offset(fd: &VcpuFd, offset: u64) -> Result<(), errno::Error> {
    let attribute = tsc_offset_at(ptr::from_ref(&offset));
    // SAFETY: the ioctl reads a `kvm_device_attr`, and an u64 from the address in it.
    check(unsafe { ioctl_with_ref(fd, numbers::KVM_SET_DEVICE_ATTR(), &attribute) })
}

fn tsc_offset_at(offset: *const u64) -> kvm_device_attr {
    kvm_device_attr {
        flags: 0,
        group: KVM_VCPU_TSC_CTRL,
        attr: KVM_VCPU_TSC_OFFSET.into(),
        addr: offset.expose_provenance() as u64,
    }
}
