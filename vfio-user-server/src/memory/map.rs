//! What of guest memory is mapped at a time.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::{OFlags, SealFlags, Stat, fcntl_get_seals, fcntl_getfl, fstat};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags};
use vfio_user_protocol::{DmaMap, DmaMapFlags};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap};

use super::MapError;
use crate::dirty::{DirtyLog, PageLog};

/// What is mapped at a time.
#[derive(Debug, Default)]
pub(super) struct Map {
    pub(super) generation: u64,
    /// In the order of their addresses, without overlap.
    pub(super) regions: Vec<Arc<Region>>,
    /// Those that are mapped and may be read and written.
    pub(super) mapped: GuestMemoryMmap<PageLog>,
}

#[derive(Debug)]
pub(super) struct Region {
    pub(super) start: u64,
    /// The last address. A region is not empty.
    pub(super) last: u64,
    pub(super) access: DmaMapFlags,
    /// Where it is in this process, unless it is reached by messages.
    pub(super) memory: Option<Arc<GuestRegionMmap<PageLog>>>,
}

impl Map {
    pub(super) fn new(generation: u64, regions: Vec<Arc<Region>>) -> Result<Self, MapError> {
        let both = DmaMapFlags::READ | DmaMapFlags::WRITE;
        let mapped: Vec<_> = regions
            .iter()
            .filter(|region| region.access.contains(both))
            .filter_map(|region| region.memory.clone())
            .collect();
        let mapped = if mapped.is_empty() {
            GuestMemoryMmap::new()
        } else {
            GuestMemoryMmap::from_arc_regions(mapped).map_err(|_| Errno::INVAL)?
        };
        Ok(Self {
            generation,
            regions,
            mapped,
        })
    }

    /// The regions with another one, of `file` if the client has sent one. If `sealed`, files have to be sealed against
    /// shrinking.
    pub(super) fn with(
        &self,
        request: &DmaMap,
        file: Option<OwnedFd>,
        sealed: bool,
        log: &Arc<DirtyLog>,
    ) -> Result<Vec<Arc<Region>>, MapError> {
        let access = DmaMapFlags::from_bits(request.flags).ok_or(Errno::INVAL)?;
        let last = request.size.checked_sub(1).ok_or(Errno::INVAL)?;
        let last = request.address.checked_add(last).ok_or(Errno::INVAL)?;
        let aligned = (request.address | request.size | request.offset).is_multiple_of(PAGE_SIZE);
        // The last page of the address space would have an end that is no address.
        if access.is_empty() || !aligned || last == u64::MAX {
            return Err(Errno::INVAL);
        }
        let is_before = |region: &Arc<Region>| region.last < request.address;
        let at = self.regions.partition_point(is_before);
        if self.regions.get(at).is_some_and(|next| next.start <= last) {
            return Err(Errno::EXIST);
        }
        let memory = file
            .map(|file| map_file(file, request, access, sealed, self, log))
            .transpose()?;
        let region = Region {
            start: request.address,
            last,
            access,
            memory,
        };
        let mut regions = self.regions.clone();
        regions.insert(at, Arc::new(region));
        Ok(regions)
    }

    /// The regions without the one that has exactly this address and size, and that one.
    pub(super) fn without(
        &self,
        address: u64,
        size: u64,
    ) -> Result<(Vec<Arc<Region>>, Arc<Region>), MapError> {
        let last = size
            .checked_sub(1)
            .and_then(|last| address.checked_add(last));
        let mut regions = self.regions.clone();
        let at = regions
            .iter()
            .position(|region| region.start == address && Some(region.last) == last)
            .ok_or(Errno::NOENT)?;
        let removed = regions.remove(at);
        Ok((regions, removed))
    }

    /// The pieces of a range that are mapped, from its start up to the first hole: their region, address and length.
    pub(super) fn pieces(
        &self,
        address: u64,
        length: usize,
    ) -> impl Iterator<Item = (&Region, u64, usize)> {
        let first = self.regions.partition_point(|region| region.last < address);
        let mut rest = length as u64;
        let mut address = address;
        self.regions.iter().skip(first).map_while(move |region| {
            if rest == 0 || region.start > address {
                return None;
            }
            let len = (region.last - address + 1).min(rest);
            let piece = (region.as_ref(), address, usize::try_from(len).ok()?);
            address += len;
            rest -= len;
            Some(piece)
        })
    }
}

/// Maps a file of the client.
fn map_file(
    file: OwnedFd,
    request: &DmaMap,
    access: DmaMapFlags,
    sealed: bool,
    map: &Map,
    log: &Arc<DirtyLog>,
) -> Result<Arc<GuestRegionMmap<PageLog>>, MapError> {
    const TYPE: u32 = 0o170_000; // S_IFMT
    const REGULAR: u32 = 0o100_000; // S_IFREG
    let stat = fstat(&file)?;
    let end = request
        .offset
        .checked_add(request.size)
        .ok_or(Errno::INVAL)?;
    let is_long_enough = u64::try_from(stat.st_size).is_ok_and(|size| end <= size);
    if stat.st_mode & TYPE != REGULAR || !is_long_enough {
        return Err(Errno::INVAL);
    }
    let keeps_its_size =
        fcntl_get_seals(&file).is_ok_and(|seals| seals.contains(SealFlags::SHRINK));
    if sealed && !keeps_its_size {
        return Err(Errno::PERM);
    }
    let size = usize::try_from(request.size).map_err(|_| Errno::NOMEM)?;
    let mut protection = ProtFlags::empty();
    if access.contains(DmaMapFlags::READ) {
        protection |= ProtFlags::READ;
    }
    if access.contains(DmaMapFlags::WRITE) {
        protection |= ProtFlags::WRITE;
    }
    let [protection, flags] = [protection.bits(), MapFlags::SHARED.bits()].map(u32::cast_signed);
    let file = map
        .same_file(&file, &stat)
        .unwrap_or_else(|| Arc::new(File::from(file)));
    let log = PageLog::new(Arc::clone(log), request.address);
    let region = MmapRegionBuilder::new_with_bitmap(size, log)
        .with_mmap_prot(protection)
        .with_mmap_flags(flags)
        .with_file_offset(FileOffset::from_arc(file, request.offset))
        .build()
        .map_err(|error| match error {
            vm_memory::mmap::MmapRegionError::Mmap(error) => {
                Errno::from_io_error(&error).unwrap_or(Errno::INVAL)
            }
            _ => Errno::INVAL,
        })?;
    let region = GuestRegionMmap::new(region, GuestAddress(request.address));
    region.map(Arc::new).ok_or(Errno::INVAL)
}

impl Map {
    /// A descriptor that is already there for the same file, opened in the same way. Clients send the file of their
    /// memory with each piece of it.
    fn same_file(&self, file: &OwnedFd, stat: &Stat) -> Option<Arc<File>> {
        let mode = |flags: OFlags| flags & OFlags::RWMODE;
        let wanted = mode(fcntl_getfl(file).ok()?);
        let files = self
            .regions
            .iter()
            .filter_map(|region| Some(region.memory.as_ref()?.file_offset()?.arc()));
        files
            .filter(|other| {
                let same = fstat(other)
                    .is_ok_and(|other| (other.st_dev, other.st_ino) == (stat.st_dev, stat.st_ino));
                same && fcntl_getfl(other).is_ok_and(|flags| mode(flags) == wanted)
            })
            .map(Arc::clone)
            .next()
    }
}

/// What mappings consist of, in bytes.
const PAGE_SIZE: u64 = 4096;
