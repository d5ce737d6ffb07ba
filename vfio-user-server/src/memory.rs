//! Guest memory, as the client lets the device have it.

use std::fs::File;
use std::ops::Deref;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use rustix::fs::{OFlags, SealFlags, Stat, fcntl_get_seals, fcntl_getfl, fstat};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags};
use thiserror::Error;
use vfio_user_protocol::{Command, DmaAccess, DmaMap, DmaMapFlags, take};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestAddressSpace, GuestMemoryMmap, GuestRegionMmap,
    MemoryRegionAddress,
};
use zerocopy::IntoBytes;

use crate::dirty::{DirtyLog, PageLog};
use crate::function::Function;
use crate::link::{CallError, Link};

/// Guest memory. Any thread of the device may use it, at any time.
///
/// Memory is what the client has mapped for the device, and only while the guest lets the device be bus master.
/// Addresses are the guest's physical ones, unless it has an IOMMU.
///
/// [`read`](Self::read) and [`write`](Self::write) reach all of it, also what the client gives access to by messages
/// alone. [`view`](Self::view) is for those who want the part that is mapped into this process through `vm-memory`.
#[derive(Clone, Debug)]
pub struct Memory(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    function: Arc<Function>,
    log: Arc<DirtyLog>,
    current: RwLock<Arc<Map>>,
    /// How many times the map has been replaced.
    generation: AtomicU64,
    /// Signalled when a view of an earlier map goes.
    released: (Mutex<()>, Condvar),
    channel: RwLock<Option<Channel>>,
}

/// How messages reach the client.
#[derive(Clone, Debug)]
pub(crate) struct Channel {
    pub(crate) link: Arc<Link>,
    /// Most bytes of memory in one message.
    pub(crate) chunk: usize,
    /// How long an answer may take.
    pub(crate) limit: Duration,
}

/// What is mapped at a time.
#[derive(Debug, Default)]
struct Map {
    generation: u64,
    /// In the order of their addresses, without overlap.
    regions: Vec<Arc<Region>>,
    /// Those that are mapped and may be read and written.
    mapped: GuestMemoryMmap<PageLog>,
}

#[derive(Debug)]
struct Region {
    start: u64,
    /// The last address. A region is not empty.
    last: u64,
    access: DmaMapFlags,
    /// Where it is in this process, unless it is reached by messages.
    memory: Option<Arc<GuestRegionMmap<PageLog>>>,
}

/// Why the device cannot access memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum MemoryError {
    /// The guest has not made the device bus master.
    #[error("the device is not bus master")]
    NotBusMaster,
    /// Not all of the range is mapped.
    #[error("{length:#x} bytes at {address:#x} are not mapped")]
    NotMapped {
        /// The first address.
        address: u64,
        /// Number of bytes.
        length: u64,
    },
    /// The range is mapped, and not for this.
    #[error("{address:#x} is mapped for another kind of access")]
    Denied {
        /// The first address.
        address: u64,
    },
    /// The client has refused, with this errno.
    #[error("the client has refused the access with errno {0}")]
    Refused(u32),
    /// The client has not answered in time, or not properly, or it is gone.
    #[error("the client has not answered")]
    NoAnswer,
}

/// What is in the way of a change of the map.
pub(crate) type MapError = Errno;

impl Memory {
    pub(crate) fn new(function: Arc<Function>) -> Self {
        Self(Arc::new(Shared {
            function,
            log: Arc::default(),
            current: RwLock::default(),
            generation: AtomicU64::new(0),
            released: Default::default(),
            channel: RwLock::new(None),
        }))
    }

    /// Reads guest memory from `address` on.
    ///
    /// # Errors
    ///
    /// [`MemoryError`] if not all of the range can be read. What `data` holds then means nothing.
    pub fn read(&self, address: u64, data: &mut [u8]) -> Result<(), MemoryError> {
        let map = self.access(address, data.len(), DmaMapFlags::READ)?;
        let mut rest = data;
        for (region, address, len) in map.pieces(address, rest.len()) {
            let (piece, next) = rest
                .split_at_mut_checked(len)
                .ok_or(MemoryError::NoAnswer)?;
            match &region.memory {
                Some(memory) => memory
                    .read_slice(piece, MemoryRegionAddress(address - region.start))
                    .map_err(|_| MemoryError::Denied { address })?,
                None => self.read_by_messages(address, piece)?,
            }
            rest = next;
        }
        Ok(())
    }

    /// Writes guest memory from `address` on.
    ///
    /// # Errors
    ///
    /// [`MemoryError`] if not all of the range can be written. Nothing has been written then, unless it was the client
    /// that refused.
    pub fn write(&self, address: u64, data: &[u8]) -> Result<(), MemoryError> {
        let map = self.access(address, data.len(), DmaMapFlags::WRITE)?;
        let mut rest = data;
        for (region, address, len) in map.pieces(address, rest.len()) {
            let (piece, next) = rest.split_at_checked(len).ok_or(MemoryError::NoAnswer)?;
            match &region.memory {
                Some(memory) => memory
                    .write_slice(piece, MemoryRegionAddress(address - region.start))
                    .map_err(|_| MemoryError::Denied { address })?,
                None => self.write_by_messages(address, piece)?,
            }
            rest = next;
        }
        Ok(())
    }

    /// The memory that is mapped into this process, can be read and written, and stays mapped as long as the view is
    /// there. Writes through it are logged for migration.
    ///
    /// The client's request to unmap memory waits until there is no view of it: keep one for an operation and not for
    /// longer, or let it go in [`Device::memory_changed`](crate::Device::memory_changed).
    pub fn view(&self) -> View {
        let map = if self.0.function.is_bus_master() {
            self.map()
        } else {
            Arc::default()
        };
        self.view_of(map)
    }

    pub(crate) fn log(&self) -> &DirtyLog {
        &self.0.log
    }

    /// Says how messages reach the client from now on, if they do.
    pub(crate) fn set_channel(&self, channel: Option<Channel>) {
        *self
            .0
            .channel
            .write()
            .unwrap_or_else(PoisonError::into_inner) = channel;
    }

    /// Adds a mapping, of `file` if the client has sent one. If `sealed`, files have to be sealed against shrinking.
    pub(crate) fn map_region(
        &self,
        request: &DmaMap,
        file: Option<OwnedFd>,
        max_regions: usize,
        sealed: bool,
    ) -> Result<(), MapError> {
        let access = DmaMapFlags::from_bits(request.flags).ok_or(Errno::INVAL)?;
        let last = request.size.checked_sub(1).ok_or(Errno::INVAL)?;
        let last = request.address.checked_add(last).ok_or(Errno::INVAL)?;
        let aligned = (request.address | request.size | request.offset).is_multiple_of(PAGE_SIZE);
        // The last page of the address space would have an end that is no address.
        if access.is_empty() || !aligned || last == u64::MAX {
            return Err(Errno::INVAL);
        }
        let map = self.map();
        if map.regions.len() >= max_regions {
            return Err(Errno::NOSPC);
        }
        let at = map
            .regions
            .partition_point(|region| region.last < request.address);
        if map.regions.get(at).is_some_and(|next| next.start <= last) {
            return Err(Errno::EXIST);
        }
        let memory = file
            .map(|file| map_file(file, request, access, sealed, &map, &self.0.log))
            .transpose()?;
        let mut regions = map.regions.clone();
        let region = Region {
            start: request.address,
            last,
            access,
            memory,
        };
        regions.insert(at, Arc::new(region));
        self.replace(regions)
    }

    /// Takes a mapping away. To be followed by [`released`](Self::released).
    pub(crate) fn unmap_region(&self, address: u64, size: u64) -> Result<Removed, MapError> {
        let last = size
            .checked_sub(1)
            .and_then(|last| address.checked_add(last));
        let mut regions = self.map().regions.clone();
        let at = regions
            .iter()
            .position(|region| region.start == address && Some(region.last) == last)
            .ok_or(Errno::NOENT)?;
        let removed = vec![regions.remove(at)];
        self.replace(regions)?;
        Ok(Removed(removed))
    }

    /// Takes all mappings away. To be followed by [`released`](Self::released).
    pub(crate) fn unmap_all(&self) -> Result<Removed, MapError> {
        let removed = self.map().regions.clone();
        self.replace(Vec::new())?;
        Ok(Removed(removed))
    }

    /// Waits, for a while, until nobody has a view of what was removed. If somebody keeps one, the mappings come back.
    pub(crate) fn released(&self, removed: Removed, limit: Duration) -> Result<(), MapError> {
        if self.await_release(&removed, limit) {
            return Ok(());
        }
        let mut regions = self.map().regions.clone();
        regions.extend(removed.0);
        regions.sort_unstable_by_key(|region| region.start);
        self.replace(regions)?;
        Err(Errno::BUSY)
    }

    /// Waits, for a while, until nobody has a view of what was removed, and returns whether it is so.
    pub(crate) fn await_release(&self, removed: &Removed, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        let (lock, condvar) = &self.0.released;
        let mut guard = lock.lock().unwrap_or_else(PoisonError::into_inner);
        while removed.0.iter().any(|region| Arc::strong_count(region) > 1) {
            let limit = deadline.saturating_duration_since(Instant::now());
            if limit.is_zero() {
                return false;
            }
            let result = condvar.wait_timeout(guard, limit.min(SLICE));
            guard = result.unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    fn replace(&self, regions: Vec<Arc<Region>>) -> Result<(), MapError> {
        let generation = self.0.generation.load(Ordering::SeqCst) + 1;
        let map = Arc::new(Map::new(generation, regions)?);
        let mut current = self
            .0
            .current
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        self.0.generation.store(generation, Ordering::SeqCst);
        *current = map;
        Ok(())
    }

    fn map(&self) -> Arc<Map> {
        let current = self
            .0
            .current
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        Arc::clone(&current)
    }

    /// A view of the map, if all of a range may be accessed in this way.
    fn access(
        &self,
        address: u64,
        length: usize,
        access: DmaMapFlags,
    ) -> Result<View, MemoryError> {
        if !self.0.function.is_bus_master() {
            return Err(MemoryError::NotBusMaster);
        }
        let view = self.view_of(self.map());
        let mut covered = 0;
        for (region, _, len) in view.pieces(address, length) {
            if !region.access.contains(access) {
                return Err(MemoryError::Denied { address });
            }
            covered += len;
        }
        if covered == length {
            return Ok(view);
        }
        Err(MemoryError::NotMapped {
            address,
            length: length as u64,
        })
    }

    fn view_of(&self, map: Arc<Map>) -> View {
        let notice = Notice {
            generation: map.generation,
            shared: Arc::clone(&self.0),
        };
        View {
            map,
            _notice: notice,
        }
    }

    fn read_by_messages(&self, address: u64, data: &mut [u8]) -> Result<(), MemoryError> {
        let channel = self.channel()?;
        let mut address = address;
        for data in data.chunks_mut(channel.chunk) {
            let access = DmaAccess {
                address,
                count: data.len() as u64,
            };
            let call = channel
                .link
                .call(Command::DmaRead, access.as_bytes(), &[], channel.limit);
            let reply = call.map_err(MemoryError::from)?;
            let (done, bytes) =
                take::<DmaAccess>(&reply.payload).map_err(|_| MemoryError::NoAnswer)?;
            if done != access || bytes.len() != data.len() {
                return Err(MemoryError::NoAnswer);
            }
            data.copy_from_slice(bytes);
            address += access.count;
        }
        Ok(())
    }

    fn write_by_messages(&self, address: u64, data: &[u8]) -> Result<(), MemoryError> {
        let channel = self.channel()?;
        let mut address = address;
        for data in data.chunks(channel.chunk) {
            let access = DmaAccess {
                address,
                count: data.len() as u64,
            };
            let call = channel
                .link
                .call(Command::DmaWrite, access.as_bytes(), data, channel.limit);
            // Whether or not it succeeded, it may have been written.
            self.0.log.mark(address, access.count);
            let reply = call.map_err(MemoryError::from)?;
            // The specification's reply has a count of four bytes, everybody else's of eight.
            let done = access.as_bytes();
            if ![done.get(..12), Some(done)].contains(&Some(&reply.payload)) {
                return Err(MemoryError::NoAnswer);
            }
            address += access.count;
        }
        Ok(())
    }

    fn channel(&self) -> Result<Channel, MemoryError> {
        let channel = self
            .0
            .channel
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        channel.clone().ok_or(MemoryError::NoAnswer)
    }
}

/// Mappings that have been taken away and may still be in use.
#[derive(Debug)]
pub(crate) struct Removed(Vec<Arc<Region>>);

impl Map {
    fn new(generation: u64, regions: Vec<Arc<Region>>) -> Result<Self, MapError> {
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

    /// The pieces of a range that are mapped, from its start up to the first hole: their region, address and length.
    fn pieces(&self, address: u64, length: usize) -> impl Iterator<Item = (&Region, u64, usize)> {
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

/// The memory that was mapped at some moment, as `vm-memory` has it.
#[derive(Clone, Debug)]
pub struct View {
    // Goes before the notice is given.
    map: Arc<Map>,
    _notice: Notice,
}

impl View {
    fn pieces(&self, address: u64, length: usize) -> impl Iterator<Item = (&Region, u64, usize)> {
        self.map.pieces(address, length)
    }
}

impl Deref for View {
    type Target = GuestMemoryMmap<PageLog>;

    fn deref(&self) -> &GuestMemoryMmap<PageLog> {
        &self.map.mapped
    }
}

/// Tells whoever waits for it that a view has gone.
#[derive(Clone, Debug)]
struct Notice {
    generation: u64,
    shared: Arc<Shared>,
}

impl Drop for Notice {
    fn drop(&mut self) {
        if self.generation != self.shared.generation.load(Ordering::SeqCst) {
            let (lock, condvar) = &self.shared.released;
            let _guard = lock.lock().unwrap_or_else(PoisonError::into_inner);
            condvar.notify_all();
        }
    }
}

impl GuestAddressSpace for Memory {
    type M = GuestMemoryMmap<PageLog>;
    type T = View;

    fn memory(&self) -> View {
        self.view()
    }
}

impl From<CallError> for MemoryError {
    fn from(error: CallError) -> Self {
        match error {
            CallError::Refused(errno) => Self::Refused(errno),
            CallError::Ended | CallError::TimedOut => Self::NoAnswer,
        }
    }
}

const PAGE_SIZE: u64 = 4096;

/// How long to wait for a view in one go. Its end wakes the waiter, but for one that ends while the wait begins.
const SLICE: Duration = Duration::from_millis(20);
