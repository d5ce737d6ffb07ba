//! Opening KVM, and saying in plain words why it will not do.

use std::arch::x86_64::__cpuid;
use std::sync::Arc;

use kvm_bindings::{KVM_API_VERSION, kvm_pit_config};
use kvm_ioctls::{Cap, Kvm, VmFd};

use crate::layout;

/// Why there is no VM.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// There is no /dev/kvm.
    #[error(
        "/dev/kvm does not exist: load the module kvm_intel or kvm_amd, and if there is none for this machine, switch \
         on virtualisation in its firmware, or nested virtualisation in its hypervisor"
    )]
    Absent,
    /// /dev/kvm may not be opened.
    #[error(
        "no permission to open /dev/kvm: join the group kvm (`usermod -aG kvm $USER`) or run as root"
    )]
    Permission,
    /// /dev/kvm does not open for another reason.
    #[error("cannot open /dev/kvm")]
    Open(#[source] kvm_ioctls::Error),
    /// /dev/kvm speaks another version of the API.
    #[error("/dev/kvm has API version {0}, not {KVM_API_VERSION}: this kernel is too old")]
    ApiVersion(i32),
    /// KVM lacks something.
    #[error(
        "KVM lacks {0}: this kernel is too old or was built without it; Linux 5.10 or later is needed"
    )]
    Lacks(&'static str),
    /// More vCPUs than KVM offers.
    #[error("--cpus: KVM offers {available} vCPUs at most, not {wanted}")]
    TooManyVcpus {
        /// How many were asked for.
        wanted: u32,
        /// How many there can be.
        available: usize,
    },
    /// KVM refused a step of setting a VM up.
    #[error("KVM does not {step}")]
    Step {
        /// What was tried.
        step: &'static str,
        /// What KVM says.
        #[source]
        source: kvm_ioctls::Error,
    },
}

/// Opens KVM and sees that it has what is needed.
pub(crate) fn open() -> Result<Kvm, KvmError> {
    let kvm = Kvm::new().map_err(|error| match error.errno() {
        libc::ENOENT | libc::ENODEV | libc::ENXIO => KvmError::Absent,
        libc::EACCES | libc::EPERM => KvmError::Permission,
        _ => KvmError::Open(error),
    })?;
    let version = kvm.get_api_version();
    if u32::try_from(version) != Ok(KVM_API_VERSION) {
        return Err(KvmError::ApiVersion(version));
    }
    for (cap, name) in [
        (Cap::Irqchip, "an in-kernel interrupt controller"),
        (Cap::Irqfd, "irqfd"),
        (Cap::IrqfdResample, "irqfd with resampling"),
        (Cap::Ioeventfd, "ioeventfd"),
        (Cap::IoeventfdNoLength, "ioeventfd for writes of any width"),
        (Cap::IrqRouting, "interrupt routing"),
        (Cap::SignalMsi, "message signalled interrupts"),
        (Cap::Pit2, "an in-kernel timer"),
        (Cap::ReadonlyMem, "read-only memory slots"),
        (Cap::ImmediateExit, "immediate exit"),
        (Cap::SetTssAddr, "a configurable TSS address"),
        (Cap::SetIdentityMapAddr, "a configurable identity map"),
        (Cap::ExtCpuid, "CPUID"),
        (Cap::MpState, "processor states"),
        (Cap::VcpuEvents, "vCPU events"),
    ] {
        if !kvm.check_extension(cap) {
            return Err(KvmError::Lacks(name));
        }
    }
    Ok(kvm)
}

/// Makes a VM that `vcpus` vCPUs can be added to, once it has its [`create_chips`].
pub(crate) fn create_vm(kvm: &Kvm, vcpus: u32) -> Result<Arc<VmFd>, KvmError> {
    let available = kvm.get_max_vcpus();
    if vcpus as usize > available {
        return Err(KvmError::TooManyVcpus {
            wanted: vcpus,
            available,
        });
    }
    let step = |step| move |source| KvmError::Step { step, source };
    let vm = kvm.create_vm().map_err(step("create a VM"))?;
    vm.set_identity_map_address(layout::KVM_IDENTITY_MAP)
        .map_err(step("place the identity map"))?;
    vm.set_tss_address(usize::try_from(layout::KVM_TSS).unwrap_or(usize::MAX))
        .map_err(step("place the TSS"))?;
    Ok(Arc::new(vm))
}

/// Gives a VM the interrupt controllers and the timer of a PC. To be done when its RAM is there: KVM takes 0.3 ms for
/// 512 MiB of it before this, and 6 ms after.
pub(crate) fn create_chips(vm: &VmFd) -> Result<(), KvmError> {
    let step = |step| move |source| KvmError::Step { step, source };
    vm.create_irq_chip()
        .map_err(step("create the interrupt controllers"))?;
    vm.create_pit2(kvm_pit_config::default())
        .map_err(step("create the timer"))
}

/// Whether this KVM only emulates a guest that is not paravirtualised, instruction by instruction: the CPU then has
/// neither VMX nor SVM. Simple guests run there, slowly; no stock Linux kernel boots.
pub fn only_emulates() -> bool {
    /// VMX: bit 5 of ECX (Intel SDM, CPUID leaf 1).
    const VMX: u32 = 1 << 5;
    /// SVM: bit 2 of ECX (AMD APM, CPUID leaf 0x8000_0001).
    const SVM: u32 = 1 << 2;
    let vmx = __cpuid(1).ecx & VMX != 0;
    let svm = __cpuid(0x8000_0000).eax > 0x8000_0000 && __cpuid(0x8000_0001).ecx & SVM != 0;
    !vmx && !svm
}
