//! Disks that a guest writes according to plan (`outrigger.end=disks`), and whose servers are killed meanwhile.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use super::{BOOT, Process, SOON, Server};
use anyhow::{Context, Result, bail, ensure};
use guest::ledger::{Chance, PLAN, Plan};
use rustix::process::Signal;

/// A disk with a plan.
#[derive(Debug)]
pub struct Ledger {
    /// Its name and its serial number.
    id: String,
    path: PathBuf,
    file: File,
    plan: Plan,
    more: &'static str,
}

/// Regions of each disk: one for each way to write.
const REGIONS: usize = 3;

/// How many generations a guest has begun in a region, and does not speak of, when its disk is lost.
const KILLED: u64 = 1;

impl Ledger {
    /// Makes a plan on an image of `size` bytes, or on a block device. `more` is added to what `--disk` says.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn new(
        id: String,
        path: PathBuf,
        size: u64,
        seed: u64,
        more: &'static str,
    ) -> Result<Self> {
        let mut options = File::options();
        let file = options.read(true).write(true).create(true).open(&path);
        let file = file.with_context(|| path.display().to_string())?;
        if file.metadata()?.is_file() {
            file.set_len(size)?;
        }
        let ledger = Self {
            id,
            path,
            file,
            plan: Plan::new(seed, size, REGIONS),
            more,
        };
        ledger.write_plan()?;
        Ok(ledger)
    }

    /// What `--disk` is told.
    pub fn argument(&self) -> OsString {
        let Self { id, path, more, .. } = self;
        format!("id={id},serial={id},path={}{more}", path.display()).into()
    }

    fn write_plan(&self) -> Result<()> {
        self.file.write_all_at(&self.plan.page()?, 0)?;
        // A server may read past the cache.
        Ok(self.file.sync_all()?)
    }

    /// Notes how far the guest has come, and verifies the disk without it. In each region it may have begun so many
    /// generations more, of which it says nothing. Returns how many sectors the kill has found between being written and
    /// being flushed.
    fn verify(&mut self, ended: &[u64], unsaid: u64) -> Result<u64> {
        for (region, flushed) in self.plan.regions.iter_mut().zip(ended) {
            region.begun = flushed + unsaid;
            region.unsure.extend(flushed + 1..=region.begun);
        }
        if unsaid > 0 {
            self.write_plan()?;
        } else {
            let mut page = [0; PLAN];
            self.file.read_exact_at(&mut page, 0)?;
            ensure!(
                Plan::parse(&page).as_ref() == Some(&self.plan),
                "{}: the plan is not as the guest has left it",
                self.id
            );
        }
        let read = |data: &mut [u8], offset| self.file.read_exact_at(data, offset);
        let verified = self.plan.verify(read);
        verified.with_context(|| format!("{} after {ended:?}", self.id))
    }
}

/// Waits until the guest has verified all disks.
///
/// # Errors
/// When it does not, or finds that something is lost.
pub fn await_verified(vm: &mut Process, ledgers: &[Ledger]) -> Result<()> {
    for ledger in ledgers {
        let line = vm.wait_for(&format!("CHECKED {} ", ledger.id), BOOT)?;
        ensure!(line.text.ends_with(" ok"), "{}", line.text);
    }
    Ok(())
}

/// Waits until the guest has flushed each disk a few times.
///
/// # Errors
/// When it does not.
pub fn await_flushes(vm: &mut Process, ledgers: &[Ledger]) -> Result<()> {
    const FLUSHES: usize = 4;
    let mut flushes = HashMap::<_, usize>::new();
    while flushes.len() < ledgers.len() || flushes.values().any(|count| *count < FLUSHES) {
        *flushes.entry(flushed_disk(vm)?).or_default() += 1;
    }
    Ok(())
}

/// Waits until the guest has done with its disks, whose power button was pressed, and verifies them. It has found them
/// after line `from`.
///
/// # Errors
/// When it does not come to an end, or something is lost.
pub fn verify_ended(vm: &mut Process, from: usize, ledgers: &mut [Ledger]) -> Result<()> {
    vm.wait_for("DISKS DONE", SOON)?;
    let ends = ends(vm, from)?;
    for ledger in ledgers {
        ledger.verify(of(&ends, &ledger.id)?, 0)?;
    }
    Ok(())
}

/// Verifies the disks of a guest that has ended without a word, with its VM.
///
/// # Errors
/// When something is lost.
pub fn verify_lost(vm: &Process, from: usize, ledgers: &mut [Ledger]) -> Result<()> {
    /// Most that may have been on its way to the test.
    const UNSAID: u64 = 16;
    for ledger in ledgers {
        let regions = ledger.plan.regions.iter();
        let mut flushed: Vec<_> = regions.map(|region| region.begun).collect();
        for line in vm.lines().iter().skip(from) {
            let words: Vec<_> = line.text.split_whitespace().collect();
            let ["FLUSHED", disk, region, generation] = words[..] else {
                continue;
            };
            if disk == ledger.id
                && let Some(flushed) = flushed.get_mut(region.parse::<usize>()?)
            {
                // The last line may be cut off.
                *flushed = generation.parse().unwrap_or(0).max(*flushed);
            }
        }
        ledger.verify(&flushed, UNSAID)?;
    }
    Ok(())
}

/// Lets the guest flush each disk a few times, presses the power button, and verifies the disks. The guest reboots.
///
/// # Errors
/// When it does not come to an end, or something is lost.
pub fn leave_in_peace(vm: &mut Process, ledgers: &mut [Ledger]) -> Result<()> {
    let from = vm.lines().len();
    await_flushes(vm, ledgers)?;
    vm.signal(Signal::POWER)?;
    verify_ended(vm, from, ledgers)
}

/// What kills have found.
#[derive(Clone, Copy, Debug, Default)]
pub struct Kills {
    /// How many there were.
    pub count: usize,
    /// How many came while something was written that was not flushed.
    pub between: usize,
    /// How many generations were flushed before.
    pub flushed: u64,
}

/// Kills the server of each disk at a moment of its own, ends the VM, and verifies the disks.
///
/// # Errors
/// When the VM does not survive that, or something is lost.
pub fn kill_all(vm: &mut Process, ledgers: &mut [Ledger], chance: &mut Chance) -> Result<Kills> {
    const FLUSHES: u64 = 12;
    const MOMENT: u64 = 20_000; // microseconds
    let from = vm.lines().len();
    let mut due = HashMap::new();
    for ledger in &*ledgers {
        let server = Server::of(vm, &ledger.id)?;
        let moment = Duration::from_micros(chance.below(MOMENT));
        due.insert(
            ledger.id.clone(),
            (1 + chance.below(FLUSHES), moment, server),
        );
    }
    while !due.is_empty() {
        let disk = flushed_disk(vm)?;
        let Some((flushes, moment, server)) = due.get_mut(&disk) else {
            continue;
        };
        *flushes -= 1;
        if *flushes == 0 {
            thread::sleep(*moment);
            server.kill()?;
            due.remove(&disk);
        }
    }
    vm.wait_for("DISKS DONE", SOON)?;
    vm.signal(Signal::TERM)?;
    let exit = vm.wait(SOON)?;
    ensure!(exit.status.success(), "after SIGTERM: {}", exit.status);
    let ends = ends(vm, from)?;
    let mut kills = Kills::default();
    for ledger in ledgers {
        let lost = [
            format!("LOST {}", ledger.id),
            format!("{}: its server has ended: signal: 9", ledger.id),
        ];
        for lost in lost {
            let is_said = vm.lines().iter().any(|line| line.text.contains(&lost));
            ensure!(is_said, "nobody says {lost:?}");
        }
        let ended = of(&ends, &ledger.id)?;
        let before: u64 = ledger.plan.regions.iter().map(|region| region.begun).sum();
        kills.count += 1;
        kills.flushed += ended.iter().sum::<u64>() - before;
        kills.between += usize::from(ledger.verify(ended, KILLED)? > 0);
    }
    Ok(kills)
}

/// The disk that is flushed next.
fn flushed_disk(vm: &mut Process) -> Result<String> {
    let line = vm.wait_for("FLUSHED ", SOON)?;
    let disk = line.text.split_whitespace().nth(1);
    Ok(disk.with_context(|| line.text.clone())?.to_owned())
}

/// How far each region of each disk has come, as the guest says from a line on. It says so of all regions in order.
fn ends(vm: &Process, from: usize) -> Result<HashMap<String, Vec<u64>>> {
    let mut ends = HashMap::<_, Vec<_>>::new();
    for line in vm.lines().iter().skip(from) {
        let words: Vec<_> = line.text.split_whitespace().collect();
        if let ["ENDED", disk, region, flushed] = words[..] {
            let regions = ends.entry(disk.to_owned()).or_default();
            ensure!(regions.len() == region.parse::<usize>()?, "{}", line.text);
            regions.push(flushed.parse()?);
        }
    }
    Ok(ends)
}

fn of<'a>(ends: &'a HashMap<String, Vec<u64>>, id: &str) -> Result<&'a [u64]> {
    match ends.get(id) {
        Some(ended) if ended.len() == REGIONS => Ok(ended),
        ended => bail!("the guest says of {id}: {ended:?}"),
    }
}
