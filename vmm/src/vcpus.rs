//! All vCPUs of a VM, from whichever thread they are spoken to.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::vcpu::{Saving, Vcpu, VcpuError, VcpuState, VcpuThread};

/// Pauses and resumes the vCPUs of a VM that another thread runs.
#[derive(Debug, Clone, Default)]
pub struct Vcpus {
    shared: Arc<Mutex<Shared>>,
}

/// What the vCPUs do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RunState {
    /// They run.
    Running,
    /// They have been asked to stop, and one or more is not there yet.
    Pausing,
    /// They stand still.
    Paused,
}

#[derive(Debug, Default)]
struct Shared {
    threads: Vec<VcpuThread>,
    paused: bool,
}

impl Vcpus {
    /// Asks all vCPUs to stop at an instruction boundary, each with the access that it is in the middle of completed.
    /// Returns at once; [`Vcpus::wait_paused`] waits for them.
    pub fn pause(&self) {
        let mut shared = self.lock();
        shared.paused = true;
        shared.threads.iter().for_each(VcpuThread::pause);
    }

    /// Waits until all vCPUs are paused, and says whether they were by the deadline. (A vCPU that waits for a device is
    /// paused when the device has answered, or has missed its own deadline.)
    pub fn wait_paused(&self, deadline: Instant) -> bool {
        // The lock is not held while waiting, so that a resume can come between.
        let gates: Vec<_> = self.lock().threads.iter().map(VcpuThread::gate).collect();
        gates.iter().all(|gate| gate.wait_parked(deadline))
    }

    /// Reads the state of all vCPUs, which must be paused and stay so meanwhile. Each reads its own, all at the same time.
    pub(crate) fn save(&self) -> Result<Vec<VcpuState>, VcpuError> {
        let saving: Vec<_> = {
            let shared = self.lock();
            let saving = shared.threads.iter().map(VcpuThread::save);
            saving.collect::<Result<_, _>>()?
        };
        saving.into_iter().map(Saving::wait).collect()
    }

    /// What they do, without waiting for anything.
    pub(crate) fn run_state(&self) -> RunState {
        let shared = self.lock();
        if !shared.paused {
            return RunState::Running;
        }
        let now = Instant::now();
        let is_parked = |thread: &VcpuThread| thread.gate().wait_parked(now);
        if shared.threads.iter().all(is_parked) {
            RunState::Paused
        } else {
            RunState::Pausing
        }
    }

    /// Whether all of them stand still.
    pub(crate) fn are_paused(&self) -> bool {
        self.run_state() == RunState::Paused
    }

    /// Lets paused vCPUs go on.
    pub fn resume(&self) {
        let mut shared = self.lock();
        shared.paused = false;
        shared.threads.iter().for_each(VcpuThread::resume);
    }

    /// Holds those that run for a while, which begins when each comes out of the guest.
    pub(crate) fn nap(&self, length: Duration) {
        let shared = self.lock();
        shared.threads.iter().for_each(|thread| thread.nap(length));
    }

    /// Starts the vCPUs; if they were paused, they stay so.
    pub(crate) fn start(&self, vcpus: Vec<Vcpu>) -> Result<(), VcpuError> {
        let mut shared = self.lock();
        for vcpu in vcpus {
            let thread = VcpuThread::spawn(vcpu, shared.paused)?;
            shared.threads.push(thread);
        }
        Ok(())
    }

    /// Ends all threads and gives the vCPUs back.
    pub(crate) fn stop(&self) -> Vec<Vcpu> {
        let threads = std::mem::take(&mut self.lock().threads);
        threads.iter().for_each(VcpuThread::stop);
        threads.into_iter().filter_map(VcpuThread::join).collect()
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
