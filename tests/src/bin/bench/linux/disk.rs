//! How fast a disk is with Linux's driver, and what it costs, beside QEMU's with a thread of its own. The guest passes its
//! own page cache by; the host's is in use or not.

use std::process::Command;
use std::time::Duration;

use super::Linux;
use super::jobs::{self, Job};
use crate::Bench;
use crate::disk::{self as image, FASTER};
use crate::measurement::{Aim, Better, Definition};
use crate::programs::QEMU;
use crate::turns::Turns;

static JOBS: [Job; 6] = [
    short(
        "randread-4096-1",
        "linux_disk_read_4k_1_kiops",
        &[],
        "4 KiB random reads of a Linux guest, 1 at a time",
    ),
    short(
        "randread-4096-32",
        "linux_disk_read_4k_32_kiops",
        FASTER,
        "4 KiB random reads of a Linux guest, 32 at a time",
    ),
    short(
        "randwrite-4096-1",
        "linux_disk_write_4k_1_kiops",
        &[],
        "4 KiB random writes of a Linux guest, 1 at a time",
    ),
    short(
        "randwrite-4096-32",
        "linux_disk_write_4k_32_kiops",
        FASTER,
        "4 KiB random writes of a Linux guest, 32 at a time",
    ),
    long(
        "read-1048576-1",
        "linux_disk_read_1m_mib_s",
        "1 MiB sequential reads of a Linux guest",
    ),
    long(
        "write-1048576-1",
        "linux_disk_write_1m_mib_s",
        "1 MiB sequential writes of a Linux guest",
    ),
];

const CPU: Definition = Definition {
    key: "linux_disk_cpu_us",
    what: "CPU time for each of a Linux guest's requests, the guest's own included, of all processes together",
    unit: "us",
    better: Better::Less,
    limit: None,
    aims: &[],
};

const fn short(
    name: &'static str,
    key: &'static str,
    aims: &'static [Aim],
    what: &'static str,
) -> Job {
    Job {
        name,
        speed: Definition {
            key,
            what,
            unit: "thousand requests a second",
            better: Better::More,
            limit: None,
            aims,
        },
        one: 1e3,
    }
}

const fn long(name: &'static str, key: &'static str, what: &'static str) -> Job {
    Job {
        name,
        speed: Definition {
            key,
            what,
            unit: "MiB/s",
            better: Better::More,
            limit: None,
            aims: &[],
        },
        one: 1.0,
    }
}

pub(super) fn measure(bench: &mut Bench, linux: &Linux) -> anyhow::Result<()> {
    let image = image::image()?;
    let mut costs = Vec::new();
    for direct in [false, true] {
        // What depends on the storage takes its time.
        if direct && bench.quick {
            continue;
        }
        let each = Duration::from_millis(if bench.quick { 200 } else { 500 });
        let parameters = jobs::parameters(&JOBS, each);
        let turn = |name: &str, mut command: Command| {
            linux.add(name, &mut command, &parameters);
            image::add_disk(name, &mut command, image.path(), direct);
            let image = image.as_file();
            move || {
                // What was written before does not go to the storage meanwhile.
                image.sync_all()?;
                jobs::run(&mut command, &JOBS)
            }
        };
        let guest = linux.guest();
        let mut turns = Turns::new(turn("", bench.programs.outrigger(&guest)));
        if let Some(command) = bench.programs.qemu(&guest) {
            turns.peer(QEMU, turn(QEMU, command));
        }
        let results = turns.take(bench.rounds(11))?;
        let case = if direct { "direct" } else { "page cache" };
        for (index, job) in JOBS.iter().enumerate() {
            let speed = results.measurement(&job.speed, |run| run[index].speed);
            bench.add(speed.in_case(case));
            let cost = results.measurement(&CPU, |run| run[index].cpu);
            costs.push(cost.in_case(&format!("{}, {case}", job.speed.what)));
        }
        bench.failed("linux_disk_*", results.failures);
    }
    costs.into_iter().for_each(|cost| bench.add(cost));
    Ok(())
}
