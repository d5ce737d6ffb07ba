//! What a bench measures: I/O of one kind after the other, of each as much as there can be in some time.
//!
//! `outrigger.bench=` on the kernel command line is a list of jobs, those of a [`disk`] and the names of [`Transfer`]s, for
//! the first disk and the first card, and `outrigger.bench-ms=` says how long each is to take. `BEGIN JOB` says that one begins when
//! all is ready for it, and `END JOB NUMBER` that it is done, and how many requests, round trips or bytes that was.

mod disk;
mod requests;

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use guest::transfer::Transfer;

use crate::parameter;
use crate::pci::Device;
use crate::virtio::block::Block;
use crate::virtio::cards::Card;
use crate::virtio::{CARD, DISK};

/// Is the first program of a guest of which nothing is asked but to start.
pub(crate) fn first_word() -> ! {
    println!("FIRST WORD");
    loop {
        thread::park();
    }
}

/// Does all jobs.
pub(crate) fn all() -> Result<()> {
    let jobs = parameter("outrigger.bench")?.context("no outrigger.bench=")?;
    let time = parameter("outrigger.bench-ms")?.context("no outrigger.bench-ms=")?;
    let time = Duration::from_millis(time.parse()?);
    for job in jobs.split(',') {
        carry_out(job, time).with_context(|| job.to_owned())?;
    }
    Ok(())
}

fn carry_out(name: &str, time: Duration) -> Result<()> {
    if let Some(job) = disk::Job::parse(name) {
        let disk = Block::of(&first(DISK)?)?.open(true)?;
        // What is only so at first does not count.
        job.carry_out(&disk, Instant::now() + time / 8)?;
        return measured(name, time, |end| job.carry_out(&disk, end));
    }
    let Some(transfer) = Transfer::parse(name) else {
        bail!("there is no such job");
    };
    let port = parameter("outrigger.bench-port")?.context("no outrigger.bench-port=")?;
    let stream = Card::of(&first(CARD)?)?.connect(port.parse()?)?;
    transfer.begin(&stream)?;
    measured(name, time, |end| transfer.carry_out(stream, end))
}

fn measured(name: &str, time: Duration, act: impl FnOnce(Instant) -> Result<u64>) -> Result<()> {
    println!("BEGIN {name}");
    let count = act(Instant::now() + time)?;
    println!("END {name} {count}");
    Ok(())
}

fn first(ids: (u16, u16)) -> Result<Device> {
    let devices = Device::with_ids(ids)?.into_iter();
    devices.map(Ok).next().context("no device")?
}
