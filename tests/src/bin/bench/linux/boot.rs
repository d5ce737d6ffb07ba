//! How long Linux takes to boot.

use std::process::Command;

use super::{Linux, PATIENCE};
use crate::Bench;
use crate::measurement::{Aim, Better, Definition};
use crate::program::Running;
use crate::programs::{CLOUD_HYPERVISOR, QEMU};
use crate::turns::Turns;

const BOOT: Definition = Definition {
    key: "linux_boot_ms",
    what: "from the start of the process to the first word of a Linux guest's init, with 512 MiB of memory",
    unit: "ms",
    better: Better::Less,
    limit: None,
    aims: &[Aim::OfEachPeer(1.0)],
};

/// Everyone boots it, QEMU on its smallest machine.
pub(super) fn measure(bench: &mut Bench, linux: &Linux) -> anyhow::Result<()> {
    let guest = linux.guest();
    let programs = &bench.programs;
    let turn = |name: &str, mut command: Command| {
        linux.add(name, &mut command, "rdinit=/bin/guest -- first-word");
        move || run(&mut command)
    };
    let mut turns = Turns::new(turn("", programs.outrigger(&guest)));
    if let Some(command) = programs.cloud_hypervisor(&guest) {
        turns.peer(CLOUD_HYPERVISOR, turn(CLOUD_HYPERVISOR, command));
    }
    if let Some(command) = programs.qemu_microvm(&guest) {
        turns.peer(QEMU, turn(QEMU, command));
    }
    let results = turns.take(bench.rounds(20))?;
    bench.add(results.measurement(&BOOT, |time| *time));
    bench.failed(BOOT.key, results.failures);
    Ok(())
}

/// In milliseconds.
fn run(command: &mut Command) -> anyhow::Result<f64> {
    let mut program = Running::start(command)?;
    let (at, _) = program.wait_for_line("FIRST WORD", PATIENCE)?;
    Ok((at - program.started).as_secs_f64() * 1e3)
}
