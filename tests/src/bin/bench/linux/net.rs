//! How fast a network card is with Linux's driver, over a tap to this machine, beside QEMU's, with and without the
//! kernel's help (vhost).

use std::net::{Ipv4Addr, TcpListener};
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::Context;
use guest::transfer::Transfer;
use tests::lab::Tap;

use super::Linux;
use super::jobs::{self, Job};
use crate::Bench;
use crate::measurement::{Better, Definition};
use crate::programs::QEMU;
use crate::turns::Turns;

const QEMU_WITH_VHOST: &str = "QEMU with vhost";

static JOBS: [Job; 3] = [
    Job {
        name: "round-trips",
        speed: Definition {
            key: "linux_net_round_trips_khz",
            what: "bytes that go from a Linux guest to the host and back by TCP, one after the other",
            unit: "thousand a second",
            better: Better::More,
            limit: None,
            aims: &[],
        },
        one: 1e3,
    },
    Job {
        name: "upload",
        speed: Definition {
            key: "linux_net_upload_mib_s",
            what: "a Linux guest's connection to the host by TCP",
            unit: "MiB/s",
            better: Better::More,
            limit: None,
            aims: &[],
        },
        one: MIB,
    },
    Job {
        name: "download",
        speed: Definition {
            key: "linux_net_download_mib_s",
            what: "the host's connection to a Linux guest by TCP",
            unit: "MiB/s",
            better: Better::More,
            limit: None,
            aims: &[],
        },
        one: MIB,
    },
];

const MIB: f64 = 1_048_576.0;

pub(super) fn measure(bench: &mut Bench, linux: &Linux) -> anyhow::Result<()> {
    // The guest knows the first card's network, and who is there.
    let tap = match Tap::make("outrigger-bench", 0, &[]) {
        Ok(tap) => tap,
        Err(error) => {
            let reason = format!("`linux_net_*`: it takes a tap, and none can be made: {error:#}");
            bench.report.skipped.push(reason);
            return Ok(());
        }
    };
    let each = Duration::from_millis(if bench.quick { 200 } else { 1000 });
    let port = answer()?;
    let parameters = format!(
        "{} outrigger.bench-port={port}",
        jobs::parameters(&JOBS, each)
    );
    let turn = |mut command: Command, is_qemu: bool| {
        linux.add(if is_qemu { QEMU } else { "" }, &mut command, &parameters);
        move || jobs::run(&mut command, &JOBS)
    };
    let guest = linux.guest();
    let mut command = bench.programs.outrigger(&guest);
    command.args(["--net", &format!("tap={}", tap.name())]);
    let mut turns = Turns::new(turn(command, false));
    for (name, vhost) in [(QEMU, "off"), (QEMU_WITH_VHOST, "on")] {
        if vhost == "on" && !Path::new("/dev/vhost-net").exists() {
            continue;
        }
        if let Some(mut command) = bench.programs.qemu(&guest) {
            let tap = tap.name();
            command.args([
                "-netdev",
                &format!("tap,id=net,ifname={tap},script=no,downscript=no,vhost={vhost}"),
                "-device",
                "virtio-net-pci,netdev=net,disable-legacy=on,romfile=",
            ]);
            turns.peer(name, turn(command, true));
        }
    }
    let results = turns.take(bench.rounds(11))?;
    for (index, job) in JOBS.iter().enumerate() {
        bench.add(results.measurement(&job.speed, |run| run[index].speed));
    }
    bench.failed("linux_net_*", results.failures);
    Ok(())
}

/// Answers guests, as long as this process runs, on the port that is returned, and at the tap's address alone.
fn answer() -> anyhow::Result<u16> {
    let listener = TcpListener::bind((Ipv4Addr::new(198, 18, 0, 1), 0));
    let listener = listener.context("cannot listen at the tap's address")?;
    let port = listener.local_addr()?.port();
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            // The guest says what goes wrong.
            thread::spawn(move || Transfer::serve(stream));
        }
    });
    Ok(port)
}
