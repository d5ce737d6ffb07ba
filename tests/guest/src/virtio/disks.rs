//! Work on all disks that have a [`Plan`], for a test that ends their servers meanwhile.
//!
//! Each disk is verified first: `CHECKED DISK ok`, or `CHECKED DISK FAILED why`; its serial number is what it is called. Then each
//! of its regions is written, in one way or another, and `FLUSHED DISK REGION GENERATION` says what survives whatever
//! comes. `LOST DISK` says that the disk is not there any more.
//!
//! It goes on until the power button is pressed, or all disks are lost. `ENDED DISK REGION GENERATION` says how far each
//! region has come, and `DISKS DONE` is the last line. The plan of a disk that is not lost says the same.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::RecvTimeoutError;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use guest::ledger::{PLAN, Plan, Run, SECTOR};
use rustix::fs::{FallocateFlags, fallocate, fdatasync, fsync};

use super::DISK;
use super::block::{Aligned, Block};
use crate::pci::Device;
use crate::work::button;

/// Works on all disks until the power button is pressed. Does not return when they are lost.
pub(crate) fn until_button() -> Result<()> {
    let button = button()?;
    let mut disks = Vec::new();
    for device in Device::with_ids(DISK)? {
        if let Some(disk) = Disk::open(device)? {
            disks.push(disk);
        }
    }
    for disk in &mut disks {
        disk.start()?;
    }
    while button.recv_timeout(Duration::from_millis(50)) == Err(RecvTimeoutError::Timeout) {
        for disk in &mut disks {
            disk.look()?;
        }
        if disks.iter().all(|disk| disk.is_lost) {
            break;
        }
    }
    for disk in &mut disks {
        disk.end()?;
    }
    println!("DISKS DONE");
    // Until it is out.
    rustix::termios::tcdrain(io::stdout())?;
    // The threads of a lost disk wait for it for ever, and so would whoever waits for this process.
    while disks.iter().any(|disk| disk.is_lost) {
        thread::park();
    }
    Ok(())
}

/// A disk that is worked on.
struct Disk {
    device: Device,
    block: Block,
    name: String,
    plan: Plan,
    is_over: Arc<AtomicBool>,
    regions: Vec<(Arc<AtomicU64>, JoinHandle<Result<()>>)>,
    is_lost: bool,
}

impl Disk {
    /// Opens and verifies a disk, if it has a plan.
    fn open(device: Device) -> Result<Option<Self>> {
        let block = Block::of(&device)?;
        let name = block.attribute("serial")?;
        let file = block.open(true)?;
        let mut page = Aligned::new(PLAN);
        file.read_exact_at(page.bytes_mut(), 0)?;
        let Some(plan) = Plan::parse(page.bytes()) else {
            return Ok(None);
        };
        let read = |data: &mut [u8], offset| {
            let mut memory = Aligned::new(data.len());
            file.read_exact_at(memory.bytes_mut(), offset)?;
            data.copy_from_slice(memory.bytes());
            Ok(())
        };
        match plan.verify(read) {
            Ok(_) => println!("CHECKED {name} ok"),
            Err(error) => println!("CHECKED {name} FAILED {error:#}"),
        }
        Ok(Some(Self {
            device,
            block,
            name,
            plan,
            is_over: Arc::new(AtomicBool::new(false)),
            regions: Vec::new(),
            is_lost: false,
        }))
    }

    fn start(&mut self) -> Result<()> {
        for (number, region) in self.plan.regions.iter().enumerate() {
            let way = Way::of(number);
            let file = self.block.open(way != Way::Cached)?;
            let flushed = Arc::new(AtomicU64::new(region.begun));
            let writer = Writer {
                disk: self.name.clone(),
                file,
                way,
                plan: self.plan.clone(),
                region: number,
                flushed: Arc::clone(&flushed),
                is_over: Arc::clone(&self.is_over),
            };
            self.regions
                .push((flushed, thread::spawn(move || writer.work())));
        }
        Ok(())
    }

    /// Sees whether the disk is still there.
    fn look(&mut self) -> Result<()> {
        let is_lost = self.is_lost || self.device.config32(0)? == u32::MAX;
        if is_lost && !self.is_lost {
            println!("LOST {}", self.name);
        }
        self.is_lost = is_lost;
        Ok(())
    }

    /// Ends the work, and writes down how far it has come.
    fn end(&mut self) -> Result<()> {
        if self.is_lost {
            for (number, (flushed, _)) in self.regions.iter().enumerate() {
                let flushed = flushed.load(Ordering::SeqCst);
                println!("ENDED {} {number} {flushed}", self.name);
            }
            return Ok(());
        }
        self.is_over.store(true, Ordering::Relaxed);
        let flushed = self.regions.drain(..).map(|(flushed, thread)| {
            let result = thread.join().ok().context("a writer panicked")?;
            result.map(|()| flushed.load(Ordering::SeqCst))
        });
        let flushed: Vec<_> = flushed.collect::<Result<_>>()?;
        for (number, (region, flushed)) in self.plan.regions.iter_mut().zip(flushed).enumerate() {
            region.begun = flushed;
            println!("ENDED {} {number} {flushed}", self.name);
        }
        let mut page = Aligned::new(PLAN);
        page.bytes_mut().copy_from_slice(&self.plan.page()?);
        let file = self.block.open(true)?;
        file.write_all_at(page.bytes(), 0)?;
        Ok(fsync(&file)?)
    }
}

/// How a region is written and flushed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// Past the guest's cache, some at a time.
    Direct,
    /// By the guest's cache.
    Cached,
    /// Past the guest's cache, one at a time.
    OneByOne,
}

impl Way {
    fn of(region: usize) -> Self {
        match region % 3 {
            0 => Self::Direct,
            1 => Self::Cached,
            _ => Self::OneByOne,
        }
    }
}

struct Writer {
    disk: String,
    file: File,
    way: Way,
    plan: Plan,
    region: usize,
    flushed: Arc<AtomicU64>,
    is_over: Arc<AtomicBool>,
}

impl Writer {
    fn work(&self) -> Result<()> {
        let begun = self.flushed.load(Ordering::SeqCst);
        for generation in begun + 1.. {
            if self.is_over.load(Ordering::Relaxed) {
                break;
            }
            if let Err(error) = self.write(generation) {
                println!("FAILED {} {}: {error:#}", self.disk, self.region);
                bail!(error);
            }
            self.flushed.store(generation, Ordering::SeqCst);
            println!("FLUSHED {} {} {generation}", self.disk, self.region);
        }
        Ok(())
    }

    fn write(&self, generation: u64) -> Result<()> {
        let runs = self.plan.runs(self.region, generation);
        let threads = if self.way == Way::Direct { 4 } else { 1 };
        let share = runs.len().div_ceil(threads);
        thread::scope(|scope| {
            let write = |runs: &'_ [Run]| runs.iter().try_for_each(|run| self.run(generation, run));
            let mut shares = runs.chunks(share);
            let own = shares.next().unwrap_or_default();
            let others: Vec<_> = shares
                .map(|runs| scope.spawn(move || write(runs)))
                .collect();
            write(own)?;
            others
                .into_iter()
                .try_for_each(|thread| thread.join().ok().context("a thread panicked")?)
        })?;
        match self.way {
            Way::Cached => fsync(&self.file)?,
            _ => fdatasync(&self.file)?,
        }
        Ok(())
    }

    fn run(&self, generation: u64, run: &Run) -> Result<()> {
        let offset = self.plan.offset(self.region, run.sectors.start);
        if run.is_zero {
            let length = (run.sectors.end - run.sectors.start) * SECTOR as u64;
            let flags = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
            return Ok(fallocate(&self.file, flags, offset, length)?);
        }
        let contents = self.plan.contents(self.region, generation, run);
        let mut memory = Aligned::new(contents.len());
        memory.bytes_mut().copy_from_slice(&contents);
        Ok(self.file.write_all_at(memory.bytes(), offset)?)
    }
}
