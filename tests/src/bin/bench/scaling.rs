//! Whether CPUs and devices get into each other's way: many CPUs read registers of one device or of several, and one
//! does while another's device hangs.
//!
//! Where many read, nobody has a place of their own: there are more threads than CPUs. Beside a device that hangs, all share
//! one: whatever the CPU that waits for it does, it does at the expense of the other.

use std::path::PathBuf;
use std::process::Command;

use iced_x86::IcedError;
use iced_x86::code_asm::{dword_ptr, eax, ebp, ebx, edi};
use tempfile::NamedTempFile;
use tests::tiny::{self, Code, LOCAL_APIC, SCRATCH};

use crate::Bench;
use crate::device::{self, HANGS, Hanging};
use crate::driver::{self, BEGIN, END, FAILED, times};
use crate::measurement::{Aim, Better, Definition};
use crate::placement;
use crate::program::Running;
use crate::programs::{CLOUD_HYPERVISOR, Guest, QEMU};
use crate::turns::Turns;

const SCALING: Definition = Definition {
    key: "scaling",
    what: "reads of double words of vfio-user devices' BARs, by all of a guest's CPUs together",
    unit: "thousand reads a second",
    better: Better::More,
    limit: None,
    aims: &[Aim::OfEachPeer(1.0)],
};
const BESIDE_HUNG: Definition = Definition {
    key: "scaling_beside_hung_device",
    what: "the same by one CPU, while another waits for a device that hangs",
    limit: Some("the same while the other CPU sleeps"),
    aims: &[Aim::OfLimit(0.95)],
    ..SCALING
};

/// How often each CPU reads.
const READS: u32 = 3000;
/// How often one does beside a device that hangs, which is faster.
const READS_BESIDE: u32 = 20_000;

/// Where the guest keeps the addresses of the devices' BARs, and counts its CPUs.
const BARS: u32 = SCRATCH + 0x180;
const ARRIVED: u32 = SCRATCH + 0x1c0;
const DONE: u32 = SCRATCH + 0x1c4;

pub(crate) fn measure(bench: &mut Bench) -> anyhow::Result<()> {
    for devices in [1, 4] {
        let servers = device::serve_many(devices)?;
        let sockets: Vec<_> = servers.iter().map(|one| one.socket().to_owned()).collect();
        for cpus in [1, 2, 4] {
            if devices == 4 && cpus == 1 {
                continue;
            }
            let kernel = readers(cpus, devices.into())?;
            let guest = Guest {
                cpus,
                ..Guest::small(kernel.path(), &sockets)
            };
            let turn =
                |mut command: Command| move || speed(Running::start(&mut command)?, cpus * READS);
            let programs = &bench.programs;
            let mut turns = Turns::new(turn(programs.outrigger(&guest)));
            if let Some(command) = programs.cloud_hypervisor(&guest) {
                turns.peer(CLOUD_HYPERVISOR, turn(command));
            }
            if let Some(command) = programs.qemu(&guest) {
                turns.peer(QEMU, turn(command));
            }
            let results = turns.take(bench.rounds(11))?;
            let case = format!("{cpus} vCPUs, {devices} devices");
            let case = case
                .replace("1 vCPUs", "1 vCPU")
                .replace("1 devices", "1 device");
            bench.add(results.measurement(&SCALING, |speed| *speed).in_case(&case));
            bench.failed(&case, results.failures);
        }
    }
    beside_hung(bench)
}

/// Of peers, some would never come to an end.
fn beside_hung(bench: &mut Bench) -> anyhow::Result<()> {
    let healthy = placement::on_one_cpu(|| device::serve_many(2))?;
    let healthy = healthy.get(1).map(|one| one.socket().to_owned());
    let turn = |other: Other| {
        let (programs, healthy) = (&bench.programs, healthy.as_ref());
        move || {
            let hanging = placement::on_one_cpu(Hanging::serve)?;
            let sockets: Vec<PathBuf> = [hanging.socket().to_owned()]
                .into_iter()
                .chain(healthy.cloned())
                .collect();
            let kernel = beside(other)?;
            let guest = Guest {
                cpus: 2,
                ..Guest::small(kernel.path(), &sockets)
            };
            let mut command = programs.outrigger(&guest);
            let program = placement::on_one_cpu(|| Running::start(&mut command))?;
            speed(program, READS_BESIDE)
        }
    };
    let mut turns = Turns::new(turn(Other::Hangs));
    turns.limit(turn(Other::Sleeps));
    let results = turns.take(bench.rounds(11))?;
    bench.add(results.measurement(&BESIDE_HUNG, |speed| *speed));
    Ok(())
}

/// Thousand reads a second, of so many that all CPUs make together.
fn speed(mut program: Running, reads: u32) -> anyhow::Result<f64> {
    let begin = program.wait_for(BEGIN, Some(FAILED))?;
    let end = program.wait_for(END, Some(FAILED))?;
    Ok(f64::from(reads) / 1e3 / (end - begin).as_secs_f64())
}

/// A guest whose CPUs all begin to read when the last of them has come. The last to be done says so.
fn readers(cpus: u32, devices: u32) -> anyhow::Result<NamedTempFile> {
    with_cpus(cpus, devices, |code| {
        let mut wait = code.create_label();
        code.mov(ebx, dword_ptr(LOCAL_APIC + 0x20))?;
        code.shr(ebx, 24)?;
        code.and(ebx, (devices - 1).cast_signed())?;
        code.mov(ebp, dword_ptr(BARS + ebx * 4))?;
        as_the_last_of(code, cpus, ARRIVED, BEGIN)?;
        code.set_label(&mut wait)?;
        code.pause()?;
        code.cmp(dword_ptr(ARRIVED), cpus.cast_signed())?;
        code.jb(wait)?;
        times(code, READS, |code| code.mov(eax, dword_ptr(ebp)))?;
        as_the_last_of(code, cpus, DONE, END)?;
        code.halt()
    })
}

/// What the first CPU does while the second reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Other {
    Hangs,
    Sleeps,
}

fn beside(other: Other) -> anyhow::Result<NamedTempFile> {
    with_cpus(2, 2, |code| {
        let [mut second, mut hang] = std::array::from_fn(|_| code.create_label());
        code.test(dword_ptr(LOCAL_APIC + 0x20), 1 << 24)?;
        code.jnz(second)?;
        if other == Other::Sleeps {
            code.halt()?;
        }
        code.mov(ebp, dword_ptr(BARS))?;
        code.set_label(&mut hang)?;
        code.mov(
            eax,
            dword_ptr(ebp + i32::try_from(HANGS).unwrap_or_default()),
        )?;
        code.jmp(hang)?;
        code.set_label(&mut second)?;
        code.mov(ebp, dword_ptr(BARS + 4))?;
        // By then, the first CPU is where it stays.
        times(code, READS_BESIDE / 10, |code| {
            code.mov(eax, dword_ptr(ebp))
        })?;
        code.print(BEGIN)?;
        times(code, READS_BESIDE, |code| code.mov(eax, dword_ptr(ebp)))?;
        code.print(END)?;
        code.halt()
    })
}

/// Counts, and says a character when the count is full.
fn as_the_last_of(
    code: &mut Code,
    cpus: u32,
    counter: u32,
    character: u8,
) -> Result<(), IcedError> {
    let mut not_last = code.create_label();
    code.mov(edi, 1)?;
    code.lock().xadd(dword_ptr(counter), edi)?;
    code.cmp(edi, (cpus - 1).cast_signed())?;
    code.jne(not_last)?;
    code.print(character)?;
    code.set_label(&mut not_last)?;
    // An instruction has one label, and what follows may want its own.
    code.nop()
}

/// A guest with the addresses of all devices at [`BARS`], all of whose CPUs then do the same, without a stack.
fn with_cpus(
    cpus: u32,
    devices: u32,
    body: impl FnOnce(&mut Code) -> Result<(), IcedError>,
) -> anyhow::Result<NamedTempFile> {
    tiny::guest(|code| {
        let [mut fails, mut all] = std::array::from_fn(|_| code.create_label());
        code.allow_interrupts()?;
        code.cli()?;
        for number in 0..devices {
            driver::find(code, number, fails)?;
            code.mov(dword_ptr(BARS + 4 * number), ebp)?;
        }
        code.store(ARRIVED, 0)?;
        code.store(DONE, 0)?;
        code.start_other_cpus(cpus - 1, all)?;
        code.set_label(&mut all)?;
        body(code)?;
        code.set_label(&mut fails)?;
        code.print(FAILED)?;
        code.halt()
    })
}
