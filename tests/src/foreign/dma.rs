//! Guest memory, as the client has mapped it for the device.

use std::fs::File;
use std::io::{self, ErrorKind};

use vm_memory::{FileOffset, MmapRegion, VolatileMemory};

/// The mapped ranges of guest memory.
#[derive(Debug, Default)]
pub(super) struct Dma {
    ranges: Vec<Range>,
}

#[derive(Debug)]
struct Range {
    address: u64,
    memory: MmapRegion,
}

impl Dma {
    pub(super) fn map(
        &mut self,
        address: u64,
        size: u64,
        fd: Option<File>,
        offset: u64,
    ) -> io::Result<()> {
        // This device sends no DMA messages: memory that it cannot map is of no use to it.
        let file = fd.ok_or(ErrorKind::Unsupported)?;
        let size = usize::try_from(size).map_err(|_| ErrorKind::InvalidInput)?;
        if self
            .ranges
            .iter()
            .any(|range| range.address < address + size as u64 && address < range.end())
        {
            return Err(ErrorKind::AlreadyExists.into());
        }
        let memory =
            MmapRegion::from_file(FileOffset::new(file, offset), size).map_err(io::Error::other)?;
        self.ranges.push(Range { address, memory });
        Ok(())
    }

    pub(super) fn unmap(&mut self, address: u64, size: u64) -> io::Result<()> {
        let exact = |range: &Range| range.address == address && range.memory.size() as u64 == size;
        let found = self
            .ranges
            .iter()
            .position(exact)
            .ok_or(ErrorKind::NotFound)?;
        self.ranges.swap_remove(found);
        Ok(())
    }

    /// Reads guest memory; None when it is not mapped in one piece.
    pub(super) fn read(&self, address: u64, data: &mut [u8]) -> Option<()> {
        let (range, offset) = self.find(address)?;
        range
            .memory
            .get_slice(offset, data.len())
            .ok()?
            .copy_to(data);
        Some(())
    }

    /// Writes guest memory; None when it is not mapped in one piece.
    pub(super) fn write(&self, address: u64, data: &[u8]) -> Option<()> {
        let (range, offset) = self.find(address)?;
        range
            .memory
            .get_slice(offset, data.len())
            .ok()?
            .copy_from(data);
        Some(())
    }

    fn find(&self, address: u64) -> Option<(&Range, usize)> {
        let range = self
            .ranges
            .iter()
            .find(|range| (range.address..range.end()).contains(&address))?;
        Some((range, usize::try_from(address - range.address).ok()?))
    }
}

impl Range {
    fn end(&self) -> u64 {
        self.address + self.memory.size() as u64
    }
}
