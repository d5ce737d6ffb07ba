//! What I/O costs, beside QEMU's own devices: exits, messages, system calls and wake-ups.

use std::fs::File;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use tests::lab::{BOOT, Case, Cost, Counts, Meter, Peer, Process, SOON, Server, Tap};

use crate::serial::connect;

/// The kinds of I/O, in the order in which the guest does them.
const KINDS: [&str; 7] = [
    "read-1", "write-1", "read-32", "write-32", "echo", "upload", "download",
];

/// Those of which there is one at a time. How many of the others are served at a time, and so what each costs, is left to
/// the lab's scheduler, and differs by a factor of two between runs.
const ONE_AT_A_TIME: [&str; 3] = ["read-1", "write-1", "echo"];

/// How much more ours may cost: between runs, the exits for an echo differ by a fifth, as timers happen to fall.
const MARGIN: f64 = 1.3;

/// The same guest with the same image and the same tap, in Outrigger and in QEMU.
pub(crate) fn beside_qemu(case: &mut Case<'_>) -> Result<()> {
    const CMDLINE: &str = "outrigger.checks=none outrigger.end=counted";
    const SIZE: u64 = 16 << 20;
    let peer = Peer::start()?;
    let tap = Tap::make("counted", 0, &[])?;
    let image = case.path("image");
    // Allocated, so that all writes are of the same kind.
    let mut file = File::create(&image)?;
    for _ in 0..SIZE >> 20 {
        file.write_all(&[1; 1 << 20])?;
    }

    let port = case.path("outrigger-serial");
    let mut command = case.linux("6.12", CMDLINE);
    command
        .arg("--serial")
        .arg(format!("socket={}", port.display()));
    command
        .arg("--disk")
        .arg(format!("path={}", image.display()));
    command.arg("--net").arg(format!("tap={}", tap.name()));
    let vm = case.start(&mut command)?;
    let ours = measure(vm, &port, &["disk0", "net0"])?;

    let port = case.path("qemu-serial");
    let mut command = Process::command(Path::new("qemu-system-x86_64"));
    command.args("-nodefaults -no-user-config -display none -no-reboot".split(' '));
    command.args("-machine q35,accel=kvm -cpu host -m 512M".split(' '));
    command.arg("-kernel").arg(case.images().kernel("6.12"));
    command.arg("-initrd").arg(case.images().initramfs("6.12"));
    command
        .arg("-append")
        .arg(format!("console=ttyS0 quiet panic=-1 {CMDLINE}"));
    command
        .arg("-serial")
        .arg(format!("unix:{},server=on,wait=on", port.display()));
    let drive = "if=none,id=disk,format=raw,cache=writeback,aio=io_uring";
    command.args(["-object", "iothread,id=io", "-drive"]);
    command.arg(format!("{drive},file={}", image.display()));
    command.args([
        "-device",
        "virtio-blk-pci,drive=disk,iothread=io,disable-legacy=on,num-queues=1",
    ]);
    command.args([
        "-netdev",
        &format!(
            "tap,id=net,ifname={},script=no,downscript=no,vhost=off",
            tap.name()
        ),
    ]);
    command.args([
        "-device",
        "virtio-net-pci,netdev=net,disable-legacy=on,romfile=",
    ]);
    let vm = case.start(&mut command)?;
    let theirs = measure(vm, &port, &[])?;
    peer.is_well()?;

    compare(&ours, &theirs)
}

/// What each kind of I/O costs, and of how much of it.
fn measure(mut vm: Process, port: &Path, servers: &[&str]) -> Result<Vec<(u64, Cost)>> {
    let mut serial: UnixStream = connect(port)?;
    vm.follow(serial.try_clone()?);
    let mut meter = None;
    let mut costs = Vec::new();
    for kind in KINDS {
        vm.wait_for(&format!("READY {kind}"), BOOT)?;
        let meter = match &mut meter {
            Some(meter) => meter,
            None => {
                let servers = servers.iter().map(|id| Server::of(&vm, id));
                let servers: Vec<_> = servers.collect::<Result<_>>()?;
                meter.insert(Meter::new(&vm, &servers)?)
            }
        };
        let before = meter.read()?;
        serial.write_all(b"go\n")?;
        let counted = format!("COUNTED {kind} ");
        let line = vm.wait_for(&counted, BOOT)?;
        let cost = meter.read()? - before;
        let count = line.text.strip_prefix(&counted).context("no number")?;
        costs.push((count.parse()?, cost));
    }
    // What the end costs is nobody's.
    vm.wait_for("READY end", SOON)?;
    serial.write_all(b"go\n")?;
    let exit = vm.wait(SOON)?;
    ensure!(exit.status.success(), "after power off: {}", exit.status);
    Ok(costs)
}

/// Prints what each costs. Ours take no message, and otherwise cost no more where that is not left to chance.
fn compare(ours: &[(u64, Cost)], theirs: &[(u64, Cost)]) -> Result<()> {
    let mut worse = Vec::new();
    println!("  of each      exits  system calls  wake-ups (QEMU's)");
    for (kind, (ours, theirs)) in KINDS.iter().zip(ours.iter().zip(theirs)) {
        let messages = ours.1.messages();
        if messages > 0 {
            worse.push(format!("{messages} messages for {kind}"));
        }
        let pairs = each(ours).into_iter().zip(each(theirs));
        let words = pairs
            .clone()
            .map(|(ours, theirs)| format!("{ours:5.2} ({theirs:5.2})"));
        println!("  {kind:10} {}", words.collect::<Vec<_>>().join("  "));
        for (who, (count, cost)) in [("ours", ours), ("QEMU's", theirs)] {
            let (calls, wakeups) = (list(&cost.calls, *count), list(&cost.wakeups, *count));
            println!("    {who}: {calls}; woken: {wakeups}");
        }
        let names = ["exits", "system calls", "wake-ups"];
        for (name, (ours, theirs)) in names.into_iter().zip(pairs) {
            if ONE_AT_A_TIME.contains(kind) && ours > theirs * MARGIN + 0.1 {
                worse.push(format!("{name} of {kind}: {ours:.2} and not {theirs:.2}"));
            }
        }
    }
    ensure!(worse.is_empty(), "{}", worse.join("; "));
    Ok(())
}

/// Exits, system calls and wake-ups for each request.
fn each((count, cost): &(u64, Cost)) -> [f64; 3] {
    let all = |counts: &Counts| counts.values().sum::<u64>();
    let numbers = [cost.exits, all(&cost.calls), all(&cost.wakeups)];
    numbers.map(|number| number as f64 / *count as f64)
}

/// What happened more than rarely, for each request.
fn list(counts: &Counts, requests: u64) -> String {
    let shares = counts
        .iter()
        .map(|(name, count)| (name, *count as f64 / requests as f64));
    let often = shares.filter(|(_, share)| *share >= 0.01);
    let words =
        often.map(|(name, share)| format!("{} {share:.2}", name.trim_start_matches("sys_")));
    words.collect::<Vec<_>>().join(", ")
}
