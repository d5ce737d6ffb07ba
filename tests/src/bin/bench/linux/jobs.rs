//! Jobs that the guest does one after the other in one boot, each for some time.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, ensure};

use super::PATIENCE;
use crate::measurement::Definition;
use crate::program::Running;

/// What the guest does, and what its speed is called.
pub(super) struct Job {
    /// As the guest program knows it.
    pub(super) name: &'static str,
    pub(super) speed: Definition,
    /// How many requests, round trips or bytes in a second are one of the unit.
    pub(super) one: f64,
}

/// What a job has shown.
#[derive(Clone, Copy, Debug)]
pub(super) struct Figures {
    /// In the unit of the job.
    pub(super) speed: f64,
    /// CPU time of all processes for each request, in microseconds.
    pub(super) cpu: f64,
}

/// What to tell the guest on its kernel's command line to do these.
pub(super) fn parameters(jobs: &[Job], each: Duration) -> String {
    let names: Vec<_> = jobs.iter().map(|job| job.name).collect();
    format!(
        "outrigger.checks=none outrigger.end=bench outrigger.bench={} outrigger.bench-ms={}",
        names.join(","),
        each.as_millis()
    )
}

/// Has a guest do them, and measures each.
pub(super) fn run(command: &mut Command, jobs: &[Job]) -> anyhow::Result<Vec<Figures>> {
    let mut program = Running::start(command)?;
    let mut figures = Vec::new();
    for job in jobs {
        let (begin, _) = program.wait_for_line(&format!("BEGIN {}", job.name), PATIENCE)?;
        let cpu_before = program.cpu_time()?;
        let (end, count) = program.wait_for_line(&format!("END {} ", job.name), PATIENCE)?;
        let cpu_after = program.cpu_time()?;
        let count: f64 = count.parse().context("a strange count")?;
        ensure!(count > 0.0, "nothing was done of {}", job.name);
        figures.push(Figures {
            speed: count / (end - begin).as_secs_f64() / job.one,
            cpu: (cpu_after - cpu_before).as_secs_f64() * 1e6 / count,
        });
    }
    Ok(figures)
}
