//! How long a start takes, and what the program then takes of the machine.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use tempfile::NamedTempFile;
use tests::tiny;

use crate::program::Running;
use crate::{Arguments, percentile};

/// What one run of a program showed.
#[derive(Debug, Clone, Copy)]
struct Figures {
    start: Duration,
    /// Resident and proportional memory beyond guest RAM, in KiB.
    rss: u64,
    pss: u64,
    threads: usize,
    fds: usize,
}

/// Every program boots the same guest, which sends one character to its serial port and then waits.
pub(crate) fn measure(arguments: &Arguments) -> anyhow::Result<()> {
    let kernel = tiny::guest(|code| {
        code.print(b'x')?;
        code.halt()
    })?;
    let image = NamedTempFile::new()?;
    image.as_file().set_len(1 << 30)?;
    let programs = programs(arguments, kernel.path(), image.path());
    let mut results: BTreeMap<&str, Vec<Figures>> = BTreeMap::new();
    for _ in 0..arguments.runs {
        for (name, command) in &programs {
            let figures = run(command).with_context(|| format!("cannot measure {name}"))?;
            results.entry(*name).or_default().push(figures);
        }
    }
    println!(
        "a tiny PVH guest with one vCPU and 512 MiB; medians of {} runs",
        arguments.runs
    );
    println!(
        "{:18} {:>12} {:>12} {:>9} {:>9} {:>8} {:>5}",
        "", "start ms", "(10 % to 90 %)", "RSS MiB", "PSS MiB", "threads", "fds"
    );
    for (name, _) in &programs {
        let runs = results.remove(name).unwrap_or_default();
        let values = |of: fn(&Figures) -> f64| runs.iter().map(of).collect();
        let [low, middle, high] = [10, 50, 90]
            .map(|percent| percentile(values(|run| run.start.as_secs_f64() * 1e3), percent));
        let median = |of| percentile(values(of), 50);
        println!(
            "{name:18} {middle:12.2} {:>14} {:9.2} {:9.2} {:8} {:5}",
            format!("{low:.2}..{high:.2}"),
            median(|run| run.rss as f64 / 1024.0),
            median(|run| run.pss as f64 / 1024.0),
            median(|run| run.threads as f64),
            median(|run| run.fds as f64),
        );
    }
    for (name, given) in [
        ("cloud-hypervisor", arguments.cloud_hypervisor.is_some()),
        ("qemu", arguments.qemu.is_some()),
    ] {
        if !given {
            println!("{name}: not measured; give its path");
        }
    }
    Ok(())
}

/// The programs to be measured, each with its arguments.
fn programs(
    arguments: &Arguments,
    kernel: &Path,
    image: &Path,
) -> Vec<(&'static str, Vec<PathBuf>)> {
    // One run's server may still have the image when the next one's starts.
    let disk = format!("path={},readonly=on", image.display());
    let command = |program: &Path, words: &str| {
        let words = words.split(' ').map(|word| match word {
            "KERNEL" => kernel.to_owned(),
            "DISK" => PathBuf::from(&disk),
            word => word.into(),
        });
        [program.to_owned()].into_iter().chain(words).collect()
    };
    let words = "--kernel KERNEL --memory size=512M --serial tty";
    let mut programs = vec![
        ("outrigger", command(&arguments.outrigger, words)),
        (
            "outrigger, a disk",
            command(&arguments.outrigger, &format!("{words} --disk DISK")),
        ),
    ];
    if let Some(program) = &arguments.cloud_hypervisor {
        let words = "--kernel KERNEL --memory size=512M,shared=on --serial tty --console off";
        programs.push(("cloud-hypervisor", command(program, words)));
    }
    if let Some(program) = &arguments.qemu {
        let words = "-M microvm,accel=kvm -m 512M -nodefaults -no-user-config -nographic -serial stdio -kernel KERNEL";
        programs.push(("qemu microvm", command(program, words)));
    }
    programs
}

/// Starts a program, waits for its guest's first character, and looks at what it takes.
fn run(command: &[PathBuf]) -> anyhow::Result<Figures> {
    let mut program = Running::start(command)?;
    let start = program.wait_for(b'x', None)? - program.started;
    let process = program.folder();
    let (rss, pss) = memory(&fs::read_to_string(process.join("smaps"))?);
    let count = |folder| fs::read_dir(process.join(folder)).map(Iterator::count);
    Ok(Figures {
        start,
        rss,
        pss,
        threads: count("task")?,
        fds: count("fd")?,
    })
}

/// Resident and proportional memory in KiB, without the mapping of guest RAM: the one that is as large as it.
fn memory(smaps: &str) -> (u64, u64) {
    const GUEST_RAM_KIB: u64 = 512 << 10;
    let (mut rss, mut pss) = (0, 0);
    let mut is_ram = false;
    for line in smaps.lines() {
        let mut words = line.split_ascii_whitespace();
        let (Some(key), Some(value)) = (words.next(), words.next()) else {
            continue;
        };
        let Ok(kib) = value.parse::<u64>() else {
            continue;
        };
        match key {
            "Size:" => is_ram = kib >= GUEST_RAM_KIB,
            "Rss:" if !is_ram => rss += kib,
            "Pss:" if !is_ram => pss += kib,
            _ => {}
        }
    }
    (rss, pss)
}
