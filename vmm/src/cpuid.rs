//! What a vCPU says of itself: KVM's supported CPUID with this VM's topology written over it.
//!
//! The machine has one socket with a core for each vCPU and one thread in each core; APIC ids count from 0.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};

/// The most entries that KVM returns (`KVM_MAX_CPUID_ENTRIES` in the kernel's arch/x86/kvm/cpuid.h).
const MAX_ENTRIES: usize = 256;

/// Bits of leaf 1 (Intel SDM, volume 2, CPUID).
mod leaf1 {
    pub(super) const ECX_VMX: u32 = 1 << 5;
    pub(super) const ECX_X2APIC: u32 = 1 << 21;
    pub(super) const ECX_TSC_DEADLINE: u32 = 1 << 24;
    pub(super) const ECX_HYPERVISOR: u32 = 1 << 31;
    pub(super) const EDX_HTT: u32 = 1 << 28;
}

/// Whether there is SVM (AMD APM, volume 3, E.4.2), and the leaf that says what it can do (E.4.9).
const FEATURES_AMD: u32 = 0x8000_0001;
const ECX_SVM: u32 = 1 << 2;
const SVM: u32 = 0x8000_000a;

/// The CPUID that all vCPUs of a VM have in common.
#[derive(Debug, Clone)]
pub(crate) struct CommonCpuid {
    entries: Vec<kvm_cpuid_entry2>,
}

impl CommonCpuid {
    /// What `kvm` supports, for a VM with `vcpus` vCPUs.
    pub(crate) fn new(kvm: &Kvm, vcpus: u32) -> Result<Self, kvm_ioctls::Error> {
        let supported = kvm.get_supported_cpuid(MAX_ENTRIES)?;
        let deadline_timer = kvm.check_extension(Cap::TscDeadlineTimer);
        Ok(Self::from_supported(
            supported.as_slice(),
            vcpus,
            deadline_timer,
        ))
    }

    fn from_supported(supported: &[kvm_cpuid_entry2], vcpus: u32, deadline_timer: bool) -> Self {
        let mut entries = supported.to_vec();
        entries.retain(|entry| !matches!(entry.function, 0xb | 0x1f));
        let has_topology = supported.iter().any(|entry| entry.function == 0xb)
            || supported
                .iter()
                .any(|entry| entry.function == 0 && entry.eax >= 0xb);
        for entry in &mut entries {
            common(entry, vcpus, deadline_timer);
        }
        if has_topology {
            entries.extend(topology(0xb, vcpus));
        }
        if supported.iter().any(|entry| entry.function == 0x1f) {
            entries.extend(topology(0x1f, vcpus));
        }
        Self { entries }
    }

    /// The same for guests that are not to run VMs of their own.
    pub(crate) fn without_nesting(mut self) -> Self {
        self.entries.retain(|entry| entry.function != SVM);
        for entry in &mut self.entries {
            match entry.function {
                1 => entry.ecx &= !leaf1::ECX_VMX,
                FEATURES_AMD => entry.ecx &= !ECX_SVM,
                _ => {}
            }
        }
        self
    }

    /// The CPUID of the vCPU with this APIC id.
    pub(crate) fn of_vcpu(&self, apic_id: u32) -> Result<CpuId, vmm_sys_util::fam::Error> {
        let mut entries = self.entries.clone();
        for entry in &mut entries {
            match entry.function {
                // The initial APIC id has eight bits only; x2APIC ids are in leaf 0xb.
                1 => entry.ebx = (entry.ebx & 0x00ff_ffff) | (apic_id & 0xff) << 24,
                0xb | 0x1f => entry.edx = apic_id,
                // AMD APM volume 3, E.4.16: the extended APIC id, the core, and the node.
                0x8000_001e => {
                    entry.eax = apic_id;
                    entry.ebx = apic_id & 0xff;
                    entry.ecx = 0;
                }
                _ => {}
            }
        }
        CpuId::from_entries(&entries)
    }

    /// Of a VM that is restored.
    pub(crate) fn from_entries(entries: Vec<kvm_cpuid_entry2>) -> Self {
        Self { entries }
    }

    /// All that it tells, for the vCPU with APIC id 0.
    pub(crate) fn entries(&self) -> &[kvm_cpuid_entry2] {
        &self.entries
    }

    /// How many bits a guest physical address has.
    pub(crate) fn address_bits(&self) -> u32 {
        /// What a CPU has that does not say (Intel SDM, volume 3, 4.1.4).
        const DEFAULT: u32 = 36;
        self.entries
            .iter()
            .find(|entry| entry.function == 0x8000_0008)
            .map_or(DEFAULT, |entry| entry.eax & 0xff)
    }
}

fn common(entry: &mut kvm_cpuid_entry2, vcpus: u32, deadline_timer: bool) {
    match entry.function {
        1 => {
            entry.ecx |= leaf1::ECX_HYPERVISOR | leaf1::ECX_X2APIC;
            if deadline_timer {
                entry.ecx |= leaf1::ECX_TSC_DEADLINE;
            }
            // The number of addressable logical processors, valid if HTT is set.
            entry.ebx = (entry.ebx & 0xff00_ffff) | vcpus.min(255) << 16;
            if vcpus > 1 {
                entry.edx |= leaf1::EDX_HTT;
            } else {
                entry.edx &= !leaf1::EDX_HTT;
            }
        }
        // Intel's caches: who shares each (bits 25 to 14, minus one), and the cores in the package (31 to 26).
        4 if entry.eax & 0x1f != 0 => {
            let cores = (vcpus - 1).min(0x3f);
            entry.eax = (entry.eax & 0x3fff) | shared_by(entry.eax, vcpus) << 14 | cores << 26;
        }
        // AMD: the threads in the package minus one, and the bits of an APIC id that tell them apart.
        0x8000_0008 => {
            entry.ecx = (entry.ecx & !0xf0ff) | (vcpus - 1).min(0xff) | id_bits(vcpus) << 12;
        }
        // AMD's caches, as Intel's.
        0x8000_001d if entry.eax & 0x1f != 0 => {
            entry.eax = (entry.eax & 0x3fff) | shared_by(entry.eax, vcpus) << 14;
        }
        _ => {}
    }
}

/// How many vCPUs share a cache, minus one: its own core for levels 1 and 2, all cores beyond that.
fn shared_by(eax: u32, vcpus: u32) -> u32 {
    let level = eax >> 5 & 7;
    if level >= 3 {
        (vcpus - 1).min(0xfff)
    } else {
        0
    }
}

/// The two levels of the extended topology leaves: threads in a core, cores in the package.
fn topology(function: u32, vcpus: u32) -> [kvm_cpuid_entry2; 3] {
    const THREAD: u32 = 1 << 8;
    const CORE: u32 = 2 << 8;
    let level = |index, shift, count, kind| kvm_cpuid_entry2 {
        function,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: count,
        ecx: kind | index,
        ..Default::default()
    };
    [
        level(0, 0, 1, THREAD),
        level(1, id_bits(vcpus), vcpus, CORE),
        level(2, 0, 0, 0),
    ]
}

/// The bits of an APIC id that tell `vcpus` vCPUs apart.
fn id_bits(vcpus: u32) -> u32 {
    vcpus.next_power_of_two().trailing_zeros()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn supported() -> Vec<kvm_cpuid_entry2> {
        let leaf = |function, index, eax| kvm_cpuid_entry2 {
            function,
            index,
            eax,
            ..Default::default()
        };
        vec![
            leaf(0, 0, 0xd),
            leaf(1, 0, 0),
            leaf(4, 0, 1 << 5 | 1),
            leaf(4, 3, 3 << 5 | 3),
            leaf(4, 4, 0),
            leaf(0xb, 0, 0),
            leaf(0x8000_0008, 0, 0x3030),
            leaf(0x8000_001e, 0, 77),
        ]
    }

    fn entry(cpuid: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        *cpuid
            .as_slice()
            .iter()
            .find(|entry| (entry.function, entry.index) == (function, index))
            .unwrap()
    }

    #[test]
    fn topology_has_a_core_for_each_vcpu() {
        let common = CommonCpuid::from_supported(&supported(), 6, true);
        let cpuid = common.of_vcpu(5).unwrap();
        assert_eq!(entry(&cpuid, 1, 0).ebx, 5 << 24 | 6 << 16);
        assert_ne!(entry(&cpuid, 1, 0).edx & leaf1::EDX_HTT, 0);
        let [thread, core, end] = [0, 1, 2].map(|level| entry(&cpuid, 0xb, level));
        assert_eq!((thread.eax, thread.ebx, thread.ecx), (0, 1, 0x100));
        assert_eq!((core.eax, core.ebx, core.ecx), (3, 6, 0x201));
        assert_eq!((end.ebx, end.ecx), (0, 2));
        assert!([thread, core, end].iter().all(|level| level.edx == 5));
        assert_eq!(
            entry(&cpuid, 4, 0).eax,
            1 << 5 | 1 | 5 << 26,
            "the first level is private"
        );
        assert_eq!(entry(&cpuid, 4, 3).eax, 3 << 5 | 3 | 5 << 14 | 5 << 26);
        assert_eq!(entry(&cpuid, 4, 4).eax, 0, "the end of the list stays so");
        assert_eq!(entry(&cpuid, 0x8000_0008, 0).ecx, 5 | 3 << 12);
        assert_eq!(entry(&cpuid, 0x8000_001e, 0).eax, 5);
        assert_eq!(common.address_bits(), 48);
    }

    #[test]
    fn timer_needs_no_calibration_where_kvm_has_one() {
        let [with, without] = [true, false].map(|deadline_timer| {
            let common = CommonCpuid::from_supported(&supported(), 1, deadline_timer);
            entry(&common.of_vcpu(0).unwrap(), 1, 0).ecx
        });
        assert_ne!(with & leaf1::ECX_TSC_DEADLINE, 0);
        assert_eq!(without & leaf1::ECX_TSC_DEADLINE, 0);
        assert_ne!(without & leaf1::ECX_X2APIC, 0);
    }
}
