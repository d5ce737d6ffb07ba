//! How long it takes until a guest goes on from a snapshot.

use std::env;
use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use serde_json::json;
use tempfile::TempDir;
use vm_memory::{GuestAddress, GuestMemoryBackend, ReadVolatile};

use crate::Bench;
use crate::full_guest::{Life, READY, full_guest};
use crate::http::{get, put};
use crate::measurement::{Better, Definition};
use crate::plain_copy::fresh;
use crate::program::Running;
use crate::programs::{CLOUD_HYPERVISOR, Guest};
use crate::turns::Turns;

const RESTORE: Definition = Definition {
    key: "snapshot_restore_ms_per_gib",
    what: "from the start of the process to the first character of a guest whose memory is in a snapshot, all of it in use \
           and the file in the page cache, by its size",
    unit: "ms",
    better: Better::Less,
    limit: Some("reading the same file into new shared memory with a thread for each CPU"),
    aims: &[],
};

pub(crate) fn measure(bench: &mut Bench) -> anyhow::Result<()> {
    let mebibytes = if bench.quick { 256 } else { 1024 };
    let kernel = full_guest(mebibytes, Life::Talking)?;
    let guest = Guest {
        mebibytes,
        ..Guest::small(kernel.path(), &[])
    };
    let programs = &bench.programs;
    let per_gibibyte = |time: Duration| time.as_secs_f64() * 1e3 * 1024.0 / f64::from(mebibytes);

    let saved = save(&mut programs.outrigger(&guest)).context("saving Outrigger's guest")?;
    let folder = saved.path().to_owned();
    let mut command = Command::new(&programs.outrigger);
    command.args(["--restore", &source(&folder, "on")]);
    let mut turns = Turns::new(move || restore(&mut command).map(per_gibibyte));
    turns.limit(move || read(&folder.join("ram")).map(per_gibibyte));

    let mut failure = None;
    let theirs = programs.cloud_hypervisor(&guest);
    let theirs = theirs.map(|mut command| save(&mut command)).transpose();
    match (&theirs, &programs.cloud_hypervisor) {
        (Ok(Some(saved)), Some(path)) => {
            let mut command = Command::new(path);
            command.args(["--restore", &source(saved.path(), "true")]);
            turns.peer(CLOUD_HYPERVISOR, move || {
                restore(&mut command).map(per_gibibyte)
            });
        }
        (Err(error), _) => failure = Some((CLOUD_HYPERVISOR, anyhow!("{error:#}"))),
        _ => {}
    }
    let results = turns.take(bench.rounds(11))?;
    bench.add(results.measurement(&RESTORE, |time| *time));
    let failures = results.failures.into_iter().chain(failure);
    bench.failed(RESTORE.key, failures.collect());
    Ok(())
}

/// Saves a guest that is in use, and ends it.
fn save(command: &mut Command) -> anyhow::Result<TempDir> {
    let program = env::current_exe()?;
    let beside = program.parent().context("the program is nowhere")?;
    let folder = tempfile::tempdir_in(beside)?;
    let sockets = tempfile::tempdir()?;
    let api = sockets.path().join("api.sock");
    let mut vmm = Running::start(command.arg("--api-socket").arg(&api))?;
    vmm.wait_for(READY, None)?;
    let mut output = vmm.take_output()?;
    // A guest whose characters nobody takes would stand still.
    thread::spawn(move || std::io::copy(&mut output, &mut std::io::sink()));
    pause_and_save(&api, folder.path()).map_err(|error| vmm.explain(error))?;
    Ok(folder)
}

fn pause_and_save(api: &Path, folder: &Path) -> anyhow::Result<()> {
    put(api, "vm.pause", "")?;
    let deadline = Instant::now() + Duration::from_secs(10);
    while get(api, "vm.info")?["state"] != "Paused" {
        if Instant::now() > deadline {
            bail!("the guest does not stand still");
        }
        thread::yield_now();
    }
    let url = format!("file://{}", folder.display());
    put(
        api,
        "vm.snapshot",
        &json!({"destination_url": url}).to_string(),
    )
}

fn source(folder: &Path, resume: &str) -> String {
    format!("source_url=file://{},resume={resume}", folder.display())
}

fn restore(command: &mut Command) -> anyhow::Result<Duration> {
    let mut vmm = Running::start(command)?;
    let first = vmm.wait_for_any()?;
    Ok(first - vmm.started)
}

/// Reads a file into new memory.
fn read(path: &Path) -> anyhow::Result<Duration> {
    let began = Instant::now();
    let size = File::open(path)?.metadata()?.len();
    let memory = fresh(size)?;
    let threads = thread::available_parallelism()?.get();
    let share = usize::try_from(size)?.div_ceil(threads);
    let one = |number: usize| -> anyhow::Result<()> {
        let start = u64::try_from(number * share)?;
        let mut file = File::open(path)?;
        file.seek(SeekFrom::Start(start))?;
        let length = share.min(usize::try_from(size.saturating_sub(start))?);
        let mut part = memory.get_slice(GuestAddress(start), length)?;
        Ok(file.read_exact_volatile(&mut part)?)
    };
    let one = &one;
    thread::scope(|scope| {
        let threads: Vec<_> = (0..threads)
            .map(|number| scope.spawn(move || one(number)))
            .collect();
        for thread in threads {
            thread.join().map_err(|_| anyhow!("a thread panicked"))??;
        }
        Ok(began.elapsed())
    })
}
