//! Snapshots of guests that have a lot to do.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use guest::ledger::Chance;
use rustix::process::Signal;
use serde_json::json;
use tests::lab::ledger::{Ledger, await_flushes, await_verified, verify_ended};
use tests::lab::{BOOT, Case, Mtty, Process, Report, SOON};

use crate::api::Api;
use crate::work::await_work;

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
    let api = Api::at(case.path("api"));
    let (mut server, socket) = case.server()?;
    let mut command = case.linux("6.12", "outrigger.checks=registers outrigger.end=load");
    command.args(["--cpus", "4", "--memory", "size=256M", "--disk"]);
    command.args(ledgers.iter().map(Ledger::argument));
    command.args(["--user-device", &at("demo", &socket)]);
    let mut vm = case.start(command.arg("--api-socket").arg(api.path()))?;
    Report::wait(&mut vm, BOOT)?.devices_are_well(1)?;
    await_verified(&mut vm, &ledgers)?;
    await_flushes(&mut vm, &ledgers)?;
    let worked = work(&mut vm)?;

    let url = format!("file://{}", case.path("snapshot").display());
    let paused = api.save(&url)?;
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

/// A guest that works on two of the host's mediated devices is saved and killed, and goes on in another process with two
/// others. One holds bytes that are nowhere else, and the other one interrupts the guest all the time.
pub(crate) fn of_host_devices(case: &mut Case<'_>) -> Result<()> {
    let [api, other_api] = ["api", "other"].map(|name| Api::at(case.path(name)));
    let url = format!("file://{}", case.path("snapshot").display());
    let counts = {
        let mttys = [mtty(5)?, mtty(6)?];
        let mut command = case.linux("host", "outrigger.checks=none outrigger.end=work");
        command.args(["--cpus", "2", "--memory", "size=256M", "--device"]);
        let numbered = (0..).zip(&mttys);
        command.args(
            numbered
                .map(|(number, mtty)| format!("id=mtty{number},path={}", mtty.path().display())),
        );
        let mut vm = case.start(command.arg("--api-socket").arg(api.path()))?;
        Report::wait(&mut vm, BOOT)?;
        let counts = await_work(&mut vm, [100, 10]).context("before")?;
        api.save(&url)?;
        vm.signal(Signal::KILL)?;
        vm.wait(SOON)?;
        counts
    };

    let mttys = [mtty(7)?, mtty(8)?];
    let mut vm = other_api.start(case, None)?;
    let numbered = (0..).zip(&mttys);
    let devices: Vec<_> = numbered
        .map(|(number, mtty)| json!({"id": format!("mtty{number}"), "path": mtty.path()}))
        .collect();
    let request = json!({"source_url": url, "resume": true, "devices": devices});
    other_api.put("vm.restore", &request)?;
    let counts = await_work(&mut vm, counts).context("restored")?;
    await_work(&mut vm, counts.map(|count| count + 10)).context("after")?;
    let dead = vm.lines().iter().find(|line| line.text.contains(" dead "));
    ensure!(dead.is_none(), "{dead:?}");
    vm.signal(Signal::POWER)?;
    other_api.end_after_power_off(&mut vm)
}

fn mtty(number: u8) -> Result<Mtty> {
    Mtty::create(&format!("83b8f4f2-509f-382f-3c1e-e6bfe0fa10{number:02}"))
}

fn at(id: &str, socket: &Path) -> String {
    format!("id={id},socket={}", socket.display())
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
