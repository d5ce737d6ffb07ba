//! How fast a disk is, and what it costs, beside QEMU's.
//!
//! A guest of a few hundred instructions drives the queue. Both VMMs run the same file, with the same image, one vCPU
//! and one thread for the disk. A ratio is made of two runs, one right after the other, so that what else goes on in the
//! machine disturbs few of them.
//!
//! Outrigger's server is in a session of its own, which is a group of its own for the scheduler. On a busy machine that
//! slows it down, whatever its priority: figures from there mean something with `kernel.sched_autogroup_enabled=0` only.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::Context;
use tempfile::NamedTempFile;
use tests::tiny::disk::{BEGIN, END, FAILED, Job, disk_guest};

use crate::program::Running;
use crate::{Arguments, percentile};

/// Bytes of the image. All of it is in the page cache, where that is used.
const SIZE: u64 = 1 << 29;

/// Requests of each kind: half a second's, more or less.
const CASES: [(&str, Job); 6] = [
    ("4 KiB random read, depth 1", short(false, 1, 20_000)),
    ("4 KiB random read, depth 32", short(false, 32, 40_000)),
    ("4 KiB random write, depth 1", short(true, 1, 20_000)),
    ("4 KiB random write, depth 32", short(true, 32, 40_000)),
    ("1 MiB sequential read", long(false, 2_000)),
    ("1 MiB sequential write", long(true, 2_000)),
];

const fn short(writes: bool, depth: u16, requests: u32) -> Job {
    Job {
        writes,
        length: 4096,
        depth,
        requests,
        random: true,
        checked: false,
        size: SIZE,
    }
}

const fn long(writes: bool, requests: u32) -> Job {
    Job {
        writes,
        length: 1 << 20,
        depth: 1,
        requests,
        random: false,
        checked: false,
        size: SIZE,
    }
}

/// What one run showed, in microseconds for each request.
#[derive(Clone, Copy, Debug)]
struct Figures {
    time: f64,
    /// CPU time of all processes, and of that what is not the guest's.
    cpu: f64,
    device: f64,
}

pub(crate) fn measure(arguments: &Arguments) -> anyhow::Result<()> {
    let image = image()?;
    println!();
    println!(
        "a disk: us of time and of CPU time for each request, and of that without the vCPU; medians of {} runs",
        arguments.disk_runs
    );
    println!(
        "QEMU's against Outrigger's: median and quartiles of the ratios, more than 1 if Outrigger takes less"
    );
    println!(
        "{:39} {:^23} {:^23} {:^18} {:^18} {:^18}",
        "", "outrigger", "QEMU", "time", "CPU", "without vCPU"
    );
    for direct in [false, true] {
        for (name, mut job) in CASES {
            let name = format!("{name}{}", if direct { ", direct" } else { "" });
            let part = arguments.disk.as_deref().unwrap_or_default();
            if !name.contains(part) {
                continue;
            }
            if direct {
                job.requests /= 4;
            }
            // What was written before does not go to the storage meanwhile.
            image.as_file().sync_all()?;
            let kernel = disk_guest(&[job])?;
            let outrigger = outrigger(&arguments.outrigger, kernel.path(), image.path(), direct);
            let qemu = arguments
                .qemu
                .as_ref()
                .map(|program| qemu(program, kernel.path(), image.path(), direct));
            let (mut ours, mut theirs) = (Vec::new(), Vec::new());
            for _ in 0..arguments.disk_runs {
                ours.push(run(&outrigger, job.requests).context("cannot measure outrigger")?);
                if let Some(qemu) = &qemu {
                    theirs.push(run(qemu, job.requests).context("cannot measure QEMU")?);
                }
            }
            println!(
                "{name:39} {} {} {} {} {}",
                medians(&ours),
                medians(&theirs),
                ratio(&ours, &theirs, |run| run.time),
                ratio(&ours, &theirs, |run| run.cpu),
                ratio(&ours, &theirs, |run| run.device),
            );
        }
    }
    Ok(())
}

/// An image without holes, beside this program: other folders may be in memory alone.
fn image() -> anyhow::Result<NamedTempFile> {
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

fn outrigger(program: &Path, kernel: &Path, image: &Path, direct: bool) -> Vec<PathBuf> {
    let direct = if direct { ",direct=on" } else { "" };
    command(
        program,
        "--memory size=64M --serial tty --kernel KERNEL --disk DISK",
        kernel,
        &format!("path={}{direct}", image.display()),
    )
}

fn qemu(program: &Path, kernel: &Path, image: &Path, direct: bool) -> Vec<PathBuf> {
    let cache = if direct { "none" } else { "writeback" };
    command(
        program,
        "-accel kvm -M q35 -bios qboot.rom -m 64M -nodefaults -no-user-config -display none -serial stdio -name disk,debug-threads=on \
         -object iothread,id=thread -kernel KERNEL -drive DISK \
         -device virtio-blk-pci,disable-legacy=on,drive=disk,iothread=thread,num-queues=1,queue-size=256",
        kernel,
        &format!(
            "if=none,id=disk,format=raw,aio=io_uring,cache={cache},file={}",
            image.display()
        ),
    )
}

fn command(program: &Path, words: &str, kernel: &Path, disk: &str) -> Vec<PathBuf> {
    let words = words.split_ascii_whitespace().map(|word| match word {
        "KERNEL" => kernel.to_owned(),
        "DISK" => disk.into(),
        word => word.into(),
    });
    [program.to_owned()].into_iter().chain(words).collect()
}

fn run(command: &[PathBuf], requests: u32) -> anyhow::Result<Figures> {
    let mut program = Running::start(command)?;
    let begin = program.wait_for(BEGIN, Some(FAILED))?;
    let cpu_before = program.cpu_time()?;
    let end = program.wait_for(END, Some(FAILED))?;
    let cpu_after = program.cpu_time()?;
    let each = |duration: std::time::Duration| duration.as_secs_f64() * 1e6 / f64::from(requests);
    let cpu = cpu_after.all - cpu_before.all;
    let vcpu = cpu_after.vcpu - cpu_before.vcpu;
    Ok(Figures {
        time: each(end - begin),
        cpu: each(cpu),
        device: each(cpu.saturating_sub(vcpu)),
    })
}

fn medians(runs: &[Figures]) -> String {
    let median = |of: fn(&Figures) -> f64| percentile(runs.iter().map(of).collect(), 50);
    format!(
        "{:7.1} {:7.1} {:7.1}",
        median(|run| run.time),
        median(|run| run.cpu),
        median(|run| run.device)
    )
}

fn ratio(ours: &[Figures], theirs: &[Figures], of: fn(&Figures) -> f64) -> String {
    let ratios = ours
        .iter()
        .zip(theirs)
        .map(|(ours, theirs)| of(theirs) / of(ours));
    let ratios: Vec<_> = ratios.collect();
    let [low, middle, high] = [25, 50, 75].map(|percent| percentile(ratios.clone(), percent));
    format!("{middle:6.2} ({low:.2}..{high:.2})")
}
