//! Memory that the device can reach: a buffer whose pages' guest-physical addresses are known.

use std::fs::File;
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, ensure};

use crate::mapping::Mapping;

/// Bytes in a page.
pub(crate) const PAGE: usize = 4096;

/// Locked pages, each with its own physical address.
#[derive(Debug)]
pub(crate) struct Buffer {
    memory: Mapping,
    pages: Vec<u64>,
}

impl Buffer {
    /// Takes `pages` pages and looks up where they are.
    pub(crate) fn new(pages: usize) -> Result<Self> {
        let memory = Mapping::locked(pages * PAGE).context("taking memory for DMA")?;
        let pagemap = File::open("/proc/self/pagemap")?;
        let pages = (0..pages)
            .map(|page| physical(&pagemap, memory.address() + page * PAGE))
            .collect::<Result<_>>()?;
        Ok(Self { memory, pages })
    }

    /// The physical addresses of the pages.
    pub(crate) fn pages(&self) -> &[u64] {
        &self.pages
    }

    /// Overwrites a page.
    pub(crate) fn fill(&self, page: usize, byte: impl Fn(usize) -> u8) {
        for offset in 0..PAGE {
            self.memory.write(page * PAGE + offset, byte(offset));
        }
    }

    /// What a page holds.
    pub(crate) fn contents(&self, page: usize) -> Vec<u8> {
        (0..PAGE)
            .map(|offset| self.memory.read(page * PAGE + offset))
            .collect()
    }
}

/// Looks an address of this process up in its page map (Linux's Documentation/admin-guide/mm/pagemap.rst).
fn physical(pagemap: &File, address: usize) -> Result<u64> {
    const PRESENT: u64 = 1 << 63;
    const FRAME: u64 = (1 << 55) - 1;

    let mut entry = [0; 8];
    pagemap.read_exact_at(
        &mut entry,
        u64::try_from(address / PAGE * size_of::<u64>())?,
    )?;
    let entry = u64::from_le_bytes(entry);
    ensure!(
        entry & PRESENT != 0 && entry & FRAME != 0,
        "the kernel does not say where {address:#x} is"
    );
    Ok((entry & FRAME) * u64::try_from(PAGE)?)
}
