//! Files that are written and read back all the time, in the file system on the disk whose serial number is `files`.
//!
//! `FILES ROUND` says that all of them are as they were left, those that are still in the guest's cache and those that are
//! not; `FILES FAILED why` if not. At the end the file system is in peace, before `FILES DONE`.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use guest::ledger::Chance;
use rustix::fs::{Advice, fadvise};

use crate::passthrough::busybox;
use crate::pci::Device;
use crate::virtio::DISK;
use crate::virtio::block::Block;

const FOLDER: &str = "/files";
const FILES: usize = 8;

/// Keeps the file system busy until that is over, if there is one.
pub(super) fn keep_busy(is_over: &AtomicBool) -> Result<()> {
    for device in Device::with_ids(DISK)? {
        let block = Block::of(&device)?;
        if block.attribute("serial")? == "files" {
            return work(&block.path(), is_over)
                .inspect_err(|error| println!("FILES FAILED {error:#}"));
        }
    }
    Ok(())
}

fn work(disk: &Path, is_over: &AtomicBool) -> Result<()> {
    const PAUSE: Duration = Duration::from_millis(100);
    fs::create_dir_all(FOLDER)?;
    let disk = disk.to_string_lossy();
    busybox(&["mount", "-t", "ext4", &disk, FOLDER])?;
    let mut seeds = [None; FILES];
    let mut chance = Chance::new(2);
    for round in 1_u64.. {
        if is_over.load(Ordering::Relaxed) {
            break;
        }
        let number = usize::try_from(chance.below(FILES as u64))?;
        let seed = seeds.get_mut(number).context("no such file")?;
        let file = write(number, round)?;
        *seed = Some(round);
        file.sync_all()?;
        for (number, seed) in seeds.iter().enumerate() {
            if let Some(seed) = seed {
                verify(number, *seed, chance.below(2) == 0)?;
            }
        }
        println!("FILES {round}");
        thread::sleep(PAUSE);
    }
    busybox(&["umount", FOLDER])?;
    println!("FILES DONE");
    Ok(())
}

fn path(number: usize) -> PathBuf {
    Path::new(FOLDER).join(format!("file-{number}"))
}

fn contents(seed: u64) -> Vec<u8> {
    const MOST: u64 = 32 << 10;
    let mut chance = Chance::new(seed);
    let words = chance.below(MOST / 8);
    (0..words)
        .flat_map(|_| chance.next().to_le_bytes())
        .collect()
}

fn write(number: usize, seed: u64) -> Result<File> {
    let path = path(number);
    fs::write(&path, contents(seed)).context("writing a file")?;
    Ok(File::open(path)?)
}

/// Compares a file with what was written, and forgets it or not.
fn verify(number: usize, seed: u64, forget: bool) -> Result<()> {
    let path = path(number);
    let read = fs::read(&path)?;
    ensure!(
        read == contents(seed),
        "file {number} is not of round {seed}"
    );
    if forget {
        fadvise(File::open(path)?, 0, None, Advice::DontNeed)?;
    }
    Ok(())
}
