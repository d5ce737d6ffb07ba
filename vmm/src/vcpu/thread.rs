//! The thread that runs a vCPU, and how others interrupt it.
//!
//! A kick is a signal whose handler, on the vCPU's own thread, sets `kvm_run.immediate_exit`: KVM_RUN then returns at
//! once, whether the signal came while it ran or just before. Nobody else writes to `kvm_run`.
#![expect(unsafe_code, reason = "a signal handler writes to kvm_run")]

use std::cell::Cell;

use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use libc::{c_int, c_void, siginfo_t};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use super::{Next, Vcpu, VcpuError, VcpuState};

thread_local! {
    /// This thread's vCPU's `immediate_exit`, while there is one. (Constant and without a destructor, it is safe to
    /// touch in a signal handler.)
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(ptr::null_mut()) };
}

/// Makes this process able to kick vCPUs.
pub(crate) fn catch_kicks() -> Result<(), vmm_sys_util::errno::Error> {
    extern "C" fn on_kick(_: c_int, _: *mut siginfo_t, _: *mut c_void) {
        let _ = IMMEDIATE_EXIT.try_with(|immediate_exit| {
            let pointer = immediate_exit.get();
            if !pointer.is_null() {
                // SAFETY: not null, it points into the `kvm_run` of the vCPU that this thread owns.
                unsafe { pointer.write_volatile(1) };
            }
        });
    }
    register_signal_handler(SIGRTMIN(), on_kick)
}

/// A vCPU that runs on a thread of its own.
#[derive(Debug)]
pub(crate) struct VcpuThread {
    id: u32,
    gate: Arc<Gate>,
    thread: JoinHandle<Vcpu>,
}

impl VcpuThread {
    /// Starts running `vcpu`, or has it wait to be let go.
    pub(crate) fn spawn(vcpu: Vcpu, paused: bool) -> Result<Self, VcpuError> {
        let id = vcpu.id;
        let gate = Arc::new(Gate::default());
        if paused {
            gate.want(Wanted::Pause);
        }
        let thread = thread::Builder::new()
            .name(format!("vcpu{id}"))
            .stack_size(STACK_SIZE)
            .spawn({
                let gate = gate.clone();
                move || run(vcpu, &gate)
            })
            .map_err(|source| VcpuError::Thread { vcpu: id, source })?;
        Ok(Self { id, gate, thread })
    }

    /// Has the vCPU stop at an instruction boundary, with the access that it was in the middle of completed. It does
    /// so soon; its [`Gate`] tells when.
    pub(crate) fn pause(&self) {
        self.gate.want(Wanted::Pause);
        self.kick();
    }

    /// Holds the vCPU for a while, if it runs. It is not paused by that.
    pub(crate) fn nap(&self, length: Duration) {
        if self.gate.nap(length) {
            self.kick();
        }
    }

    /// Tells whether the vCPU is paused.
    pub(crate) fn gate(&self) -> Arc<Gate> {
        self.gate.clone()
    }

    /// Has a paused vCPU read its state, on its own thread.
    pub(crate) fn save(&self) -> Result<Saving, VcpuError> {
        let (sender, receiver) = mpsc::channel();
        let mut state = self.gate.state();
        match state.parked {
            Some(Parked::Paused) => state.save = Some(sender),
            Some(Parked::Halted) => return Err(VcpuError::Halted { vcpu: self.id }),
            None => return Err(VcpuError::NotPaused { vcpu: self.id }),
        }
        self.gate.changed.notify_all();
        Ok(Saving {
            id: self.id,
            receiver,
        })
    }

    /// Lets a paused vCPU go on.
    pub(crate) fn resume(&self) {
        self.gate.want(Wanted::Run);
    }

    /// Has the thread end as soon as the vCPU could be paused. [`VcpuThread::join`] gives the vCPU back.
    pub(crate) fn stop(&self) {
        self.gate.want(Wanted::Stop);
        self.kick();
    }

    /// The vCPU of a thread that was stopped; none if the thread panicked.
    pub(crate) fn join(self) -> Option<Vcpu> {
        self.thread.join().ok()
    }

    fn kick(&self) {
        // A thread that has ended needs no kick.
        let _ = self.thread.kill(SIGRTMIN());
    }
}

/// A vCPU's state that is being read.
#[derive(Debug)]
pub(crate) struct Saving {
    id: u32,
    receiver: Receiver<Result<VcpuState, VcpuError>>,
}

impl Saving {
    /// Waits for it.
    pub(crate) fn wait(self) -> Result<VcpuState, VcpuError> {
        let stopped = VcpuError::NotPaused { vcpu: self.id };
        self.receiver.recv().unwrap_or(Err(stopped))
    }
}

/// Devices are called on this stack.
const STACK_SIZE: usize = 256 << 10;

fn run(mut vcpu: Vcpu, gate: &Gate) -> Vcpu {
    let pointer = &raw mut vcpu.fd.get_kvm_run().immediate_exit;
    IMMEDIATE_EXIT.set(pointer);
    let mut next = Next::Run;
    loop {
        // A kick after this line is seen by KVM_RUN, one before it by the gate.
        vcpu.fd.set_kvm_immediate_exit(0);
        if gate.interrupted() || next == Next::Halt {
            if next == Next::Run {
                next = vcpu.commit();
            }
            let parked = match next {
                Next::Run => Parked::Paused,
                Next::Halt => Parked::Halted,
            };
            match gate.park(parked, || vcpu.save()) {
                Wanted::Stop => break,
                _ => {
                    vcpu.tell_of_pause();
                    continue;
                }
            }
        }
        next = vcpu.run_once();
    }
    IMMEDIATE_EXIT.set(ptr::null_mut());
    vcpu
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Wanted {
    #[default]
    Run,
    Pause,
    Stop,
}

/// What is wanted of a vCPU, and whether it is there.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    /// Whether anything but running is wanted: what the vCPU looks at each time it leaves the guest.
    interrupted: AtomicBool,
    state: Mutex<GateState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct GateState {
    wanted: Wanted,
    parked: Option<Parked>,
    /// How long the vCPU is to be held, although it is wanted to run.
    nap: Option<Duration>,
    /// Who waits for the vCPU's state.
    save: Option<Sender<Result<VcpuState, VcpuError>>>,
}

/// How a vCPU stands still.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Parked {
    /// It can go on.
    Paused,
    /// It cannot.
    Halted,
}

impl Gate {
    fn want(&self, wanted: Wanted) {
        let mut state = self.state();
        state.wanted = wanted;
        self.interrupted
            .store(wanted != Wanted::Run, Ordering::Release);
        self.changed.notify_all();
    }

    /// Has a vCPU that runs stand still for a while, and says whether it is to be kicked for that.
    fn nap(&self, length: Duration) -> bool {
        let mut state = self.state();
        let runs = state.wanted == Wanted::Run && state.parked.is_none();
        if runs {
            state.nap = Some(length);
            self.interrupted.store(true, Ordering::Release);
        }
        runs
    }

    fn interrupted(&self) -> bool {
        self.interrupted.load(Ordering::Acquire)
    }

    /// Waits until the vCPU is to go on, or to stop; one that has halted never goes on. Meanwhile it is saved by `save` for
    /// those who ask.
    fn park(&self, parked: Parked, save: impl Fn() -> Result<VcpuState, VcpuError>) -> Wanted {
        let mut state = self.state();
        if parked == Parked::Paused
            && let Some(nap) = state.nap.take()
        {
            let sleeps = |state: &mut GateState| state.wanted == Wanted::Run;
            let slept = self.changed.wait_timeout_while(state, nap, sleeps);
            (state, _) = slept.unwrap_or_else(PoisonError::into_inner);
            if state.wanted == Wanted::Run {
                self.interrupted
                    .store(state.nap.is_some(), Ordering::Release);
                return Wanted::Run;
            }
        }
        state.parked = Some(parked);
        self.changed.notify_all();
        loop {
            let wait = |state: &mut GateState| match state.wanted {
                _ if state.save.is_some() => false,
                Wanted::Run => parked == Parked::Halted,
                Wanted::Pause => true,
                Wanted::Stop => false,
            };
            state = self
                .changed
                .wait_while(state, wait)
                .unwrap_or_else(PoisonError::into_inner);
            let Some(sender) = state.save.take() else {
                break;
            };
            drop(state);
            // Whoever asked may have gone.
            let _ = sender.send(save());
            state = self.state();
        }
        state.parked = None;
        state.wanted
    }

    /// Waits for the vCPU to be paused, and says whether it was by the deadline.
    pub(crate) fn wait_parked(&self, deadline: Instant) -> bool {
        let remaining = deadline.saturating_duration_since(Instant::now());
        let (state, _) = self
            .changed
            .wait_timeout_while(self.state(), remaining, |state| {
                state.parked.is_none() && state.wanted != Wanted::Run
            })
            .unwrap_or_else(PoisonError::into_inner);
        state.parked.is_some()
    }

    fn state(&self) -> MutexGuard<'_, GateState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
