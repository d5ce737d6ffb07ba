//! How fast a disk is, and what it costs, beside QEMU's.
//!
//! A guest of a few hundred instructions drives the queue. Both VMMs run the same file, with the same image, one vCPU
//! and one thread for the disk.
//!
//! Outrigger's server is in a session of its own, which is a group of its own for the scheduler. On a busy machine that
//! slows it down, whatever its priority: figures from there mean something with `kernel.sched_autogroup_enabled=0` only.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::Context;
use tempfile::NamedTempFile;
use tests::tiny::disk::{BEGIN, END, FAILED, Job, disk_guest};

use crate::Bench;
use crate::measurement::{Aim, Better, Definition};
use crate::program::Running;
use crate::programs::{Guest, QEMU};
use crate::turns::{Results, Turns};

/// Bytes of the image. All of it is in the page cache, where that is used.
const SIZE: u64 = 1 << 29;

/// Requests of one kind, and what is measured of them.
struct Kind {
    speed: Definition,
    cpu: &'static str,
    job: Job,
}

/// Requests of each kind: half a second's, more or less.
static KINDS: [Kind; 6] = [
    short(
        "disk_read_4k_1_kiops",
        &[],
        "4 KiB random reads, 1 at a time",
        false,
        1,
    ),
    short(
        "disk_read_4k_32_kiops",
        FASTER,
        "4 KiB random reads, 32 at a time",
        false,
        32,
    ),
    short(
        "disk_write_4k_1_kiops",
        &[],
        "4 KiB random writes, 1 at a time",
        true,
        1,
    ),
    short(
        "disk_write_4k_32_kiops",
        FASTER,
        "4 KiB random writes, 32 at a time",
        true,
        32,
    ),
    long("disk_read_1m_mib_s", "1 MiB sequential reads", false),
    long("disk_write_1m_mib_s", "1 MiB sequential writes", true),
];

/// What a disk that is kept busy should reach.
pub(crate) const FASTER: &[Aim] = &[Aim::OfEachPeer(1.2)];

const CPU: Definition = Definition {
    key: "disk_cpu_us",
    what: "CPU time for each request, of all processes together",
    unit: "us",
    better: Better::Less,
    limit: None,
    aims: &[],
};

const OWN_CPU: Definition = Definition {
    key: "disk_own_cpu_us",
    what: "of that, what the guest's vCPU has not taken: where it is the slowest, this tells how fast the disk is",
    ..CPU
};

const fn short(
    key: &'static str,
    aims: &'static [Aim],
    what: &'static str,
    writes: bool,
    depth: u16,
) -> Kind {
    Kind {
        speed: Definition {
            key,
            what,
            unit: "thousand requests a second",
            better: Better::More,
            limit: None,
            aims,
        },
        cpu: what,
        job: Job {
            writes,
            length: 4096,
            depth,
            requests: if depth == 1 { 20_000 } else { 80_000 },
            random: true,
            checked: false,
            size: SIZE,
        },
    }
}

const fn long(key: &'static str, what: &'static str, writes: bool) -> Kind {
    Kind {
        speed: Definition {
            key,
            what,
            unit: "MiB/s",
            better: Better::More,
            limit: None,
            aims: &[],
        },
        cpu: what,
        job: Job {
            writes,
            length: 1 << 20,
            depth: 1,
            requests: 2_000,
            random: false,
            checked: false,
            size: SIZE,
        },
    }
}

/// What one run showed, in microseconds for each request.
#[derive(Clone, Copy, Debug)]
struct Figures {
    time: f64,
    /// CPU time of all processes.
    cpu: f64,
    /// The same without the vCPU's.
    own_cpu: f64,
}

pub(crate) fn measure(bench: &mut Bench) -> anyhow::Result<()> {
    let image = image()?;
    let mut costs = Vec::new();
    for kind in &KINDS {
        for direct in [false, true] {
            // What depends on the storage takes its time.
            if direct && bench.quick {
                continue;
            }
            // What was written before does not go to the storage meanwhile.
            image.as_file().sync_all()?;
            let mut job = kind.job;
            job.requests /= if direct { 4 } else { 1 };
            job.requests /= if bench.quick { 4 } else { 1 };
            let case = if direct { "direct" } else { "page cache" };
            let results = run_both(bench, job, image.path(), direct)?;
            let speed = results.measurement(&kind.speed, |run| {
                if job.length == 4096 {
                    1e3 / run.time
                } else {
                    1e6 / run.time
                }
            });
            bench.add(speed.in_case(case));
            let cost = results.measurement(&CPU, |run| run.cpu);
            let what = format!("{}, {case}", kind.cpu);
            costs.push(cost.in_case(&what));
            if job.depth > 1 {
                let own = results.measurement(&OWN_CPU, |run| run.own_cpu);
                costs.push(own.in_case(&what));
            }
            bench.failed(kind.speed.key, results.failures);
        }
    }
    costs.into_iter().for_each(|cost| bench.add(cost));
    Ok(())
}

fn run_both(
    bench: &Bench,
    job: Job,
    image: &Path,
    direct: bool,
) -> anyhow::Result<Results<Figures>> {
    let kernel = disk_guest(&[job])?;
    let guest = Guest::small(kernel.path(), &[]);
    let mut ours = bench.programs.outrigger(&guest);
    add_disk("", &mut ours, image, direct);
    let mut turns = Turns::new(move || run(&mut ours, job.requests));
    if let Some(mut theirs) = bench.programs.qemu(&guest) {
        add_disk(QEMU, &mut theirs, image, direct);
        turns.peer(QEMU, move || run(&mut theirs, job.requests));
    }
    turns.take(bench.rounds(11))
}

/// Gives a program's guest a disk, with one queue and one thread for it.
pub(crate) fn add_disk(name: &str, command: &mut Command, image: &Path, direct: bool) {
    let image = image.display();
    if name == QEMU {
        let cache = if direct { "none" } else { "writeback" };
        command.args(["-name", "disk,debug-threads=on"]);
        command.args(["-object", "iothread,id=thread", "-drive"]);
        command.arg(format!(
            "if=none,id=disk,format=raw,aio=io_uring,cache={cache},file={image}"
        ));
        command.args([
            "-device",
            "virtio-blk-pci,disable-legacy=on,drive=disk,iothread=thread,num-queues=1,queue-size=256",
        ]);
    } else {
        let option = if direct { ",direct=on" } else { "" };
        command.args(["--disk", &format!("path={image}{option}")]);
    }
}

/// An image without holes, beside this program: other folders may be in memory alone.
pub(crate) fn image() -> anyhow::Result<NamedTempFile> {
    let program = std::env::current_exe()?;
    let folder = program.parent().context("the program is nowhere")?;
    let mut file = NamedTempFile::new_in(folder)?;
    let piece = vec![0x5a; 1 << 20];
    for _ in 0..SIZE >> 20 {
        file.write_all(&piece)?;
    }
    File::sync_all(file.as_file())?;
    Ok(file)
}

fn run(command: &mut Command, requests: u32) -> anyhow::Result<Figures> {
    let mut program = Running::start(command)?;
    let begin = program.wait_for(BEGIN, Some(FAILED))?;
    let (cpu_before, vcpu_before) = (program.cpu_time()?, program.vcpu_time()?);
    let end = program.wait_for(END, Some(FAILED))?;
    let cpu = program.cpu_time()? - cpu_before;
    let vcpu = program.vcpu_time()? - vcpu_before;
    let each = |duration: Duration| duration.as_secs_f64() * 1e6 / f64::from(requests);
    Ok(Figures {
        time: each(end - begin),
        cpu: each(cpu),
        own_cpu: each(cpu.saturating_sub(vcpu)),
    })
}
