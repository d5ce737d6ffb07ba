//! Work on all devices at once, for a test that does something to them meanwhile.
//!
//! Each device has a thread, on CPU `N` modulo the number of CPUs, that writes and reads a register again and again. It
//! prints `STATE N alive`, or `STATE N dead VVVVDDDD` with what its ids read as, whenever that changes. Every second
//! `WORK N COUNT LONGEST` says how often the device was found alive so far, and how many milliseconds its longest access
//! in that second took. It ends when the power button is pressed.

use std::fs::File;
use std::io::Read;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use guest::SCRATCH;
use rustix::thread::{CpuSet, sched_setaffinity};

use crate::checks::at;
use crate::interrupts;
use crate::pci::{Device, regs};

/// Works on all test devices until the power button is pressed.
pub(crate) fn until_button() -> Result<()> {
    let devices = Device::all()?;
    let workers: Vec<_> = devices.iter().map(Worker::new).collect();
    let cpus = interrupts::cpus()?.len();
    let button = button()?;
    thread::scope(|scope| {
        let numbered = || workers.iter().enumerate();
        let threads: Vec<_> = numbered()
            .map(|(number, worker)| scope.spawn(move || worker.work(number, number % cpus)))
            .collect();
        while button.recv_timeout(Duration::from_secs(1)) == Err(RecvTimeoutError::Timeout) {
            for (number, worker) in numbered() {
                let count = worker.count.load(Ordering::Relaxed);
                let longest = worker.longest.swap(0, Ordering::Relaxed);
                println!("WORK {number} {count} {longest}");
            }
        }
        workers
            .iter()
            .for_each(|worker| worker.is_over.store(true, Ordering::Relaxed));
        threads
            .into_iter()
            .try_for_each(|thread| thread.join().ok().context("a worker panicked")?)
    })
}

/// Says when the power button is pressed, which is the first input device.
fn button() -> Result<mpsc::Receiver<()>> {
    let mut input = File::open("/dev/input/event0")?;
    let (sender, pressed) = mpsc::channel();
    thread::spawn(move || {
        // An event has 24 bytes. That the sender is dropped is the message, whatever ended the read.
        let _ = input.read(&mut [0; 24]);
        drop(sender);
    });
    Ok(pressed)
}

#[derive(Debug)]
struct Worker<'a> {
    device: &'a Device,
    count: AtomicU64,
    longest: AtomicU64,
    is_over: AtomicBool,
}

impl<'a> Worker<'a> {
    fn new(device: &'a Device) -> Self {
        Self {
            device,
            count: AtomicU64::new(0),
            longest: AtomicU64::new(0),
            is_over: AtomicBool::new(false),
        }
    }

    fn work(&self, number: usize, cpu: usize) -> Result<()> {
        let mut cpus = CpuSet::new();
        cpus.set(cpu);
        sched_setaffinity(None, &cpus)?;
        self.device.command(regs::COMMAND_MEMORY, 0)?;
        let registers = self.device.map(0)?;
        let scratch = at(SCRATCH);
        let mut was_alive = None;
        for value in (0..u32::MAX).cycle() {
            if self.is_over.load(Ordering::Relaxed) {
                break;
            }
            self.timed(|| registers.write(scratch, value));
            let is_alive = self.timed(|| registers.read::<u32>(scratch)) == value;
            self.count.fetch_add(is_alive.into(), Ordering::Relaxed);
            if was_alive.replace(is_alive) != Some(is_alive) {
                if is_alive {
                    println!("STATE {number} alive");
                } else {
                    println!("STATE {number} dead {:08x}", self.device.config32(0)?);
                }
            }
        }
        Ok(())
    }

    fn timed<T>(&self, access: impl FnOnce() -> T) -> T {
        let start = Instant::now();
        let result = access();
        let took = u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.longest.fetch_max(took, Ordering::Relaxed);
        result
    }
}
