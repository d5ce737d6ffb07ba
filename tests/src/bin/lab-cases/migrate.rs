//! Guests that move between hosts while they work.

use std::fs::File;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use guest::ledger::Chance;
use rustix::process::Signal;
use tests::lab::ledger::{Ledger, await_flushes, await_verified, verify_ended};
use tests::lab::{BOOT, Case, Host, Lan, Mtty, Process, Report, SOON, Server, run};

use crate::api::Api;
use crate::ping::Ping;
use crate::work::{Work, await_work};

/// Where the guest answers.
const ADDRESS: &str = "198.18.0.2";

/// How long a migration may take.
const MOVE: Duration = Duration::from_secs(120);

/// A guest with disks, a network card and a demo device, all of them busy, goes to another host, back, and to another
/// process there. Nothing of its work is lost, and somebody else on the network has to do without it for hardly longer than
/// it stands still.
pub(crate) fn there_and_back(case: &mut Case<'_>) -> Result<()> {
    let lan = Lan::make()?;
    let [east, west] = &lan.hosts;
    let mut chance = Chance::new(case.seed());
    let path = case.path("ledger");
    let mut ledgers = [Ledger::new(
        "ledger".into(),
        path,
        6 << 20,
        chance.next(),
        "",
    )?];
    let files = case.path("files");
    make_file_system(&files)?;

    let (mut server, socket) = case.server()?;
    let mut command = case.linux("host", "outrigger.checks=card-facts outrigger.end=load");
    command.args(["--cpus", "2", "--memory", "size=256M"]);
    command.args([
        "--user-device",
        &format!("id=demo,socket={}", socket.display()),
    ]);
    command.args(["--net", &format!("id=card,tap={}", east.tap())]);
    command.arg("--disk").arg(ledgers[0].argument());
    command.arg(format!("id=files,serial=files,path={}", files.display()));
    let mut running = Running::start(case, command, Some(east))?;
    Report::wait(&mut running.vmm, BOOT)?.passed(1, &["card-facts"])?;
    await_verified(&mut running.vmm, &ledgers)?;
    for (turn, host, is_quiet) in [(1, west, false), (2, east, true)] {
        await_flushes(&mut running.vmm, &ledgers)?;
        // Behind all else that a slow machine has to do.
        for line in ["FILES ", "MEMORY "] {
            running.vmm.wait_for(line, BOOT)?;
        }
        let [work] = await_work(&mut running.vmm, [1])?;

        // Who answers from its new place makes that known, too. So, once, nobody asks before it has moved.
        let ping = Ping::start(case, ADDRESS)?;
        let ping = (!is_quiet).then_some(ping);
        let next = Running::waiting(case, turn, Some(host))?;
        let (new_server, socket) = case.server()?;
        let moving = Instant::now();
        let devices = [
            format!("id=demo,socket={}", socket.display()),
            format!("id=card,path={}", host.tap()),
        ];
        let url = format!("tcp:{}:4400", host.address());
        let (next, downtime) = running.go(case, next, &url, &devices, &["--insecure"])?;
        running = next;
        // Nobody else uses it any more.
        server.signal(Signal::KILL)?;
        server = new_server;

        let (lost, standstill) = match ping {
            Some(mut ping) => (ping.lost_since(moving)?, downtime),
            None => (Ping::start(case, ADDRESS)?.lost(), Duration::ZERO),
        };
        println!("  what was asked for {lost:?} is never answered");
        ensure!(
            lost < standstill + Duration::from_secs(1),
            "the network does not know where it is"
        );
        let [now] = Work::next(&mut running.vmm)?;
        ensure!(now.count >= work, "it has forgotten its work");
        await_work(&mut running.vmm, [now.count + 1]).context("demo device")?;
    }

    let mut running = hand_over(case, running, east)?;
    await_flushes(&mut running.vmm, &ledgers)?;
    running.vmm.signal(Signal::POWER)?;
    verify_ended(&mut running.vmm, 0, &mut ledgers)?;
    running.api.end_after_power_off(&mut running.vmm)?;
    for done in ["MEMORY DONE", "FILES DONE"] {
        let is_said = running.vmm.lines().iter().any(|line| line.text == done);
        ensure!(is_said, "no {done:?}");
    }
    is_well(&running.vmm)?;
    check_file_system(&files)
}

/// The VM goes to another process of its host, which has the same servers.
fn hand_over(case: &Case<'_>, mut running: Running, host: &Host) -> Result<Running> {
    let servers = ["ledger", "files", "card"].map(|id| Server::of(&running.vmm, id));
    let servers = servers.into_iter().collect::<Result<Vec<_>>>()?;
    let [work] = await_work(&mut running.vmm, [1])?;
    let mut ping = Ping::start(case, ADDRESS)?;
    let next = Running::waiting(case, 3, Some(host))?;
    let url = format!("unix:{}", case.path("hand-over").display());
    let moving = Instant::now();
    let (mut running, _) = running.go(case, next, &url, &[], &["--local"])?;
    let lost = ping.lost_since(moving)?;
    println!("  what was asked for {lost:?} is never answered");
    ensure!(lost < Duration::from_secs(1), "it was away for {lost:?}");
    await_work(&mut running.vmm, [work + 1]).context("demo device")?;
    let ended = servers.iter().find(|server| !server.is_running());
    ensure!(ended.is_none(), "a server has ended");
    Ok(running)
}

/// A guest that works on two of the host's mediated devices, which keep no log of what they write to memory, goes to two
/// others only if that is allowed, and back.
pub(crate) fn host_devices(case: &mut Case<'_>) -> Result<()> {
    const URL: &str = "tcp:127.0.0.1:4400";
    let mttys = ["10", "11", "12", "13"];
    let mttys =
        mttys.map(|last| Mtty::create(&format!("83b8f4f2-509f-382f-3c1e-e6bfe0fa10{last}")));
    let mttys = mttys.into_iter().collect::<Result<Vec<_>>>()?;
    let devices = |host: usize| {
        let mttys = mttys.iter().skip(2 * host).take(2).enumerate();
        let device =
            |(number, mtty): (_, &Mtty)| format!("id=mtty{number},path={}", mtty.path().display());
        mttys.map(device).collect::<Vec<_>>()
    };
    let mut command = case.linux("host", "outrigger.checks=none outrigger.end=work");
    command.args(["--cpus", "2", "--memory", "size=256M", "--device"]);
    command.args(devices(0));
    let mut running = Running::start(case, command, None)?;
    Report::wait(&mut running.vmm, BOOT)?;
    await_work(&mut running.vmm, [100, 10]).context("before")?;

    is_refused(case, &running, URL, &devices(1))?;
    for (turn, host) in [(1, 1), (2, 0)] {
        let work = await_work(&mut running.vmm, [1, 1])?;
        let next = Running::waiting(case, turn, None)?;
        let flags = ["--unlogged-dma"];
        (running, _) = running.go(case, next, URL, &devices(host), &flags)?;
        let work = await_work(&mut running.vmm, work).context("it has forgotten its work")?;
        await_work(&mut running.vmm, work.map(|count| count + 10)).context("after")?;
    }
    running.vmm.signal(Signal::POWER)?;
    running.api.end_after_power_off(&mut running.vmm)?;
    is_well(&running.vmm)
}

/// Whether the VM stays if nobody allows its devices to go along.
fn is_refused(case: &Case<'_>, running: &Running, url: &str, devices: &[String]) -> Result<()> {
    let mut next = Running::waiting(case, 0, None)?;
    let mut receiving = next.receive(case, url, devices, &[])?;
    let mut migrate = remote(case, &running.api, &["migrate", url, "--downtime-ms", "10"]);
    let mut sending = case.start(&mut migrate)?;
    for end in [&mut sending, &mut receiving] {
        let exit = end.wait(MOVE)?;
        ensure!(exit.status.code() == Some(1), "refused: {}", exit.status);
    }
    let said = sending.lines().iter().map(|line| line.text.as_str());
    let said = said.collect::<Vec<_>>().join("\n");
    for part in ["mtty0, mtty1", "unlogged_dma"] {
        ensure!(said.contains(part), "no {part:?} in: {said}");
    }
    next.api.end(&mut next.vmm)
}

/// A VMM, which runs a VM or is about to.
struct Running {
    vmm: Process,
    api: Api,
}

impl Running {
    /// Starts a VM, here or on another host.
    fn start(case: &Case<'_>, mut command: Command, host: Option<&Host>) -> Result<Self> {
        let api = Api::at(case.path("first"));
        command
            .args(["--no-shutdown", "--api-socket"])
            .arg(api.path());
        if let Some(host) = host {
            command = host.command(&command);
        }
        let vmm = case.start(&mut command)?;
        Ok(Self { vmm, api })
    }

    /// Starts a VMM that a VM can come to.
    fn waiting(case: &Case<'_>, turn: usize, host: Option<&Host>) -> Result<Self> {
        let api = Api::at(case.path(&format!("next-{turn}")));
        let vmm = api.start(case, host)?;
        Ok(Self { vmm, api })
    }

    /// Has the VM go there, where these devices are in other places. Returns where it runs, and how long it stood still.
    fn go(
        mut self,
        case: &Case<'_>,
        next: Self,
        url: &str,
        devices: &[String],
        flags: &[&str],
    ) -> Result<(Self, Duration)> {
        let mut receiving = next.receive(case, url, devices, flags)?;
        let mut migrate = remote(case, &self.api, &["migrate", url]);
        let mut sending = case.start(migrate.args(flags))?;
        for end in [&mut sending, &mut receiving] {
            let exit = end.wait(MOVE)?;
            ensure!(exit.status.success(), "not moved: {}", exit.status);
        }
        let progress = self.api.get("vm.migration")?;
        let downtime = progress["downtime_us"].as_u64();
        let downtime = Duration::from_micros(downtime.context("no downtime")?);
        println!(
            "  moved in {} ms and {} rounds, {} bytes; stood still for {downtime:?}: {}",
            progress["elapsed_ms"],
            progress["rounds"],
            progress["copied_bytes"],
            progress["downtime_parts_us"],
        );
        if flags.contains(&"--local") {
            self.api.end_without_servers(&mut self.vmm)?;
        } else {
            self.api.end(&mut self.vmm)?;
        }
        is_well(&self.vmm)?;
        Ok((next, downtime))
    }

    /// Has it wait for a VM, and returns when one can come.
    fn receive(
        &self,
        case: &Case<'_>,
        url: &str,
        devices: &[String],
        flags: &[&str],
    ) -> Result<Process> {
        let mut receive = remote(case, &self.api, &["receive", url]);
        receive.args(flags.iter().filter(|flag| **flag == "--insecure"));
        for device in devices {
            receive.args(["--device", device]);
        }
        let mut receiving = case.start(&mut receive)?;
        let deadline = Instant::now() + SOON;
        let is_listening = || {
            let progress = self.api.get("vm.migration");
            progress.is_ok_and(|progress| progress["phase"] == "Listening")
        };
        while !is_listening() {
            let ended = receiving.wait(Duration::ZERO);
            ensure!(ended.is_err(), "it does not wait for the VM: {ended:?}");
            ensure!(Instant::now() < deadline, "nobody listens");
        }
        Ok(receiving)
    }
}

/// `outrigger remote`.
fn remote(case: &Case<'_>, api: &Api, words: &[&str]) -> Command {
    let mut command = case.outrigger();
    command.args(["remote", "--api-socket"]).arg(api.path());
    command.args(words);
    command
}

/// Whether a guest has found nothing wrong.
fn is_well(vmm: &Process) -> Result<()> {
    for bad in [
        "BACKWARDS",
        " dead ",
        "LOST",
        "FAILED",
        "rcu",
        "soft lockup",
        "WARNING",
    ] {
        let line = vmm.lines().iter().find(|line| line.text.contains(bad));
        ensure!(line.is_none(), "{line:?}");
    }
    Ok(())
}

/// Makes a disk with a file system.
fn make_file_system(disk: &Path) -> Result<()> {
    File::create(disk)?.set_len(16 << 20)?;
    run("mkfs.ext4", &["-q", &disk.to_string_lossy()])
}

/// Whether the file system on a disk is in order, and needs no recovery.
fn check_file_system(disk: &Path) -> Result<()> {
    let output = Command::new("e2fsck").arg("-fn").arg(disk).output()?;
    let said = String::from_utf8_lossy(&output.stdout);
    let is_clean = output.status.success() && !said.contains("recover");
    ensure!(is_clean, "e2fsck: {}: {said}", output.status);
    Ok(())
}
