//! A virtual CPU: what it does when it leaves the guest, and its state when it stands still.
#![expect(
    unsafe_code,
    reason = "kvm_run is a union, and its I/O data lies beside it"
)]

mod ioctls;
mod msrs;
mod state;
mod thread;
mod tsc;

use std::ptr;
use std::sync::Arc;

use kvm_bindings::{
    KVM_EXIT_FAIL_ENTRY, KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_IO, KVM_EXIT_IO_IN,
    KVM_EXIT_MEMORY_FAULT, KVM_EXIT_MMIO, KVM_EXIT_SHUTDOWN, KVM_INTERNAL_ERROR_EMULATION,
    KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress};

pub(crate) use self::ioctls::XsaveSize;
use self::state::Scope;
pub(crate) use self::state::{MsrIndices, VcpuState};
pub(crate) use self::thread::{Saving, VcpuThread, catch_kicks};
pub(crate) use self::tsc::{HostTscs, same_frequency};
use crate::boot::BootState;
use crate::bus::Bus;
use crate::cpuid::CommonCpuid;
use crate::ending::{Ending, Endings};
use crate::memory::Ram;
use crate::slots::Slots;

/// Why a vCPU could not be made, saved or restored.
#[derive(Debug, thiserror::Error)]
pub enum VcpuError {
    /// KVM refused a step.
    #[error("KVM does not {step} of vCPU {vcpu}")]
    Step {
        /// What was tried.
        step: &'static str,
        /// The vCPU.
        vcpu: u32,
        /// What KVM says.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// There are more CPUID entries than KVM takes.
    #[error("KVM does not take that many CPUID entries")]
    Cpuid,
    /// The thread did not start.
    #[error("cannot start the thread of vCPU {vcpu}")]
    Thread {
        /// The vCPU.
        vcpu: u32,
        /// What the kernel says.
        #[source]
        source: std::io::Error,
    },
    /// A state is read of a vCPU that may run.
    #[error("vCPU {vcpu} is not paused")]
    NotPaused {
        /// The vCPU.
        vcpu: u32,
    },
    /// A state is read of a vCPU that will not run again.
    #[error("vCPU {vcpu} has stopped for good, and the VM is about to end")]
    Halted {
        /// The vCPU.
        vcpu: u32,
    },
    /// There is more state than any KVM was known to have.
    #[error("KVM has more {what} of vCPU {vcpu} than can be saved")]
    TooMuchState {
        /// What there is too much of.
        what: &'static str,
        /// The vCPU.
        vcpu: u32,
    },
    /// A model specific register is not taken.
    #[error(
        "KVM does not take {data:#x} for MSR {index:#x} of vCPU {vcpu}, {}: is this host's CPU or kernel another than \
         that of the host where the VM was saved?",
        describe_msr(*here)
    )]
    Msr {
        /// Its number.
        index: u32,
        /// Its saved value.
        data: u64,
        /// Its value now, if it can be read.
        here: Option<u64>,
        /// The vCPU.
        vcpu: u32,
    },
    /// The guest's time stamp counter would go back.
    #[error(
        "the time stamp counter of vCPU {vcpu} was {saved} when it was saved and would go back to {here}: this host's \
         KVM cannot set it"
    )]
    TscGoesBack {
        /// Its saved value.
        saved: u64,
        /// Its value now.
        here: u64,
        /// The vCPU.
        vcpu: u32,
    },
}

fn describe_msr(here: Option<u64>) -> String {
    match here {
        Some(here) => format!("which is {here:#x}"),
        None => "which is not there".into(),
    }
}

/// What all vCPUs of a VM have in common.
#[derive(Debug)]
pub(crate) struct VcpuContext {
    pub(crate) memory: Arc<Bus>,
    pub(crate) ports: Arc<Bus>,
    pub(crate) ram: Ram,
    pub(crate) slots: Slots,
    pub(crate) endings: Arc<Endings>,
}

/// A virtual CPU that is not running.
#[derive(Debug)]
pub(crate) struct Vcpu {
    id: u32,
    fd: VcpuFd,
    context: Arc<VcpuContext>,
    scope: Scope,
    power_on: VcpuState,
    /// Whether KVM_RUN failed the last time, for memory that another vCPU may have found missing, too.
    faulted: bool,
}

/// Whether the guest goes on.
#[derive(Debug, PartialEq, Eq)]
enum Next {
    Run,
    Halt,
}

impl Vcpu {
    /// Makes the vCPU with this number and APIC id.
    pub(crate) fn new(
        kvm: &Kvm,
        vm: &VmFd,
        id: u32,
        cpuid: &CommonCpuid,
        msrs: &MsrIndices,
        context: Arc<VcpuContext>,
    ) -> Result<Self, VcpuError> {
        let step = |step| {
            move |source| VcpuError::Step {
                step,
                vcpu: id,
                source,
            }
        };
        let fd = vm.create_vcpu(id.into()).map_err(step("create"))?;
        let cpuid = cpuid.of_vcpu(id).map_err(|_| VcpuError::Cpuid)?;
        fd.set_cpuid2(&cpuid).map_err(step("take the CPUID"))?;
        let scope = Scope::new(kvm, &fd, msrs);
        let power_on = VcpuState::read(&fd, &scope, id)?;
        Ok(Self {
            id,
            fd,
            context,
            scope,
            power_on,
            faulted: false,
        })
    }

    /// Puts the vCPU back into its state at power-on.
    pub(crate) fn reset(&mut self) -> Result<(), VcpuError> {
        self.power_on.reset(&self.fd, &self.scope, self.id)
    }

    /// Reads the state. The vCPU must have [committed](Vcpu::commit) what it was doing, and no other may run.
    pub(crate) fn save(&self) -> Result<VcpuState, VcpuError> {
        VcpuState::read(&self.fd, &self.scope, self.id)
    }

    /// Puts a state into the vCPU, which has not run yet.
    pub(crate) fn restore(&mut self, state: &VcpuState) -> Result<(), VcpuError> {
        state.restore(&self.fd, &self.scope, self.id)?;
        self.tell_of_pause();
        Ok(())
    }

    /// Lets the guest know that it stood still, so that its watchdogs do not take that for a hang.
    fn tell_of_pause(&self) {
        // A guest that does not use kvmclock cannot be told.
        let _ = self.fd.kvmclock_ctrl();
    }

    /// Sets the registers that the boot protocol wants. Only the first vCPU boots; it starts the others.
    pub(crate) fn boot(&mut self, state: &BootState) -> Result<(), VcpuError> {
        let vcpu = self.id;
        state
            .apply(&self.fd, self.id == 0)
            .map_err(|source| VcpuError::Step {
                step: "take the boot state",
                vcpu,
                source,
            })
    }

    /// Runs the guest until it leaves it for the VMM, and serves what it left for.
    fn run_once(&mut self) -> Next {
        // The exit is not taken from what `run` returns, which hides how wide the accesses of string I/O are.
        let result = self.fd.run().map(drop);
        match result {
            Ok(()) => {
                self.faulted = false;
                self.serve_exit()
            }
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => Next::Run,
            Err(error) => self.recover(error),
        }
    }

    /// A guest that touches memory of a device's that is not there any more goes on without the device.
    fn recover(&mut self, error: kvm_ioctls::Error) -> Next {
        if error.errno() == libc::EFAULT {
            let touched = self.touched();
            let removed = self.context.slots.remove_missing(touched) > 0;
            if removed || !self.faulted {
                self.faulted = true;
                return Next::Run;
            }
        }
        self.fail(format!("KVM_RUN failed: {error}"))
    }

    /// Where the guest touched what KVM could not reach, if KVM says (it does since Linux 6.8).
    fn touched(&mut self) -> Option<u64> {
        let run = self.fd.get_kvm_run();
        if run.exit_reason != KVM_EXIT_MEMORY_FAULT {
            return None;
        }
        // SAFETY: the exit reason says that this is the union's field.
        Some(unsafe { run.__bindgen_anon_1.memory_fault.gpa })
    }

    /// Completes an access that the guest has left off in the middle of, so that its effect is in the vCPU's state.
    fn commit(&mut self) -> Next {
        loop {
            self.fd.set_kvm_immediate_exit(1);
            let result = self.fd.run().map(drop);
            match result {
                // An access that is wider than an exit, or a repeated one, goes on with its next part.
                Ok(()) => {
                    self.faulted = false;
                    if self.serve_exit() == Next::Halt {
                        return Next::Halt;
                    }
                }
                Err(error) if error.errno() == libc::EINTR => return Next::Run,
                Err(error) if error.errno() == libc::EAGAIN => {}
                Err(error) => {
                    if self.recover(error) == Next::Halt {
                        return Next::Halt;
                    }
                }
            }
        }
    }

    fn serve_exit(&mut self) -> Next {
        let reason = self.fd.get_kvm_run().exit_reason;
        match reason {
            KVM_EXIT_IO => self.serve_io(),
            KVM_EXIT_MMIO => self.serve_mmio(),
            KVM_EXIT_SHUTDOWN => {
                self.context
                    .endings
                    .report(Ending::TripleFault { vcpu: self.id });
                Next::Halt
            }
            KVM_EXIT_INTERNAL_ERROR => {
                let what = self.describe_internal_error();
                self.fail(what)
            }
            KVM_EXIT_FAIL_ENTRY => {
                // SAFETY: the exit reason says that this is the union's field.
                let entry = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.fail_entry };
                let code = entry.hardware_entry_failure_reason;
                self.fail(format!(
                    "the CPU refused to enter the guest, reason {code:#x}"
                ))
            }
            other => self.fail(format!("KVM_RUN returned for an unknown reason ({other})")),
        }
    }

    fn serve_mmio(&mut self) -> Next {
        // SAFETY: the exit reason says that this is the union's field.
        let mmio = unsafe { &mut self.fd.get_kvm_run().__bindgen_anon_1.mmio };
        let length = (mmio.len as usize).min(mmio.data.len());
        if let Some(data) = mmio.data.get_mut(..length) {
            if mmio.is_write != 0 {
                self.context.memory.write(mmio.phys_addr, data);
            } else {
                self.context.memory.read(mmio.phys_addr, data);
            }
        }
        Next::Run
    }

    fn serve_io(&mut self) -> Next {
        let run = self.fd.get_kvm_run();
        // SAFETY: the exit reason says that this is the union's field.
        let io = unsafe { run.__bindgen_anon_1.io };
        let run = ptr::from_mut(run);
        let length = usize::from(io.size) * io.count as usize;
        let offset = usize::try_from(io.data_offset).unwrap_or(usize::MAX);
        // SAFETY: KVM says that `length` bytes of data lie at this offset within the vCPU's mapping, which is longer
        // than the structure at its start.
        let data = unsafe { run.cast::<u8>().add(offset) };
        // SAFETY: as above; nobody else looks at them while the guest does not run, and `self.fd`, which owns the
        // mapping, is borrowed by `self` until the end of this function.
        let data = unsafe { std::slice::from_raw_parts_mut(data, length) };
        let port = u64::from(io.port);
        for access in data.chunks_mut(usize::from(io.size).max(1)) {
            if u32::from(io.direction) == KVM_EXIT_IO_IN {
                self.context.ports.read(port, access);
            } else {
                self.context.ports.write(port, access);
            }
        }
        Next::Run
    }

    fn fail(&self, what: String) -> Next {
        self.context.endings.report(Ending::KvmError {
            vcpu: self.id,
            what,
        });
        Next::Halt
    }

    /// What KVM says of an error of its own, with the instruction if it could not emulate it.
    fn describe_internal_error(&mut self) -> String {
        /// `insn_size` and `insn_bytes` of `struct kvm_run.emulation_failure` (linux/kvm.h), behind its flags.
        const INSTRUCTION_MAX: usize = 15;
        // SAFETY: the exit reason says that this is the union's field.
        let error = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.internal };
        if error.suberror != KVM_INTERNAL_ERROR_EMULATION {
            return format!("internal error {} of KVM", error.suberror);
        }
        // SAFETY: the suberror says that this is the union's field.
        let failure = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.emulation_failure };
        let told = failure.ndata >= 1
            && failure.flags & u64::from(KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES) != 0;
        // SAFETY: the flag says that this is the union's field.
        let bytes = unsafe { failure.__bindgen_anon_1.__bindgen_anon_1 };
        let length = usize::from(bytes.insn_size).min(INSTRUCTION_MAX);
        let rip = self.fd.get_regs().map_or(0, |regs| regs.rip);
        let instruction = match bytes.insn_bytes.get(..length) {
            Some(bytes) if told && length > 0 => bytes.to_vec(),
            _ => self.fetch(rip, INSTRUCTION_MAX),
        };
        let hex = |byte: &u8| format!(" {byte:02x}");
        let instruction: String = instruction.iter().map(hex).collect();
        format!("it cannot emulate the instruction at {rip:#x}:{instruction}")
    }

    /// The bytes at an address as the guest sees it, as far as they can be had.
    fn fetch(&self, address: u64, length: usize) -> Vec<u8> {
        let byte = |address| {
            let translation = self.fd.translate_gva(address).ok()?;
            let valid = translation.valid != 0;
            let byte = self
                .context
                .ram
                .read_obj(GuestAddress(translation.physical_address));
            byte.ok().filter(|_| valid)
        };
        (address..).take(length).map_while(byte).collect()
    }
}
