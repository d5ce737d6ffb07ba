//! What a guest's accesses to a vfio-user device cost, what its doorbell does, and its interrupt.
//!
//! Each is done so many times between two characters of the guest.

use std::env;
use std::process::Command;

use iced_x86::IcedError;
use iced_x86::code_asm::{CodeLabel, dword_ptr, dx, eax, ebp, edi, esi};
use tempfile::NamedTempFile;
use tests::tiny::{self, Code, LOCAL_APIC};

use crate::device::{CONFIG, DOORBELL, MSIX, RUNG, SLEPT, START, VECTOR};
use crate::driver::{self, BEGIN, END, FAILED, times};
use crate::measurement::{Aim, Better, Definition};
use crate::program::Running;
use crate::programs::{CLOUD_HYPERVISOR, Guest, QEMU};
use crate::turns::{Results, Turns};
use crate::{Bench, bare, device, placement};

const AIMS: &[Aim] = &[Aim::OfLimit(1.25), Aim::OfEachPeer(0.5)];
const EXIT_AND_MESSAGE: &str =
    "an exit to user space and the same bytes through a bare socket, there and back";

const CONFIG_READ: Definition = Definition {
    key: "config_read_us",
    what: "a guest's read of a double word of a vfio-user device's configuration space",
    unit: "us",
    better: Better::Less,
    limit: Some(EXIT_AND_MESSAGE),
    aims: AIMS,
};
const BAR_READ: Definition = Definition {
    key: "bar_read_us",
    what: "a guest's read of a double word of a vfio-user device's BAR",
    ..CONFIG_READ
};
const BAR_WRITE: Definition = Definition {
    key: "bar_write_us",
    what: "a guest's write of a double word to a vfio-user device's BAR",
    ..CONFIG_READ
};
const DOORBELL_RUNG: Definition = Definition {
    key: "doorbell_us",
    what: "from a guest's write to a doorbell to its sight of what the server, woken by it, wrote into memory",
    limit: Some("a bare ioeventfd and a thread that reads it"),
    ..CONFIG_READ
};
const INTERRUPT: Definition = Definition {
    key: "interrupt_us",
    what: "from a server's interrupt, through the handler of a guest that slept, to its next sleep",
    limit: Some("a bare irqfd"),
    ..CONFIG_READ
};

/// Measures each in the same guest.
pub(crate) fn measure(bench: &mut Bench) -> anyhow::Result<()> {
    type Body = fn(&mut Code, u32) -> Result<(), IcedError>;
    let kinds: [(&'static Definition, u32, Body); 5] = [
        (&CONFIG_READ, 3000, config_reads),
        (&BAR_READ, 3000, bar_reads),
        (&BAR_WRITE, 3000, bar_writes),
        (&DOORBELL_RUNG, 3000, doorbells),
        (&INTERRUPT, 3000, interrupts),
    ];
    let device = device::serve()?;
    let devices = [device.socket().to_owned()];
    let bare = placement::on_one_cpu(bare::Server::start)?;
    for (definition, count, body) in kinds {
        let kernel = guest(|code| body(code, count))?;
        let guest = Guest::small(kernel.path(), &devices);
        let results = everyone(bench, &guest, &bare, count)?;
        bench.add(results.measurement(definition, |time| *time));
        bench.failed(definition.key, results.failures);
    }
    Ok(())
}

fn everyone(
    bench: &Bench,
    guest: &Guest<'_>,
    bare: &bare::Server,
    count: u32,
) -> anyhow::Result<Results<f64>> {
    let programs = &bench.programs;
    let turn = |mut command: Command| move || time(&mut command, count);
    let mut turns = Turns::new(turn(programs.outrigger(guest)));
    if let Some(command) = programs.cloud_hypervisor(guest) {
        turns.peer(CLOUD_HYPERVISOR, turn(command));
    }
    if let Some(command) = programs.qemu(guest) {
        turns.peer(QEMU, turn(command));
    }
    let mut command = Command::new(env::current_exe()?);
    command.arg("bare-vmm").arg(guest.kernel).arg(bare.socket());
    turns.limit(turn(command));
    turns.take(bench.rounds(21))
}

/// The time of each of so many, in microseconds.
fn time(command: &mut Command, count: u32) -> anyhow::Result<f64> {
    let mut program = placement::on_one_cpu(|| Running::start(command))?;
    let begin = program.wait_for(BEGIN, Some(FAILED))?;
    let end = program.wait_for(END, Some(FAILED))?;
    Ok((end - begin).as_secs_f64() * 1e6 / f64::from(count))
}

/// A guest that has found the device, with its BAR 0 at EBP. What is measured begins and ends by itself.
fn guest(body: impl FnOnce(&mut Code) -> Result<(), IcedError>) -> anyhow::Result<NamedTempFile> {
    tiny::guest(|code| {
        let mut fails = code.create_label();
        set_up(code, fails)?;
        body(code)?;
        code.print(END)?;
        code.halt()?;
        code.set_label(&mut fails)?;
        code.print(FAILED)?;
        code.halt()?;
        code.begin_handler(VECTOR)?;
        code.end_handler()
    })
}

fn set_up(code: &mut Code, fails: CodeLabel) -> Result<(), IcedError> {
    code.silence_firmware(VECTOR)?;
    code.allow_interrupts()?;
    code.cli()?;
    driver::find(code, 0, fails)?;
    code.mov(edi, 1)?;
    code.bar_address()?;
    code.mov(edi, eax)?;
    for (place, value) in [(0, LOCAL_APIC), (4, 0), (8, VECTOR.into()), (12, 0)] {
        code.mov(dword_ptr(edi + place), value)?;
    }
    code.select_config(MSIX.into())?;
    code.in_(eax, dx)?;
    code.or(eax, (1u32 << 31).cast_signed())?;
    code.out(dx, eax)?;
    code.store(RUNG, 0)?;
    code.store(SLEPT, 0)
}

/// Does something a few times, and then so many times more behind [`BEGIN`]. It may use EAX, ECX and EDX.
fn repeat(
    code: &mut Code,
    count: u32,
    prepare: impl Fn(&mut Code) -> Result<(), IcedError>,
    act: impl Fn(&mut Code) -> Result<(), IcedError>,
) -> Result<(), IcedError> {
    prepare(code)?;
    times(code, count / 10, &act)?;
    code.print(BEGIN)?;
    prepare(code)?;
    times(code, count, &act)
}

fn config_reads(code: &mut Code, count: u32) -> Result<(), IcedError> {
    let select = |code: &mut Code| code.select_config(CONFIG.into());
    repeat(code, count, select, |code| code.in_(eax, dx))
}

fn bar_reads(code: &mut Code, count: u32) -> Result<(), IcedError> {
    repeat(code, count, nothing, |code| code.mov(eax, dword_ptr(ebp)))
}

fn bar_writes(code: &mut Code, count: u32) -> Result<(), IcedError> {
    repeat(code, count, nothing, |code| code.mov(dword_ptr(ebp), esi))
}

/// Rings, and waits for the answer, with EDI for how many there have been.
fn doorbells(code: &mut Code, count: u32) -> Result<(), IcedError> {
    let place = i32::try_from(DOORBELL).unwrap_or_default();
    code.mov(edi, 0)?;
    repeat(code, count, nothing, |code| {
        let mut again = code.create_label();
        code.inc(edi)?;
        code.mov(dword_ptr(ebp + place), edi)?;
        code.set_label(&mut again)?;
        code.cmp(dword_ptr(RUNG), edi)?;
        code.jne(again)
    })
}

/// Has the device send interrupts, and sleeps until each comes.
fn interrupts(code: &mut Code, count: u32) -> Result<(), IcedError> {
    let place = i32::try_from(START).unwrap_or_default();
    code.print(BEGIN)?;
    code.mov(dword_ptr(ebp + place), count)?;
    let mut again = code.create_label();
    code.set_label(&mut again)?;
    code.inc(dword_ptr(SLEPT))?;
    // The interrupt is taken where the guest sleeps, and not before.
    code.sti()?;
    code.hlt()?;
    code.cli()?;
    code.cmp(dword_ptr(SLEPT), count.cast_signed())?;
    code.jne(again)
}

fn nothing(_: &mut Code) -> Result<(), IcedError> {
    Ok(())
}
