//! Snapshots of guests that have a lot to do.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use guest::ledger::Chance;
use rustix::process::Signal;
use serde_json::json;
use tests::api::{self, Answer};
use tests::lab::ledger::{Ledger, await_flushes, await_verified, verify_ended};
use tests::lab::{BOOT, Case, Process, Report, SOON};

/// Bytes in the image of a disk.
const SIZE: u64 = 6 << 20;

/// A guest with four vCPUs, two disks and a demo device, all of them busy, is saved, and killed with its servers. Another
/// process goes on with it, and nothing of its work is lost.
pub(crate) fn under_load(case: &mut Case<'_>) -> Result<()> {
    let mut chance = Chance::new(case.seed());
    let mut ledgers = Vec::new();
    for more in ["", ",num_queues=4,direct=on"] {
        let id = format!("ledger-{}", ledgers.len());
        let path = case.path(&id);
        ledgers.push(Ledger::new(id, path, SIZE, chance.next(), more)?);
    }
    let [api, snapshot] = ["api", "snapshot"].map(|name| case.path(name));
    let (mut server, socket) = case.server()?;
    let mut command = case.linux("6.12", "outrigger.checks=registers outrigger.end=load");
    command.args(["--cpus", "4", "--memory", "size=256M", "--disk"]);
    command.args(ledgers.iter().map(Ledger::argument));
    command.args(["--user-device", &at("demo", &socket)]);
    let mut vm = case.start(command.arg("--api-socket").arg(&api))?;
    Report::wait(&mut vm, BOOT)?.devices_are_well(1)?;
    await_verified(&mut vm, &ledgers)?;
    await_flushes(&mut vm, &ledgers)?;
    let worked = work(&mut vm)?;

    put(&api, "vm.pause", "")?;
    let deadline = Instant::now() + SOON;
    while api::request(&api, "GET", "vm.info", "")?.body["state"] != "Paused" {
        ensure!(Instant::now() < deadline, "it does not stand still");
    }
    let paused = Instant::now();
    let url = format!("file://{}", snapshot.display());
    put(
        &api,
        "vm.snapshot",
        &json!({"destination_url": url}).to_string(),
    )?;
    println!("  saved in {:?}", paused.elapsed());
    for process in [&mut vm, &mut server] {
        process.signal(Signal::KILL)?;
        process.wait(SOON)?;
    }
    let before = Clock::last(&vm)?;

    let (_server, socket) = case.server()?;
    let restoring = Instant::now();
    let mut command = case.outrigger();
    command.args(["--restore", &format!("source_url={url},resume=on")]);
    let mut vm = case.start(command.args(["--user-device", &at("demo", &socket)]))?;
    let after = Clock::next(&mut vm)?;
    println!("  restored, and heard of, in {:?}", restoring.elapsed());
    after.goes_on(before, restoring - paused)?;
    await_flushes(&mut vm, &ledgers)?;
    ensure!(work(&mut vm)? > worked, "the demo device is not used");
    // Not only what was in its memory.
    Clock::next(&mut vm)?;
    vm.signal(Signal::POWER)?;
    verify_ended(&mut vm, 0, &mut ledgers)?;
    let exit = vm.wait(SOON)?;
    ensure!(exit.status.success(), "after power off: {}", exit.status);
    for bad in ["BACKWARDS", "dead", "LOST", "rcu", "soft lockup", "WARNING"] {
        let line = vm.lines().iter().find(|line| line.text.contains(bad));
        ensure!(line.is_none(), "{line:?}");
    }
    Ok(())
}

fn at(id: &str, socket: &Path) -> String {
    format!("id={id},socket={}", socket.display())
}

fn put(api: &Path, endpoint: &str, body: &str) -> Result<()> {
    let Answer { status, body } = api::request(api, "PUT", endpoint, body)?;
    ensure!(status == 204, "{endpoint}: {status}: {body}");
    Ok(())
}

/// How often the guest has used the demo device.
fn work(vm: &mut Process) -> Result<u64> {
    let line = vm.wait_for("WORK 0 ", SOON)?;
    let count = line.text.split_whitespace().nth(2);
    Ok(count.with_context(|| line.text.clone())?.parse()?)
}

/// What the guest's clocks show, in milliseconds, and when it said so.
#[derive(Clone, Copy, Debug)]
struct Clock {
    monotonic: i64,
    real: i64,
    at: Instant,
}

impl Clock {
    /// The last of what the guest has said.
    fn last(vm: &Process) -> Result<Self> {
        let mut lines = vm.lines().iter().rev();
        let clock = lines.find_map(|line| Self::parse(&line.text, line.at));
        clock.context("it has never told the time")
    }

    /// The next time that the guest tells.
    fn next(vm: &mut Process) -> Result<Self> {
        let line = vm.wait_for("CLOCK ", SOON)?;
        Self::parse(&line.text, line.at).with_context(|| line.text.clone())
    }

    fn parse(text: &str, at: Instant) -> Option<Self> {
        let mut times = text.strip_prefix("CLOCK ")?.split_whitespace();
        let mut time = || times.next()?.parse().ok();
        Some(Self {
            monotonic: time()?,
            real: time()?,
            at,
        })
    }

    /// Whether the clocks have gone on from where they were, as if they had not been `away`.
    fn goes_on(self, before: Self, away: Duration) -> Result<()> {
        /// What a line may take from the guest to the test.
        const SLACK: i64 = 500;
        let passed = self.monotonic - before.monotonic;
        let there = (self.at - before.at).saturating_sub(away);
        println!("  {passed} ms passed in the guest, {there:?} here, and {away:?} meanwhile");
        let most = i64::try_from(there.as_millis())? + SLACK;
        ensure!((0..=most).contains(&passed), "not {passed} ms");
        let drift = (self.real - before.real) - passed;
        ensure!(drift.abs() <= 1, "the clocks differ by {drift} ms more");
        Ok(())
    }
}
