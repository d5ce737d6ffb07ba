//! A vCPU's state at power-on, which a reset brings back.
//!
//! KVM has no call that resets a vCPU, so its state is read when it is new and written back.

use std::fmt;

use kvm_bindings::nested::KvmNestedStateBuffer;
use kvm_bindings::{
    Msrs, kvm_debugregs, kvm_fpu, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs,
    kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd};

/// The model specific registers that KVM keeps for a guest.
#[derive(Debug, Clone)]
pub(crate) struct MsrIndices(Vec<u32>);

impl MsrIndices {
    /// Those of `kvm`.
    pub(crate) fn new(kvm: &Kvm) -> Result<Self, kvm_ioctls::Error> {
        Ok(Self(kvm.get_msr_index_list()?.as_slice().to_vec()))
    }
}

/// All that a guest can change of a vCPU.
pub(super) struct PowerOnState {
    regs: kvm_regs,
    sregs: kvm_sregs,
    fpu: kvm_fpu,
    /// None on a CPU without XSAVE.
    extended: Option<(Box<kvm_xsave>, kvm_xcrs)>,
    debugregs: kvm_debugregs,
    msrs: Vec<kvm_msr_entry>,
    lapic: kvm_lapic_state,
    mp_state: kvm_mp_state,
    events: kvm_vcpu_events,
    /// None where the guest cannot run guests of its own.
    nested: Option<Box<KvmNestedStateBuffer>>,
}

impl PowerOnState {
    pub(super) fn save(
        kvm: &Kvm,
        fd: &VcpuFd,
        msrs: &MsrIndices,
    ) -> Result<Self, kvm_ioctls::Error> {
        let extended = if kvm.check_extension(Cap::Xsave) && kvm.check_extension(Cap::Xcrs) {
            let xcrs = fd.get_xcrs()?;
            // KVM has no extended control registers for a guest whose CPUID has no XSAVE.
            (xcrs.nr_xcrs > 0).then_some((Box::new(fd.get_xsave()?), xcrs))
        } else {
            None
        };
        Ok(Self {
            regs: fd.get_regs()?,
            sregs: fd.get_sregs()?,
            fpu: fd.get_fpu()?,
            extended,
            debugregs: fd.get_debug_regs()?,
            msrs: read_msrs(fd, &msrs.0)?,
            lapic: fd.get_lapic()?,
            mp_state: fd.get_mp_state()?,
            events: fd.get_vcpu_events()?,
            nested: read_nested(kvm, fd),
        })
    }

    /// Writes it back. A guest of the guest is left first; control registers precede what depends upon them.
    pub(super) fn restore(&self, fd: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
        let Self {
            regs,
            sregs,
            fpu,
            extended,
            debugregs,
            msrs,
            lapic,
            mp_state,
            events,
            nested,
        } = self;
        if let Some(nested) = nested {
            fd.set_nested_state(nested)?;
        }
        fd.set_sregs(sregs)?;
        fd.set_regs(regs)?;
        fd.set_fpu(fpu)?;
        if let Some((xsave, xcrs)) = extended {
            fd.set_xcrs(xcrs)?;
            set_xsave(fd, xsave)?;
        }
        fd.set_debug_regs(debugregs)?;
        write_msrs(fd, msrs)?;
        fd.set_lapic(lapic)?;
        fd.set_mp_state(*mp_state)?;
        fd.set_vcpu_events(events)
    }
}

impl fmt::Debug for PowerOnState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PowerOnState").finish_non_exhaustive()
    }
}

fn read_nested(kvm: &Kvm, fd: &VcpuFd) -> Option<Box<KvmNestedStateBuffer>> {
    if !kvm.check_extension(Cap::NestedState) {
        return None;
    }
    let mut state = Box::new(KvmNestedStateBuffer::empty());
    fd.nested_state(&mut state).ok()?;
    Some(state)
}

/// All state components that the first 4 KiB do not hold are thereby put into their initial state, too.
#[expect(unsafe_code, reason = "KVM_SET_XSAVE may read more than a `kvm_xsave`")]
fn set_xsave(fd: &VcpuFd, xsave: &kvm_xsave) -> Result<(), kvm_ioctls::Error> {
    // SAFETY: KVM reads more than 4 KiB only where the process has asked for dynamic features with arch_prctl(2),
    // which this one never does.
    unsafe { fd.set_xsave(xsave) }
}

/// Reads each of these registers that can be read: KVM lists some that depend upon the guest's CPUID.
fn read_msrs(fd: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, kvm_ioctls::Error> {
    let mut values = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let wanted: Vec<_> = rest
            .iter()
            .map(|&index| kvm_msr_entry {
                index,
                ..Default::default()
            })
            .collect();
        let mut msrs = msrs(&wanted)?;
        // KVM stops at the first that it cannot read, and says how many it has read.
        let read = fd.get_msrs(&mut msrs)?;
        values.extend(msrs.as_slice().iter().take(read));
        rest = rest.get(read + 1..).unwrap_or_default();
    }
    Ok(values)
}

/// Writes each of these registers that can be written: some only tell what the CPU is.
fn write_msrs(fd: &VcpuFd, values: &[kvm_msr_entry]) -> Result<(), kvm_ioctls::Error> {
    let mut rest = values;
    while !rest.is_empty() {
        let written = fd.set_msrs(&msrs(rest)?)?;
        rest = rest.get(written + 1..).unwrap_or_default();
    }
    Ok(())
}

fn msrs(entries: &[kvm_msr_entry]) -> Result<Msrs, kvm_ioctls::Error> {
    Msrs::from_entries(entries).map_err(|_| kvm_ioctls::Error::new(libc::E2BIG))
}
