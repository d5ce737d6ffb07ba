//! All that a machine can be busy with at once, for a test that takes its state out meanwhile.
//!
//! That is [`work`] and the [`disks`], [`memory`] and [`files`], and a look at the clocks: every second `CLOCK MONOTONIC REAL` says what they show,
//! in milliseconds; `CLOCK BACKWARDS` if the first, on whichever CPU it is read, has shown less than before. It ends when the
//! power button is pressed.

mod files;
mod memory;

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::thread::{CpuSet, sched_setaffinity};
use rustix::time::{ClockId, clock_gettime};

use crate::interrupts;
use crate::virtio::disks;
use crate::work;

/// Keeps the machine busy until the power button is pressed.
pub(crate) fn until_button() -> Result<()> {
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        let work = scope.spawn(work::until_button);
        let clocks = scope.spawn(|| watch_clocks(&is_over));
        let memory = scope.spawn(|| memory::keep_busy(&is_over));
        let files = scope.spawn(|| files::keep_busy(&is_over));
        let done = disks::until_button();
        is_over.store(true, Ordering::Relaxed);
        for thread in [work, clocks, memory, files] {
            thread.join().ok().context("a thread panicked")??;
        }
        done
    })
}

fn watch_clocks(is_over: &AtomicBool) -> Result<()> {
    const LOOKS_PER_SECOND: u64 = 100;
    let all_cpus = interrupts::cpus()?.len();
    let mut last = 0;
    for (look, cpu) in (0_u64..).zip((0..all_cpus).cycle()) {
        if is_over.load(Ordering::Relaxed) {
            break;
        }
        let mut cpus = CpuSet::new();
        cpus.set(cpu);
        sched_setaffinity(None, &cpus)?;
        let now = milliseconds(ClockId::Monotonic);
        if now < last {
            println!("CLOCK BACKWARDS from {last} to {now}");
        }
        last = now;
        if look % LOOKS_PER_SECOND == 0 {
            let (monotonic, real) = both_clocks();
            println!("CLOCK {monotonic} {real}");
        }
        thread::sleep(Duration::from_millis(1000 / LOOKS_PER_SECOND));
    }
    Ok(())
}

/// What both clocks show at the same time, the monotonic one first: it shows the same before and after the other is read,
/// whatever else the CPU does in between.
fn both_clocks() -> (i64, i64) {
    loop {
        let monotonic = milliseconds(ClockId::Monotonic);
        let real = milliseconds(ClockId::Realtime);
        if milliseconds(ClockId::Monotonic) == monotonic {
            return (monotonic, real);
        }
    }
}

fn milliseconds(clock: ClockId) -> i64 {
    let time = clock_gettime(clock);
    time.tv_sec * 1000 + time.tv_nsec / 1_000_000
}
