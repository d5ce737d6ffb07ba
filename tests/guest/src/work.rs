//! Work on all devices at once, for a test that does something to them meanwhile.
//!
//! Device `N` of all [`kinds`] has a thread, on CPU `N` modulo the number of CPUs, that uses it again and again: it
//! writes and reads a register, reads from a disk, or has a serial port hold or echo bytes. It prints `STATE N alive`, or `STATE N dead VVVVDDDD` with what its
//! ids read as, whenever that changes. Every second `WORK N COUNT LONGEST` says how often the device was found alive so
//! far, and how many milliseconds its longest access in that second took. It ends when the power button is pressed.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use guest::{DEVICE, SCRATCH, VENDOR};
use rustix::thread::{CpuSet, sched_setaffinity};

use crate::checks::at;
use crate::interrupts;
use crate::mapping::Mapping;
use crate::passthrough::{E1000E, EDU, MTTY, NVME, edu, nvme, uart};
use crate::pci::{Device, regs};

/// The devices, by their ids, and how each is used. There is one disk at most.
fn kinds() -> [((u16, u16), Use); 5] {
    /// In the table of multicast addresses.
    const E1000E_MULTICAST: usize = 0x5200;
    [
        ((VENDOR, DEVICE), Use::Register(at(SCRATCH), |value| value)),
        (EDU, Use::Register(edu::INVERTED, |value| !value)),
        (E1000E, Use::Register(E1000E_MULTICAST, |value| value)),
        (NVME, Use::Disk),
        (MTTY, Use::Port),
    ]
}

/// How a device is used.
#[derive(Debug, Clone, Copy)]
enum Use {
    /// By a register in BAR 0: its offset, and what it reads as after a value was written.
    Register(usize, fn(u32) -> u32),
    Disk,
    /// The first serial port by its [buffer](uart::Buffer), and the others by Linux's driver.
    Port,
}

/// Works on all devices until the power button is pressed.
pub(crate) fn until_button() -> Result<()> {
    let mut workers = Vec::new();
    for (ids, how) in kinds() {
        let devices = Device::with_ids(ids)?.into_iter().enumerate();
        workers.extend(devices.map(|(place, device)| Worker::new(device, how, place)));
    }
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
pub(crate) fn button() -> Result<mpsc::Receiver<()>> {
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
struct Worker {
    device: Device,
    how: Use,
    /// Among those of its kind.
    place: usize,
    count: AtomicU64,
    longest: AtomicU64,
    is_over: AtomicBool,
}

/// What is used of a device.
enum Tool {
    Register(Mapping, usize, fn(u32) -> u32),
    Disk(File, Box<Block>),
    Buffer(uart::Buffer),
    Port(uart::Port),
}

/// What is read from a disk at a time, aligned as that needs it.
#[repr(align(4096))]
struct Block([u8; 4096]);

impl Worker {
    fn new(device: Device, how: Use, place: usize) -> Self {
        Self {
            device,
            how,
            place,
            count: AtomicU64::new(0),
            longest: AtomicU64::new(0),
            is_over: AtomicBool::new(false),
        }
    }

    fn work(&self, number: usize, cpu: usize) -> Result<()> {
        let mut cpus = CpuSet::new();
        cpus.set(cpu);
        sched_setaffinity(None, &cpus)?;
        let mut tool = self.tool()?;
        let mut last = None;
        // Neither a value nor its inverse is what a device reads as that is not there.
        for value in (1..u32::MAX).cycle() {
            if self.is_over.load(Ordering::Relaxed) {
                break;
            }
            let is_alive = self.is_alive(&mut tool, value);
            self.count.fetch_add(is_alive.into(), Ordering::Relaxed);
            // A device that its host resets may be found dead before the VMM has heard of that.
            let ids = match is_alive {
                true => None,
                false => Some(self.device.config32(0)?),
            };
            if last.replace(ids) != Some(ids) {
                match ids {
                    None => println!("STATE {number} alive"),
                    Some(ids) => println!("STATE {number} dead {ids:08x}"),
                }
            }
        }
        Ok(())
    }

    fn tool(&self) -> Result<Tool> {
        match self.how {
            Use::Register(offset, answer) => {
                // A driver does not share the memory.
                if self.device.is_bound() {
                    self.device.unbind()?;
                }
                self.device.command(regs::COMMAND_MEMORY, 0)?;
                Ok(Tool::Register(self.device.map(0)?, offset, answer))
            }
            Use::Disk => Ok(Tool::Disk(nvme::open()?, Box::new(Block([0; 4096])))),
            Use::Port if self.place == 0 => Ok(Tool::Buffer(uart::Buffer::fill(&self.device)?)),
            Use::Port => Ok(Tool::Port(uart::Port::open(&self.device)?)),
        }
    }

    fn is_alive(&self, tool: &mut Tool, value: u32) -> bool {
        match tool {
            Tool::Register(registers, offset, answer) => {
                self.timed(|| registers.write(*offset, value));
                self.timed(|| registers.read::<u32>(*offset)) == answer(value)
            }
            Tool::Disk(disk, block) => {
                let place = u64::from(value % 1024) * 4096;
                self.timed(|| disk.read_exact_at(&mut block.0, place))
                    .is_ok()
            }
            Tool::Buffer(buffer) => self.timed(|| buffer.turn()).is_ok(),
            Tool::Port(port) => self.timed(|| port.echo(value.to_le_bytes()[0])).is_ok(),
        }
    }

    fn timed<T>(&self, access: impl FnOnce() -> T) -> T {
        let start = Instant::now();
        let result = access();
        let took = u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.longest.fetch_max(took, Ordering::Relaxed);
        result
    }
}
