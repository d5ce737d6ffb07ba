//! A machine that is nothing but KVM, RAM and vCPUs, and a guest that uses what a vCPU has.

use std::fs::File;
use std::io::Write;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use std::{env, thread};

use devices::BusDevice;
use iced_x86::code_asm::*;
use iced_x86::{BlockEncoderOptions, IcedError};
use kvm_ioctls::VmFd;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::boot::BootState;
use crate::bus::Bus;
use crate::chips::ChipsState;
use crate::clock::{ClockState, TimeAway};
use crate::config::MemoryConfig;
use crate::cpuid::CommonCpuid;
use crate::ending::{Ending, Endings};
use crate::memory::{Memory, Ram};
use crate::slots::Slots;
use crate::vcpu::{MsrIndices, Vcpu, VcpuContext, VcpuError, VcpuState, catch_kicks};
use crate::vcpus::Vcpus;
use crate::{kvm, layout};

/// Whether there is a KVM. If not, the list of skipped tests, of which `make unit` tells, says so.
pub(crate) fn has_kvm() -> bool {
    let mut options = File::options();
    let available = options.read(true).write(true).open("/dev/kvm").is_ok();
    if !available && let Some(list) = env::var_os("SKIPPED_TESTS") {
        let mut list = File::options()
            .create(true)
            .append(true)
            .open(list)
            .unwrap();
        let name = thread::current().name().unwrap_or_default().to_owned();
        let reason = "/dev/kvm cannot be opened for reading and writing";
        list.write_all(format!("{reason}\t{name}\n").as_bytes())
            .unwrap();
    }
    available
}

/// How long anything may take.
pub(crate) const LONG: Duration = Duration::from_secs(60);

/// What has been taken out of a machine, but for its RAM.
#[derive(Clone, PartialEq, Debug, serde::Serialize, serde::Deserialize)]
pub(crate) struct Saved {
    pub(crate) vcpus: Vec<VcpuState>,
    pub(crate) chips: ChipsState,
    pub(crate) clock: ClockState,
}

/// A machine with one guest.
pub(crate) struct Machine {
    // First the threads, then what they use.
    pub(crate) vcpus: Vcpus,
    pub(crate) stopped: Vec<Vcpu>,
    pub(crate) vm: Arc<VmFd>,
    pub(crate) memory: Memory,
    output: Arc<Output>,
    endings: Arc<Endings>,
}

impl Machine {
    /// A machine whose vCPUs are as they were at power-on.
    pub(crate) fn new(vcpus: u32) -> Self {
        catch_kicks().unwrap();
        let kvm = kvm::open().unwrap();
        let vm = kvm::create_vm(&kvm, vcpus).unwrap();
        let slots = Slots::new(vm.clone(), kvm.get_nr_memslots()).unwrap();
        let config = MemoryConfig {
            size: 4 << 20,
            hugepages: false,
            prefault: false,
        };
        let memory = Memory::new(&config, &slots).unwrap();
        kvm::create_chips(&vm).unwrap();
        let output = Arc::new(Output::default());
        let ports = Bus::default();
        ports.insert(OUTPUT..=OUTPUT, output.clone()).unwrap();
        let endings = Arc::new(Endings::new().unwrap());
        let context = Arc::new(VcpuContext {
            memory: Arc::default(),
            ports: Arc::new(ports),
            ram: memory.ram().clone(),
            slots,
            endings: endings.clone(),
        });
        let cpuid = CommonCpuid::new(&kvm, vcpus).unwrap();
        let msrs = MsrIndices::new(&kvm).unwrap();
        let stopped = (0..vcpus)
            .map(|id| Vcpu::new(&kvm, &vm, id, &cpuid, &msrs, context.clone()).unwrap())
            .collect();
        Self {
            vcpus: Vcpus::default(),
            stopped,
            vm,
            memory,
            output,
            endings,
        }
    }

    /// A machine whose first vCPU is about to enter `guest`, and whose others wait to be started.
    pub(crate) fn with_guest(vcpus: u32, guest: &Guest) -> Self {
        let mut machine = Self::new(vcpus);
        guest.load(machine.memory.ram());
        for vcpu in &mut machine.stopped {
            guest.enter(vcpu);
        }
        machine
    }

    /// A machine with the RAM of `other` and what was saved of it.
    pub(crate) fn restored(other: &Self, saved: &Saved) -> Self {
        let mut machine = Self::new(u32::try_from(saved.vcpus.len()).unwrap());
        let mut page = vec![0; 4096];
        for region in other.memory.ram().iter() {
            for at in (0..region.len()).step_by(page.len()) {
                let at = region.start_addr().unchecked_add(at);
                other.memory.ram().read_slice(&mut page, at).unwrap();
                machine.memory.ram().write_slice(&page, at).unwrap();
            }
        }
        machine.restore(saved, TimeAway::Skipped).unwrap();
        machine
    }

    /// Puts what was saved into a machine that has not run yet.
    pub(crate) fn restore(&mut self, saved: &Saved, time_away: TimeAway) -> Result<(), VcpuError> {
        let mut states = saved.vcpus.clone();
        let clock = &saved.clock;
        clock.restore(&self.vm, time_away, &mut states).unwrap();
        for (vcpu, state) in self.stopped.iter_mut().zip(&states) {
            vcpu.restore(state)?;
        }
        saved.chips.restore(&self.vm).unwrap();
        Ok(())
    }

    pub(crate) fn run(&mut self) {
        let vcpus = std::mem::take(&mut self.stopped);
        self.vcpus.start(vcpus).unwrap();
    }

    /// Pauses the vCPUs and saves the machine.
    pub(crate) fn pause(&self) -> Saved {
        self.vcpus.pause();
        assert!(self.vcpus.wait_paused(Instant::now() + LONG));
        Saved {
            vcpus: self.vcpus.save().unwrap(),
            chips: ChipsState::save(&self.vm).unwrap(),
            clock: ClockState::save(&self.vm).unwrap(),
        }
    }

    /// What a machine that does not run consists of.
    pub(crate) fn read(&self) -> Saved {
        Saved {
            vcpus: self
                .stopped
                .iter()
                .map(|vcpu| vcpu.save().unwrap())
                .collect(),
            chips: ChipsState::save(&self.vm).unwrap(),
            clock: ClockState::save(&self.vm).unwrap(),
        }
    }

    /// A word of the guest's memory.
    pub(crate) fn word(&self, address: u32) -> u32 {
        let address = GuestAddress(address.into());
        self.memory.ram().read_obj(address).unwrap()
    }

    pub(crate) fn set_word(&self, address: u32, word: u32) {
        let address = GuestAddress(address.into());
        self.memory.ram().write_obj(word, address).unwrap();
    }

    /// Waits until the word at `address` has grown by `more`.
    pub(crate) fn wait_for_more(&self, address: u32, more: u32) {
        let goal = self.word(address) + more;
        wait_until(|| self.word(address) >= goal);
    }

    /// Waits for each vCPU to have written this to the output.
    pub(crate) fn wait_for_output(&self, text: &[u8]) {
        wait_until(|| self.output.0.lock().unwrap().len() >= text.len());
        assert_eq!(*self.output.0.lock().unwrap(), text);
    }

    /// Waits for a vCPU to come to an end that it does not go on from.
    pub(crate) fn wait_for_ending(&self) -> Ending {
        let mut ending = None;
        wait_until(|| {
            ending = self.endings.take();
            ending.is_some()
        });
        ending.unwrap()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.vcpus.stop();
    }
}

fn wait_until(mut what: impl FnMut() -> bool) {
    let deadline = Instant::now() + LONG;
    while !what() {
        assert!(Instant::now() < deadline, "the guest does not go on");
        thread::yield_now();
    }
}

/// A port that guests say how they are through.
const OUTPUT: u64 = 0x80;

#[derive(Debug, Default)]
struct Output(Mutex<Vec<u8>>);

impl BusDevice for Output {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, _: u64, data: &[u8]) {
        self.0.lock().unwrap().extend(data);
    }
}

const CODE: u32 = 0x10_0000;
const DATA: u32 = 0x20_0000;
/// Rounds that the guest has made, each counted twice.
pub(crate) const ROUNDS: u32 = DATA;
pub(crate) const ROUNDS_AGAIN: u32 = DATA + 4;
/// Interrupts of the timer that it has seen.
pub(crate) const TICKS: u32 = DATA + 8;
/// How often the time stamp counter has gone back.
pub(crate) const GONE_BACK: u32 = DATA + 12;
/// Where it is told to end.
pub(crate) const STOP: u32 = DATA + 16;
/// What the SSE registers 0 to 3 and 7 are at the end; the last has counted the rounds in all its lanes.
pub(crate) const VECTORS: u32 = DATA + 0x100;
/// Where the time stamp counter was.
const LAST_TSC: u32 = DATA + 24;
const VECTOR_SOURCE: u32 = DATA + 0x200;
const TABLE: u32 = DATA + 0x1000;
const TABLE_POINTER: u32 = DATA + 0x800;
const STACK: u32 = DATA + 0x3000;
const LOCAL_APIC: u32 = layout::LOCAL_APIC;
const TIMER_VECTOR: u32 = 0x40;

/// How the guest has its timer go off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Timer {
    Periodic,
    Deadline,
}

/// What the guest does in each round besides counting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rest {
    Never,
    /// It waits for the timer.
    UntilTick,
}

/// Model specific registers that the guest gives values.
pub(crate) const MSRS: [(u32, u64); 9] = [
    (0x174, 0x0010),                      // SYSENTER_CS
    (0x175, 0x1234_5678),                 // SYSENTER_ESP
    (0xc000_0081, 0x0013_0008_0000_0000), // STAR
    (0xc000_0102, 0xffff_8000_1234_5000), // KERNEL_GS_BASE
    (0x200, 0x1000_0001),                 // a range of memory, write-combining
    (0x201, 0xf_f000_0800),               // its size
    (0x250, 0x0606_0606_0606_0606),       // the first 512 KiB, write-back
    (0x26f, 0x0505_0505_0505_0505),       // 32 KiB of ROM, write-protected
    (0x2ff, 0xc06),                       // and all else, write-back
];

/// The word that is in this lane of SSE register `register`.
pub(crate) fn vector_word(register: u32, lane: u32) -> u32 {
    0x0101_0101 * (register + 1) + lane
}

/// A guest that counts, in memory and in an SSE register, watches its time stamp counter, and is interrupted by a timer,
/// until it is told to stop; then it writes `Y`.
pub(crate) struct Guest {
    code: Vec<u8>,
    handler: u64,
}

impl Guest {
    pub(crate) fn new(timer: Timer, rest: Rest, sse: bool) -> Self {
        Self::assemble(timer, rest, sse).unwrap()
    }

    /// One that crashes with a triple fault.
    pub(crate) fn crashing() -> Self {
        let assemble = || {
            let mut code = CodeAssembler::new(32)?;
            // There is no interrupt table.
            code.ud2()?;
            code.assemble(CODE.into())
        };
        Self {
            code: assemble().unwrap(),
            handler: 0,
        }
    }

    fn assemble(timer: Timer, rest: Rest, sse: bool) -> Result<Self, IcedError> {
        let mut code = CodeAssembler::new(32)?;
        let mut handler = code.create_label();
        let mut again = code.create_label();
        let mut forward = code.create_label();
        let c = &mut code;

        c.mov(esp, STACK)?;
        c.lidt(ptr(TABLE_POINTER))?;
        for (index, data) in MSRS {
            wrmsr(c, index, data)?;
        }
        for (register, value) in [(dr0, 0x1111), (dr1, 0x2222), (dr2, 0x3333), (dr3, 0x4444)] {
            c.mov(eax, value)?;
            c.mov(register, eax)?;
        }
        if sse {
            const CR4_OSFXSR: u32 = 1 << 9;
            c.mov(eax, cr4)?;
            c.or(eax, CR4_OSFXSR)?;
            c.mov(cr4, eax)?;
            c.fninit()?;
            c.fldpi()?;
            for (register, at) in [(xmm0, 0), (xmm1, 16), (xmm2, 32), (xmm3, 48), (xmm6, 64)] {
                c.movups(register, xmmword_ptr(VECTOR_SOURCE + at))?;
            }
            c.pxor(xmm7, xmm7)?;
        }
        c.mov(esi, 0x5151_5151)?;
        c.mov(edi, 0xd1d1_d1d1_u32)?;
        c.mov(ebp, 0xb9b9_b9b9_u32)?;
        set_chips(c)?;
        start_timer(c, timer)?;
        c.sti()?;

        c.set_label(&mut again)?;
        c.inc(dword_ptr(ROUNDS))?;
        if sse {
            c.paddd(xmm7, xmm6)?;
        }
        c.rdtsc()?;
        c.mov(ebx, eax)?;
        c.mov(ecx, edx)?;
        c.sub(eax, dword_ptr(LAST_TSC))?;
        c.sbb(edx, dword_ptr(LAST_TSC + 4))?;
        c.jae(forward)?;
        c.inc(dword_ptr(GONE_BACK))?;
        c.set_label(&mut forward)?;
        c.mov(dword_ptr(LAST_TSC), ebx)?;
        c.mov(dword_ptr(LAST_TSC + 4), ecx)?;
        if rest == Rest::UntilTick {
            c.hlt()?;
        }
        c.inc(dword_ptr(ROUNDS_AGAIN))?;
        c.cmp(dword_ptr(STOP), 0)?;
        c.je(again)?;

        c.cli()?;
        if sse {
            for (register, at) in [(xmm0, 0), (xmm1, 16), (xmm2, 32), (xmm3, 48), (xmm7, 64)] {
                c.movups(xmmword_ptr(VECTORS + at), register)?;
            }
        }
        c.mov(al, i32::from(b'Y'))?;
        c.out(i32::try_from(OUTPUT).unwrap(), al)?;
        let mut end = c.create_label();
        c.set_label(&mut end)?;
        c.hlt()?;
        c.jmp(end)?;

        c.set_label(&mut handler)?;
        c.push(eax)?;
        c.push(edx)?;
        c.push(ecx)?;
        c.inc(dword_ptr(TICKS))?;
        c.mov(dword_ptr(LOCAL_APIC + 0xb0), 0)?;
        if timer == Timer::Deadline {
            set_deadline(c)?;
        }
        c.pop(ecx)?;
        c.pop(edx)?;
        c.pop(eax)?;
        // Not IRET, which KVM's emulator lacks here.
        c.push(dword_ptr(esp + 8))?;
        c.popfd()?;
        c.ret_1(8)?;

        let options = BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS;
        let result = code.assemble_options(CODE.into(), options)?;
        Ok(Self {
            handler: result.label_ip(&handler)?,
            code: result.inner.code_buffer,
        })
    }

    fn load(&self, ram: &Ram) {
        const CODE_SEGMENT: u64 = 0x00cf_9b00_0000_ffff;
        const INTERRUPT_GATE: u64 = 0x8e00 << 32 | 0x10 << 16;
        let write = |address: u64, bytes: &[u8]| {
            ram.write_slice(bytes, GuestAddress(address)).unwrap();
        };
        write(CODE.into(), &self.code);
        write(layout::GDT + 0x10, &CODE_SEGMENT.to_le_bytes());
        let gate = (self.handler & 0xffff) | INTERRUPT_GATE | (self.handler >> 16) << 48;
        write(u64::from(TABLE + TIMER_VECTOR * 8), &gate.to_le_bytes());
        let pointer = u64::from(TABLE) << 16 | 0x7ff;
        write(TABLE_POINTER.into(), &pointer.to_le_bytes());
        for register in 0..4 {
            for lane in 0..4 {
                let at = u64::from(VECTOR_SOURCE + register * 16 + lane * 4);
                write(at, &vector_word(register, lane).to_le_bytes());
            }
        }
        for lane in 0..4 {
            write(
                u64::from(VECTOR_SOURCE) + 64 + lane * 4,
                &1u32.to_le_bytes(),
            );
        }
    }

    /// Has the first vCPU begin with the guest's code.
    pub(crate) fn enter(&self, vcpu: &mut Vcpu) {
        let state = BootState::Pvh {
            entry: CODE.into(),
            start_info: 0,
        };
        vcpu.boot(&state).unwrap();
    }
}

fn wrmsr(c: &mut CodeAssembler, index: u32, data: u64) -> Result<(), IcedError> {
    c.mov(ecx, index)?;
    c.mov(eax, u32::try_from(data & 0xffff_ffff).unwrap())?;
    c.mov(edx, u32::try_from(data >> 32).unwrap())?;
    c.wrmsr()
}

/// Gives the chips values that they do not have at power-on, without their raising interrupts.
fn set_chips(c: &mut CodeAssembler) -> Result<(), IcedError> {
    const PIC_MASKS: [i32; 2] = [0x21, 0xa1];
    const PIT_CHANNEL_0: i32 = 0x40;
    const PIT_CONTROL: i32 = 0x43;
    const IO_APIC: u32 = layout::IO_APIC;
    for (port, value) in [
        (PIC_MASKS[0], 0xfb),
        (PIC_MASKS[1], 0xfe),
        // Channel 0 counts once from 0x1234.
        (PIT_CONTROL, 0x30),
        (PIT_CHANNEL_0, 0x34),
        (PIT_CHANNEL_0, 0x12),
    ] {
        c.mov(al, value)?;
        c.out(port, al)?;
    }
    // Pin 5: vector 0x55, masked.
    c.mov(dword_ptr(IO_APIC), 0x1a)?;
    c.mov(dword_ptr(IO_APIC + 0x10), 0x1_0055)
}

/// Switches the local APIC and its timer on (Intel SDM, volume 3, 10.5.4).
fn start_timer(c: &mut CodeAssembler, timer: Timer) -> Result<(), IcedError> {
    const PERIODIC: u32 = 1 << 17;
    const DEADLINE: u32 = 2 << 17;
    const DIVIDE_BY_1: u32 = 0xb;
    /// In KVM the timer runs at 1 GHz.
    const MILLISECOND: u32 = 1_000_000;
    c.mov(dword_ptr(LOCAL_APIC + 0xf0), 0x1ff)?;
    match timer {
        Timer::Periodic => {
            c.mov(dword_ptr(LOCAL_APIC + 0x320), PERIODIC | TIMER_VECTOR)?;
            c.mov(dword_ptr(LOCAL_APIC + 0x3e0), DIVIDE_BY_1)?;
            c.mov(dword_ptr(LOCAL_APIC + 0x380), MILLISECOND)
        }
        Timer::Deadline => {
            c.mov(dword_ptr(LOCAL_APIC + 0x320), DEADLINE | TIMER_VECTOR)?;
            set_deadline(c)
        }
    }
}

const IA32_TSC_DEADLINE: u32 = 0x6e0;

/// Has the timer go off in a million cycles.
fn set_deadline(c: &mut CodeAssembler) -> Result<(), IcedError> {
    c.rdtsc()?;
    c.add(eax, 1_000_000)?;
    c.adc(edx, 0)?;
    c.mov(ecx, IA32_TSC_DEADLINE)?;
    c.wrmsr()
}
