//! Disks, which the guest has Linux's driver for.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use guest::ledger::Chance;
use rustix::process::Signal;
use tests::lab::ledger::{Ledger, await_verified, kill_all, leave_in_peace};
use tests::lab::{BOOT, Case, HostDevice, Report, SOON};

use crate::passthrough::NVME;

/// Bytes in an image.
const SIZE: u64 = 6 << 20;

/// The guest finds disks of all kinds as they are described, and what it has flushed to them survives its resets, ends of
/// VMs, and the end of the disks' servers by SIGKILL.
pub(crate) fn all(case: &mut Case<'_>) -> Result<()> {
    let nvme = HostDevice::at(NVME)?;
    nvme.bind("nvme")?;
    let mut chance = Chance::new(case.seed());
    let mut ledgers = Vec::new();
    for more in ["", ",direct=on", ",num_queues=4,queue_size=16"] {
        let id = format!("ledger-{}", ledgers.len());
        let path = case.path(&id);
        ledgers.push(Ledger::new(id, path, SIZE, chance.next(), more)?);
    }
    // A block device, with a cache that is flushed.
    let more = ",direct=on,num_queues=2";
    let path = PathBuf::from("/dev/nvme0n1");
    forget(&path)?;
    ledgers.push(Ledger::new("nvme".into(), path, SIZE, chance.next(), more)?);
    let [scratch, readonly] = ["scratch", "readonly"].map(|name| case.path(name));
    for path in [&scratch, &readonly] {
        File::create(path)?.set_len(SIZE)?;
    }
    let disks = || {
        let more = [
            format!(
                "id=scratch,path={},num_queues=4,serial=scratch 1",
                scratch.display()
            ),
            format!("id=readonly,path={},readonly=on", readonly.display()),
        ];
        let ledgers = ledgers.iter().map(Ledger::argument);
        ledgers.chain(more.map(Into::into)).collect::<Vec<_>>()
    };

    let mut command = case.linux(
        "6.12",
        "outrigger.checks=disk-facts,disk-zeroes outrigger.end=disks",
    );
    command.args(["--cpus", "4", "--disk"]).args(disks());
    let mut vm = case.start(&mut command)?;
    let report = Report::wait(&mut vm, BOOT)?;
    report.passed(6, &["disk-facts", "disk-zeroes"])?;
    are_described(&report)?;
    // 1 MiB became zeroes, but stays allocated; 512 KiB were discarded, and their place given back.
    let allocated = fs::metadata(&scratch)?.blocks() * 512;
    ensure!(
        (3 << 20..4 << 20).contains(&allocated),
        "{allocated} bytes are allocated"
    );
    await_verified(&mut vm, &ledgers)?;
    leave_in_peace(&mut vm, &mut ledgers)?;
    // The same servers, after a reset of the guest.
    await_verified(&mut vm, &ledgers)?;
    let kills = kill_all(&mut vm, &mut ledgers, &mut chance)?;
    println!("  {kills:?}");

    // Others, in another VM, with the other kernel.
    let mut command = case.linux("6.1", "outrigger.checks=none outrigger.end=disks");
    command
        .args(["--cpus", "2", "--disk"])
        .args(ledgers.iter().map(Ledger::argument));
    let mut vm = case.start(&mut command)?;
    await_verified(&mut vm, &ledgers)?;
    leave_in_peace(&mut vm, &mut ledgers)?;
    vm.signal(Signal::TERM)?;
    let exit = vm.wait(SOON)?;
    ensure!(exit.status.success(), "after SIGTERM: {}", exit.status);
    Ok(())
}

/// Writes zeroes to a device: other cases write to it, too.
fn forget(path: &Path) -> Result<()> {
    let mut device = File::options().write(true).open(path)?;
    io::copy(&mut io::repeat(0).take(SIZE), &mut device)?;
    Ok(device.sync_all()?)
}

/// Whether the guest's kernel has been told what `--disk` says.
fn are_described(report: &Report) -> Result<()> {
    let sectors = SIZE / 512;
    let file = format!("size={sectors}");
    let all = ["cache_type=write-back", "logical_block_size=512"];
    let expected: [&[&str]; 6] = [
        &["queues=1", "serial=ledger-0", "ro=0", &file],
        &["queues=1", "serial=ledger-1", "ro=0", &file],
        &["queues=4", "serial=ledger-2", "ro=0", &file],
        &["queues=2", "serial=nvme", "ro=0", "size=131072"],
        &[
            "queues=4",
            "serial=scratch-1",
            "ro=0",
            "discard_max_bytes=1073741824",
            "write_zeroes_max_bytes=67108864",
        ],
        &[
            "queues=1",
            "serial=",
            "ro=1",
            "discard_max_bytes=0",
            "write_zeroes_max_bytes=0",
        ],
    ];
    let disks: Vec<_> = report.facts("disk").collect();
    ensure!(disks.len() == expected.len(), "{disks:?}");
    for (disk, expected) in disks.iter().zip(expected) {
        let words: Vec<_> = disk.split_whitespace().collect();
        let missing = expected
            .iter()
            .chain(&all)
            .find(|word| !words.contains(word));
        ensure!(missing.is_none(), "no {missing:?} in {disk}");
    }
    Ok(())
}

/// Kills so many servers of disks at random moments. Nothing is lost that was flushed.
pub(crate) fn soak(case: &mut Case<'_>, kills: usize) -> Result<()> {
    const DISKS: usize = 10;
    let mut chance = Chance::new(case.seed());
    let mut ledgers = Vec::new();
    for number in 0..DISKS.min(kills) {
        let id = format!("ledger-{number}");
        let path = case.path(&id);
        let more = ["", ",direct=on", ",num_queues=2"][number % 3];
        ledgers.push(Ledger::new(id, path, SIZE, chance.next(), more)?);
    }
    let (mut count, mut between, mut flushed) = (0, 0, 0);
    while count < kills {
        let mut command = case.linux("6.12", "outrigger.checks=none outrigger.end=disks");
        command
            .args(["--cpus", "2", "--disk"])
            .args(ledgers.iter().map(Ledger::argument));
        let mut vm = case.start(&mut command)?;
        await_verified(&mut vm, &ledgers)?;
        let found = kill_all(&mut vm, &mut ledgers, &mut chance)?;
        count += found.count;
        between += found.between;
        flushed += found.flushed;
        println!(
            "  {count} kills, {between} of them between a write and its flush, {flushed} flushes, seed {}",
            case.seed()
        );
    }
    Ok(())
}
