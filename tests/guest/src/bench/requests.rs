//! Keeps a disk busy with so many requests at a time, by io_uring: it takes less of the guest's CPU than a thread for each.
#![expect(unsafe_code, reason = "the kernel reads and writes memory meanwhile")]

use std::fs::File;
use std::os::fd::AsRawFd;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use io_uring::types::Fd;
use io_uring::{IoUring, opcode};

use crate::virtio::block::Aligned;

#[derive(Clone, Copy, Debug)]
pub(super) struct Requests {
    pub(super) writes: bool,
    /// Bytes of each.
    pub(super) length: u32,
    /// How many there are at a time.
    pub(super) depth: u32,
}

/// Makes requests at such places until it is time to end, and waits for the last of them. Returns how many that was.
pub(super) fn keep(
    disk: &File,
    requests: Requests,
    end: Instant,
    mut place: impl FnMut() -> u64,
) -> Result<u64> {
    let mut ring = IoUring::new(requests.depth).context("io_uring")?;
    let length = usize::try_from(requests.length)?;
    let depth = usize::try_from(requests.depth)?;
    // For ever, so that no request can outlive it: this program runs only a few jobs.
    let memory = Box::leak(Box::new(Aligned::new(length * depth)));
    let buffers = memory.bytes_mut().chunks_exact_mut(length);
    let buffers: Vec<*mut u8> = buffers.map(<[u8]>::as_mut_ptr).collect();
    let mut free: Vec<usize> = (0..depth).collect();
    let mut finished = 0;
    loop {
        let goes_on = Instant::now() < end;
        while goes_on && let Some(slot) = free.pop() {
            let (fd, buffer) = (Fd(disk.as_raw_fd()), buffers[slot]);
            let entry = match requests.writes {
                true => opcode::Write::new(fd, buffer, requests.length)
                    .offset(place())
                    .build(),
                false => opcode::Read::new(fd, buffer, requests.length)
                    .offset(place())
                    .build(),
            };
            let entry = entry.user_data(slot as u64);
            // SAFETY: the buffer is never given back, and nobody else has it until the kernel says that this request is
            // done, which is when its slot is free again.
            unsafe { ring.submission().push(&entry) }.context("the ring is full")?;
        }
        if free.len() == depth {
            return Ok(finished);
        }
        ring.submit_and_wait(1)?;
        for done in ring.completion() {
            let result = done.result();
            ensure!(result == i32::try_from(length)?, "a request: {result}");
            free.push(usize::try_from(done.user_data())?);
            finished += 1;
        }
    }
}
