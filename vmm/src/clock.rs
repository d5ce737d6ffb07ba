//! The guest's clock, kvmclock: taken out of a VM, and put into another.
//!
//! kvmclock counts nanoseconds since the VM was made. It is what a Linux guest's monotonic clock is made of, with the time
//! stamp counters of the vCPUs, which therefore go along. It never goes back for a guest. KVM can say three more things of
//! it, all since Linux 5.16 but the first:
//!
//! * KVM_CLOCK_TSC_STABLE: all vCPUs read the same from it.
//! * KVM_CLOCK_REALTIME: what the host's wall clock was at the same moment. When it is set with this, KVM adds the time
//!   that has passed since on the wall clock, or none if the wall clock here is behind.
//! * KVM_CLOCK_HOST_TSC: what the host's time stamp counter was at the same moment, if kvmclock runs on that. Else it is
//!   read right after. With it the guest's counters keep their distance to the clock, and exactly that to each other, on
//!   another host (Documentation/virt/kvm/devices/vcpu.rst, KVM_VCPU_TSC_OFFSET, has the algorithm).

use std::arch::x86_64::_rdtsc;
use std::time::{SystemTime, UNIX_EPOCH};

use kvm_bindings::{KVM_CLOCK_HOST_TSC, KVM_CLOCK_REALTIME, kvm_clock_data};
use kvm_ioctls::{Cap, VmFd};
use serde::{Deserialize, Serialize};

use crate::vcpu::{HostTscs, VcpuState};

/// Why the clock could not be read or set.
#[derive(Debug, thiserror::Error)]
#[error("KVM does not {step} the guest's clock")]
pub(crate) struct ClockError {
    step: &'static str,
    source: kvm_ioctls::Error,
}

/// The clock at a moment.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ClockState {
    /// kvmclock, in nanoseconds.
    kvmclock: u64,
    /// The host's wall clock, in nanoseconds since 1970.
    realtime: u64,
    /// The host's time stamp counter.
    host_tsc: u64,
}

/// Whether the guest's clocks count the time between its saving and its restoring.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum TimeAway {
    /// They do: a guest that migrates was away for a moment, and its wall clock stays right.
    Counted,
    /// They do not: a guest restored from a snapshot finds no timeout expired that had not when it was saved. Its wall clock
    /// is as late as it was away, until something in the guest (NTP, say) sets it.
    Skipped,
}

impl ClockState {
    /// Reads the clock. The vCPUs must be paused, and their state saved already: their counters may not be behind the
    /// saved ones when they are set by the clock.
    pub(crate) fn save(vm: &VmFd) -> Result<Self, ClockError> {
        let step = "tell";
        let clock = vm
            .get_clock()
            .map_err(|source| ClockError { step, source })?;
        Ok(Self::new(&clock))
    }

    /// Of a clock that was read just now.
    fn new(clock: &kvm_clock_data) -> Self {
        let has = |flag| clock.flags & flag != 0;
        Self {
            kvmclock: clock.clock,
            realtime: if has(KVM_CLOCK_REALTIME) {
                clock.realtime
            } else {
                realtime()
            },
            host_tsc: if has(KVM_CLOCK_HOST_TSC) {
                clock.host_tsc
            } else {
                host_tsc()
            },
        }
    }

    /// Sets the clock of a VM whose vCPUs are there but have not run or been restored yet, and has the counters in `vcpus`,
    /// which are to be restored afterwards, count on with it. (In this order the guest's wall clock is right, too: KVM
    /// derives it from kvmclock when a vCPU is restored that has asked for it.)
    pub(crate) fn restore(
        &self,
        vm: &VmFd,
        time_away: TimeAway,
        vcpus: &mut [VcpuState],
    ) -> Result<(), ClockError> {
        let refused = |source| ClockError {
            step: "take",
            source,
        };
        let known_flags = u32::try_from(vm.check_extension_int(Cap::AdjustClock)).unwrap_or(0);
        let mut clock = kvm_clock_data {
            clock: self.kvmclock,
            ..Default::default()
        };
        match time_away {
            TimeAway::Skipped => {}
            TimeAway::Counted if known_flags & KVM_CLOCK_REALTIME != 0 => {
                clock.flags = KVM_CLOCK_REALTIME;
                clock.realtime = self.realtime;
            }
            TimeAway::Counted => {
                let away = realtime().saturating_sub(self.realtime);
                clock.clock = clock.clock.saturating_add(away);
            }
        }
        vm.set_clock(&clock).map_err(refused)?;
        let now = Self::new(&vm.get_clock().map_err(refused)?);
        let host = HostTscs {
            then: self.host_tsc,
            now: now.host_tsc,
        };
        let passed = now.kvmclock.saturating_sub(self.kvmclock);
        for tsc in vcpus.iter_mut().filter_map(VcpuState::tsc_mut) {
            tsc.advance(passed, host);
        }
        Ok(())
    }
}

fn realtime() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0, |now| u64::try_from(now.as_nanos()).unwrap_or(u64::MAX))
}

#[expect(unsafe_code, reason = "the intrinsic is unsafe")]
fn host_tsc() -> u64 {
    // SAFETY: every CPU with KVM has the instruction, which changes registers only.
    unsafe { _rdtsc() }
}

#[cfg(test)]
impl ClockState {
    pub(crate) fn kvmclock(&self) -> u64 {
        self.kvmclock
    }

    /// Has it been saved so many nanoseconds earlier.
    pub(crate) fn age(&mut self, nanoseconds: u64) {
        self.realtime -= nanoseconds;
    }
}
