//! A vCPU's time stamp counter, which counts on where a guest is restored: it never goes back, and those of a VM's vCPUs
//! stay as far apart as they were.

use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

use super::msrs::{self, Msr};
use super::{VcpuError, ioctls};

/// A vCPU's time stamp counter when it was read.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Tsc {
    /// The frequency that the guest sees. None where the host's counter is of no use.
    khz: Option<u32>,
    value: u64,
    /// What KVM adds to the host's counter, modulo 2^64. None if it does not tell, or if it does more than to add: where the
    /// guest's frequency is not the host's, or the host's is not fixed.
    offset: Option<u64>,
}

/// What this host's KVM can do with a vCPU's time stamp counter.
#[derive(Debug, Clone, Copy)]
pub(super) struct TscScope {
    /// The frequency of the host's.
    khz: Option<u32>,
    /// Whether it tells and takes the offset.
    offset: bool,
}

impl TscScope {
    /// `fd` is a new vCPU.
    pub(super) fn new(fd: &VcpuFd) -> Self {
        Self {
            khz: khz(fd),
            offset: ioctls::tsc_offset(fd).is_some(),
        }
    }
}

/// The frequency of a vCPU's counter, if it has a fixed one.
fn khz(fd: &VcpuFd) -> Option<u32> {
    fd.get_tsc_khz().ok().filter(|khz| *khz > 0)
}

impl Tsc {
    /// Reads what belongs to the `value` that was read just now.
    pub(super) fn read(fd: &VcpuFd, scope: &TscScope, value: u64) -> Self {
        let khz = khz(fd);
        let adds = khz.is_some() && same_frequency(khz, scope.khz);
        Self {
            khz,
            value,
            offset: ioctls::tsc_offset(fd).filter(|_| adds),
        }
    }

    /// Has the counter count on with a clock by so many nanoseconds, at the end of which the host's counter is another.
    pub(crate) fn advance(&mut self, nanoseconds: u64, host: HostTscs) {
        let cycles = self.cycles(nanoseconds);
        self.value = self.value.wrapping_add(cycles);
        let shift = host.then.wrapping_sub(host.now).wrapping_add(cycles);
        self.offset = self.offset.map(|offset| offset.wrapping_add(shift));
    }

    fn cycles(&self, nanoseconds: u64) -> u64 {
        const NANOSECONDS_PER_MILLISECOND: u128 = 1_000_000;
        let khz = u128::from(self.khz.unwrap_or(0));
        let cycles = u128::from(nanoseconds) * khz / NANOSECONDS_PER_MILLISECOND;
        u64::try_from(cycles).unwrap_or(u64::MAX)
    }

    /// Sets the counter of a vCPU that has not run yet.
    pub(super) fn restore(
        &self,
        fd: &VcpuFd,
        scope: &TscScope,
        vcpu: u32,
    ) -> Result<(), VcpuError> {
        let refused = |step| move |source| VcpuError::Step { step, vcpu, source };
        if let Some(khz) = self.khz
            && self.khz != scope.khz
        {
            fd.set_tsc_khz(khz)
                .map_err(refused("take the frequency of the time stamp counter"))?;
        }
        match self.offset {
            Some(offset) if scope.offset && same_frequency(self.khz, scope.khz) => {
                ioctls::set_tsc_offset(fd, offset)
                    .map_err(refused("take the offset of the time stamp counter"))?;
            }
            _ => self.set_value(fd, vcpu)?,
        }
        let here = msrs::read(fd, &[msrs::TSC])
            .map_err(refused("tell the time stamp counter"))?
            .first()
            .map_or(0, |msr| msr.data);
        if here < self.value {
            return Err(VcpuError::TscGoesBack {
                saved: self.value,
                here,
                vcpu,
            });
        }
        Ok(())
    }

    /// Sets the counter to the value. KVM takes what is written to several vCPUs within a second for one counter, and has
    /// them agree exactly.
    pub(super) fn set_value(&self, fd: &VcpuFd, vcpu: u32) -> Result<(), VcpuError> {
        let msr = Msr {
            index: msrs::TSC,
            data: self.value,
        };
        match msrs::write(fd, &[msr]) {
            Ok(_) => Ok(()),
            Err(source) => Err(VcpuError::Step {
                step: "take the time stamp counter",
                vcpu,
                source,
            }),
        }
    }
}

/// The counters of two hosts (or of one, at two times) when the guest's clock had the time from which, and the time to
/// which, it is [advanced](Tsc::advance).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct HostTscs {
    pub(crate) then: u64,
    pub(crate) now: u64,
}

/// Whether a counter of one frequency passes for one of the other: KVM does not scale what is this close
/// (`tsc_tolerance_ppm` in the kernel's arch/x86/kvm/x86.c).
pub(crate) fn same_frequency(one: Option<u32>, other: Option<u32>) -> bool {
    const TOLERANCE_PPM: u64 = 250;
    match (one, other) {
        (Some(one), Some(other)) => {
            u64::from(one.abs_diff(other)) * 1_000_000 <= u64::from(one) * TOLERANCE_PPM
        }
        (None, None) => true,
        _ => false,
    }
}

#[cfg(test)]
impl Tsc {
    pub(super) fn value(&self) -> u64 {
        self.value
    }

    pub(super) fn offset(&self) -> Option<u64> {
        self.offset
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn any_tsc() -> impl Strategy<Value = Tsc> {
        any::<(Option<u32>, u64, Option<u64>)>().prop_map(|(khz, value, offset)| Tsc {
            khz,
            value,
            offset,
        })
    }

    proptest! {
        /// At the clock's second time the counter has what it had at its first, and the cycles of the time between.
        #[test]
        fn counter_goes_with_the_clock(
            tsc in any_tsc(),
            nanoseconds in any::<u64>(),
            then in any::<u64>(),
            now in any::<u64>(),
        ) {
            let mut advanced = tsc;
            advanced.advance(nanoseconds, HostTscs { then, now });
            prop_assert_eq!(advanced.khz, tsc.khz);
            let passed = advanced.value.wrapping_sub(tsc.value);
            if let (Some(old), Some(new)) = (tsc.offset, advanced.offset) {
                let [was, is] = [then.wrapping_add(old), now.wrapping_add(new)];
                prop_assert_eq!(is.wrapping_sub(was), passed);
            }
        }
    }

    #[test]
    fn a_second_has_as_many_cycles_as_the_frequency_says() {
        let mut tsc = Tsc {
            khz: Some(2_596_132),
            value: 5,
            offset: Some(0),
        };
        let (then, now) = (1000, 4000);
        tsc.advance(1_000_000_000, HostTscs { then, now });
        assert_eq!(tsc.value, 5 + 2_596_132_000);
        assert_eq!(tsc.offset, Some(2_596_132_000 - 3000));
    }

    #[test]
    fn frequencies_are_the_same_within_the_kernels_tolerance() {
        assert!(same_frequency(Some(2_000_000), Some(2_000_500)));
        assert!(!same_frequency(Some(2_000_000), Some(2_000_501)));
        assert!(!same_frequency(Some(2_000_000), None));
        assert!(same_frequency(None, None));
    }
}
