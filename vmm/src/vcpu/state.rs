//! A vCPU's state: taken out of it, put into another, and at a reset put back as it was at power-on.
//!
//! A snapshot and a migration [restore](VcpuState::restore) what a guest has, into a vCPU that has not run yet. A reset,
//! for which KVM has no call, [brings back](VcpuState::reset) what was read when the vCPU was new. Both write the same
//! registers in the same way but for two things: a reset leaves a guest of the guest before all else, and starts the
//! time stamp counter again, which a restored guest sees go on.
//!
//! A guest that runs guests of its own is saved with what KVM keeps for that, a running one included; KVM tells whether
//! it can take that where it is restored.

use std::sync::Arc;

use kvm_bindings::nested::KvmNestedStateBuffer;
use kvm_bindings::{
    KVM_MAX_MSR_ENTRIES, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd};
use serde::{Deserialize, Serialize};
use zerocopy::IntoBytes;

use super::VcpuError;
use super::ioctls::{self, Pdptrs, XsaveSize};
use super::msrs::{self, Msr};
use super::tsc::{Tsc, TscScope};
use crate::saved::{List, Raw, RawBytes};

/// The model specific registers that KVM keeps for a guest.
#[derive(Debug, Clone)]
pub(crate) struct MsrIndices(Arc<[u32]>);

impl MsrIndices {
    /// Those that `kvm` lists, and those that it keeps all the same.
    pub(crate) fn new(kvm: &Kvm) -> Result<Self, kvm_ioctls::Error> {
        let listed = kvm.get_msr_index_list()?;
        let unlisted = msrs::mtrrs().filter(|index| !listed.as_slice().contains(index));
        Ok(Self(
            listed.as_slice().iter().copied().chain(unlisted).collect(),
        ))
    }
}

/// What this host's KVM can tell of a vCPU.
#[derive(Debug)]
pub(super) struct Scope {
    msrs: MsrIndices,
    xsave: XsaveSize,
    sregs2: bool,
    xcrs: bool,
    nested: bool,
    tsc: TscScope,
}

impl Scope {
    /// `fd` is a new vCPU.
    pub(super) fn new(kvm: &Kvm, fd: &VcpuFd, msrs: &MsrIndices) -> Self {
        Self {
            msrs: msrs.clone(),
            xsave: XsaveSize::new(kvm),
            sregs2: kvm.check_extension_raw(kvm_bindings::KVM_CAP_SREGS2.into()) > 0,
            xcrs: kvm.check_extension(Cap::Xcrs),
            nested: kvm.check_extension(Cap::NestedState),
            tsc: TscScope::new(fd),
        }
    }
}

/// More than any CPU has: with AMX, the largest yet, it is 11 KiB.
const XSAVE_MAX: usize = 64 << 10;

/// All that a guest can change of a vCPU.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct VcpuState {
    regs: Raw<kvm_regs>,
    sregs: Raw<kvm_sregs>,
    /// In PAE mode, if KVM tells (it does since Linux 5.14; else it reads them from memory).
    pdptrs: Option<Pdptrs>,
    /// With the FPU's registers, on a CPU without XSAVE nothing else.
    xsave: RawBytes<XSAVE_MAX>,
    /// None for a guest without XSAVE.
    xcrs: Option<Raw<kvm_xcrs>>,
    debugregs: Raw<kvm_debugregs>,
    /// Those that KVM keeps and can read, but for the time stamp counter and its deadline, which have fields of their own.
    msrs: List<Msr, KVM_MAX_MSR_ENTRIES>,
    /// None on a KVM without any.
    tsc: Option<Tsc>,
    lapic: Raw<kvm_lapic_state>,
    /// When the local APIC's timer goes off, in its mode for that. None on a KVM without that mode.
    tsc_deadline: Option<u64>,
    mp_state: u32,
    events: Raw<kvm_vcpu_events>,
    /// None where the guest cannot run guests of its own.
    nested: Option<RawBytes<{ size_of::<KvmNestedStateBuffer>() }>>,
}

impl VcpuState {
    /// Reads the state of a vCPU that is between two instructions.
    pub(super) fn read(fd: &VcpuFd, scope: &Scope, vcpu: u32) -> Result<Self, VcpuError> {
        let step = |step| move |source| VcpuError::Step { step, vcpu, source };
        let too_much = |what| VcpuError::TooMuchState { what, vcpu };
        // First, since KVM then takes an INIT or a start-up message that is under way, which changes the rest.
        let mp_state = fd.get_mp_state().map_err(step("tell the MP state"))?;
        let (sregs, pdptrs) = if scope.sregs2 {
            ioctls::sregs2(fd).map_err(step("tell the system registers"))?
        } else {
            let mut sregs = fd.get_sregs().map_err(step("tell the system registers"))?;
            // The events have it, and it would be injected twice.
            sregs.interrupt_bitmap = [0; 4];
            (sregs, None)
        };
        let xsave = ioctls::xsave(fd, scope.xsave).map_err(step("tell the FPU's state"))?;
        let xcrs = if scope.xcrs {
            let xcrs = fd.get_xcrs().map_err(step("tell the XCRs"))?;
            // KVM has none for a guest whose CPUID has no XSAVE.
            (xcrs.nr_xcrs > 0).then_some(Raw(xcrs))
        } else {
            None
        };
        // Before the local APIC: if the deadline passes meanwhile, the guest has an interrupt too many, not too few.
        let mut msrs = msrs::read(fd, &scope.msrs.0).map_err(step("tell the MSRs"))?;
        let mut take = |index| {
            let at = msrs.iter().position(|msr| msr.index == index)?;
            Some(msrs.remove(at).data)
        };
        let tsc_deadline = take(msrs::TSC_DEADLINE);
        let tsc = take(msrs::TSC).map(|value| Tsc::read(fd, &scope.tsc, value));
        let lapic = fd.get_lapic().map_err(step("tell the local APIC"))?;
        let nested = read_nested(fd, scope).map_err(step("tell the nested state"))?;
        Ok(Self {
            regs: Raw(fd.get_regs().map_err(step("tell the registers"))?),
            sregs: Raw(sregs),
            pdptrs,
            xsave: RawBytes::new(xsave).ok_or_else(|| too_much("XSAVE state"))?,
            xcrs,
            debugregs: Raw(fd
                .get_debug_regs()
                .map_err(step("tell the debug registers"))?),
            msrs: List::new(msrs).ok_or_else(|| too_much("MSRs"))?,
            tsc,
            lapic: Raw(lapic),
            tsc_deadline,
            mp_state: mp_state.mp_state,
            // Last, since the other calls may still change it.
            events: Raw(fd.get_vcpu_events().map_err(step("tell the events"))?),
            nested,
        })
    }

    /// Puts the state of another vCPU into one that has not run yet and whose CPUID is the same, with the time stamp
    /// counter as [`ClockState::restore`](crate::clock::ClockState::restore) has set it.
    ///
    /// Every register must be taken. An MSR that is not is an error, unless it reads the same here anyway (it tells what
    /// the CPU is, and the CPU is the same), or is zero and not here at all (it belongs to a feature that the guest has
    /// never touched, such as Hyper-V's).
    pub(super) fn restore(&self, fd: &VcpuFd, scope: &Scope, vcpu: u32) -> Result<(), VcpuError> {
        self.write_registers(fd, scope, vcpu)?;
        if let Some(tsc) = &self.tsc {
            tsc.restore(fd, &scope.tsc, vcpu)?;
        }
        if let Some(&(msr, here)) = self.write_msrs(fd, vcpu)?.first() {
            return Err(VcpuError::Msr {
                index: msr.index,
                data: msr.data,
                here,
                vcpu,
            });
        }
        self.write_interrupts(fd, vcpu)?;
        // After the system registers and MSRs that it depends on, and after the events, which may leave a nested guest.
        self.write_nested(fd, vcpu)
    }

    /// Puts the state that a vCPU had at power-on back into it.
    pub(super) fn reset(&self, fd: &VcpuFd, scope: &Scope, vcpu: u32) -> Result<(), VcpuError> {
        // First, since what follows would go to a nested guest.
        self.write_nested(fd, vcpu)?;
        self.write_registers(fd, scope, vcpu)?;
        if let Some(tsc) = &self.tsc {
            tsc.set_value(fd, vcpu)?;
        }
        for (msr, here) in self.write_msrs(fd, vcpu)? {
            log::warn!(
                "vCPU {vcpu}: KVM does not reset MSR {:#x} from {here:#x?} to {:#x}",
                msr.index,
                msr.data
            );
        }
        self.write_interrupts(fd, vcpu)
    }

    /// Control registers precede what depends upon them.
    fn write_registers(&self, fd: &VcpuFd, scope: &Scope, vcpu: u32) -> Result<(), VcpuError> {
        let step = |step| move |source| VcpuError::Step { step, vcpu, source };
        if scope.sregs2 {
            ioctls::set_sregs2(fd, &self.sregs, self.pdptrs)
        } else {
            fd.set_sregs(&self.sregs)
        }
        .map_err(step("take the system registers"))?;
        if let Some(xcrs) = &self.xcrs {
            fd.set_xcrs(xcrs).map_err(step("take the XCRs"))?;
        }
        ioctls::set_xsave(fd, scope.xsave, &self.xsave).map_err(step("take the FPU's state"))?;
        // Before the events: this call forgets a pending exception.
        fd.set_regs(&self.regs)
            .map_err(step("take the registers"))?;
        fd.set_debug_regs(&self.debugregs)
            .map_err(step("take the debug registers"))
    }

    /// Returns the registers that were not taken, and what is there instead.
    fn write_msrs(&self, fd: &VcpuFd, vcpu: u32) -> Result<Vec<(Msr, Option<u64>)>, VcpuError> {
        msrs::write(fd, &self.msrs).map_err(|source| VcpuError::Step {
            step: "take the MSRs",
            vcpu,
            source,
        })
    }

    fn write_interrupts(&self, fd: &VcpuFd, vcpu: u32) -> Result<(), VcpuError> {
        let step = |step| move |source| VcpuError::Step { step, vcpu, source };
        // After the system registers, which tell in which mode it is.
        fd.set_lapic(&self.lapic)
            .map_err(step("take the local APIC"))?;
        if let Some(data) = self.tsc_deadline {
            // After the local APIC, whose timer ignores it in another mode.
            let deadline = Msr {
                index: msrs::TSC_DEADLINE,
                data,
            };
            msrs::write(fd, &[deadline]).map_err(step("take the timer's deadline"))?;
        }
        let mp_state = kvm_mp_state {
            mp_state: self.mp_state,
        };
        fd.set_mp_state(mp_state)
            .map_err(step("take the MP state"))?;
        fd.set_vcpu_events(&self.events)
            .map_err(step("take the events"))
    }

    fn write_nested(&self, fd: &VcpuFd, vcpu: u32) -> Result<(), VcpuError> {
        let Some(bytes) = &self.nested else {
            return Ok(());
        };
        let mut state = KvmNestedStateBuffer::empty();
        // A buffer of a length that the state contradicts is refused by KVM.
        let result = match state.as_mut_bytes().get_mut(..bytes.len()) {
            Some(buffer) => {
                buffer.copy_from_slice(bytes);
                fd.set_nested_state(&state)
            }
            None => Err(kvm_ioctls::Error::new(libc::E2BIG)),
        };
        result.map_err(|source| VcpuError::Step {
            step: "take the nested state",
            vcpu,
            source,
        })
    }

    /// The time stamp counter, which goes on where the clock does.
    pub(crate) fn tsc_mut(&mut self) -> Option<&mut Tsc> {
        self.tsc.as_mut()
    }
}

fn read_nested<const MAX: usize>(
    fd: &VcpuFd,
    scope: &Scope,
) -> Result<Option<RawBytes<MAX>>, kvm_ioctls::Error> {
    if !scope.nested {
        return Ok(None);
    }
    let mut state = Box::new(KvmNestedStateBuffer::empty());
    match fd.nested_state(&mut state) {
        Ok(_) => {}
        // The module was told not to nest.
        Err(error) if error.errno() == libc::EINVAL => return Ok(None),
        Err(error) => return Err(error),
    }
    let size = usize::try_from(state.size).unwrap_or(usize::MAX);
    let bytes = state.as_bytes().get(..size);
    match bytes.and_then(|bytes| RawBytes::new(bytes.to_vec())) {
        Some(bytes) => Ok(Some(bytes)),
        None => Err(kvm_ioctls::Error::new(libc::E2BIG)),
    }
}

#[cfg(test)]
mod tests;
