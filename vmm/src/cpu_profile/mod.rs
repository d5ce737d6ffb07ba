//! What a guest has been told of its CPUs, and whether a host can keep that promise: compared before anything of a VM is
//! restored.
//!
//! A host may offer more than the guest was told: the restored VM gets the [saved CPUID](CpuProfile::cpuid). It may not
//! offer less. What no CPUID tells, such as the features in Intel's capability MSRs, is found out when a vCPU is restored:
//! an MSR that KVM does not take is an error there.

mod leaves;

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};
use serde::{Deserialize, Serialize};

use self::leaves::{Leaves, Register, describe_bits};
use crate::cpuid::CommonCpuid;
use crate::saved::{List, Raw};
use crate::vcpu::{XsaveSize, same_frequency};

/// What a guest has been told of its CPUs.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct CpuProfile {
    /// What all vCPUs have in common.
    cpuid: List<Raw<kvm_cpuid_entry2>, KVM_MAX_CPUID_ENTRIES>,
    /// The frequency of the time stamp counter; none if it has no fixed one.
    tsc_khz: Option<u32>,
    /// The bytes that the FPU's and the extended state take.
    xsave_size: usize,
}

/// What this host offers to guests.
#[derive(Debug)]
pub(crate) struct HostCpu {
    cpuid: CommonCpuid,
    tsc_khz: Option<u32>,
    tsc_scaling: bool,
    xsave_size: usize,
    kvmclock: bool,
    nested: bool,
}

impl HostCpu {
    /// What `kvm` offers to a VM with `vcpus` vCPUs. It makes a VM to ask; it takes a millisecond.
    pub(crate) fn new(kvm: &Kvm, vcpus: u32) -> Result<Self, kvm_ioctls::Error> {
        let vcpu = kvm.create_vm()?.create_vcpu(0)?;
        Ok(Self {
            cpuid: CommonCpuid::new(kvm, vcpus)?,
            tsc_khz: vcpu.get_tsc_khz().ok().filter(|khz| *khz > 0),
            tsc_scaling: kvm.check_extension(Cap::TscControl),
            xsave_size: XsaveSize::new(kvm).bytes(),
            kvmclock: kvm.check_extension(Cap::AdjustClock),
            nested: kvm.check_extension(Cap::NestedState),
        })
    }
}

impl CpuProfile {
    /// Of a VM with this CPUID that has been made here, and not restored.
    pub(crate) fn new(cpuid: &CommonCpuid, host: &HostCpu) -> Option<Self> {
        let entries = cpuid.entries().iter().copied().map(Raw).collect();
        Some(Self {
            cpuid: List::new(entries)?,
            tsc_khz: host.tsc_khz,
            xsave_size: host.xsave_size,
        })
    }

    /// The CPUID to restore a VM with.
    pub(crate) fn cpuid(&self) -> CommonCpuid {
        CommonCpuid::from_entries(self.cpuid.iter().map(|entry| entry.0).collect())
    }

    /// In what `host` offers less than the guest was told. If it is nothing, the guest can be restored here.
    pub(crate) fn compare(&self, host: &HostCpu) -> Vec<Mismatch> {
        let (ours, theirs) = (Leaves(host.cpuid.entries()), self.cpuid());
        let theirs = Leaves(theirs.entries());
        let mut mismatches = leaves::compare(theirs, ours);
        let scalable = host.tsc_scaling && self.tsc_khz.is_some();
        if !scalable && !same_frequency(self.tsc_khz, host.tsc_khz) {
            mismatches.push(Mismatch::TscFrequency {
                saved: self.tsc_khz,
                here: host.tsc_khz,
            });
        }
        if self.xsave_size > host.xsave_size {
            mismatches.push(Mismatch::AtMost {
                what: "bytes of extended CPU state (XSAVE)",
                saved: self.xsave_size as u64,
                here: host.xsave_size as u64,
            });
        }
        if !host.kvmclock {
            mismatches.push(Mismatch::Kvmclock);
        }
        if !host.nested && theirs.can_nest() {
            mismatches.push(Mismatch::Nested);
        }
        mismatches
    }
}

/// Something in which this host offers less than a guest was told.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Mismatch {
    /// Another make of CPU.
    #[error("the VM's CPUs are of {saved:?}, and this host's of {here:?}")]
    Vendor {
        /// What the guest was told.
        saved: String,
        /// What there is.
        here: String,
    },
    /// Features that this host lacks.
    #[error("CPUID {register}: the VM has {}, which this host lacks", describe_bits(*register, *bits))]
    Features {
        /// Where they are told.
        register: Register,
        /// Their bits.
        bits: u32,
    },
    /// Part of the extended state is elsewhere, or of another size.
    #[error(
        "XSAVE component {component} is at byte {} and {} bytes long for the VM, and at {} and {} on this host",
        saved.0, saved.1, here.0, here.1
    )]
    XsaveComponent {
        /// Its bit in XCR0.
        component: u32,
        /// Offset and size that the guest was told.
        saved: (u32, u32),
        /// Those of this host.
        here: (u32, u32),
    },
    /// A leaf that has to be the same is not.
    #[error("CPUID {0} is not what the VM has")]
    Differs(Register),
    /// There is less of something than the guest was told.
    #[error("the VM has {saved} {what}, and this host {here}")]
    AtMost {
        /// Of what.
        what: &'static str,
        /// What the guest was told.
        saved: u64,
        /// What there is.
        here: u64,
    },
    /// The time stamp counter cannot count as fast, or as slowly.
    #[error(
        "the VM's time stamp counter has {}, this host's {}, and this host's CPU cannot scale it",
        describe_khz(*saved), describe_khz(*here)
    )]
    TscFrequency {
        /// The VM's.
        saved: Option<u32>,
        /// This host's.
        here: Option<u32>,
    },
    /// The guest's clock cannot be set.
    #[error("this host's KVM cannot set the guest's clock, kvmclock")]
    Kvmclock,
    /// The state of nested guests cannot be restored.
    #[error("the VM can run VMs of its own, and this host's KVM cannot take the state of that")]
    Nested,
}

fn describe_khz(khz: Option<u32>) -> String {
    khz.map_or_else(|| "no fixed frequency".into(), |khz| format!("{khz} kHz"))
}

#[cfg(any(test, fuzzing))]
impl CpuProfile {
    /// What `other` has less of, of what CPUID tells.
    pub(crate) fn lacks_of(&self, other: &Self) -> Vec<Mismatch> {
        let (ours, theirs) = (self.cpuid(), other.cpuid());
        leaves::compare(Leaves(ours.entries()), Leaves(theirs.entries()))
    }
}

#[cfg(test)]
mod tests;
