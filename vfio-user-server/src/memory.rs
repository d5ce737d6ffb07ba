//! Guest memory, as the client lets the device have it.

mod map;

use std::ops::Deref;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use thiserror::Error;
use vfio_user_protocol::{Command, DmaAccess, DmaMap, DmaMapFlags, take};
use vm_memory::{Bytes, GuestAddressSpace, GuestMemoryMmap, MemoryRegionAddress};
use zerocopy::IntoBytes;

use self::map::{Map, Region};
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
///
/// Not every client answers such messages while it waits for the device, and QEMU is one that does not. A device that is
/// to work there, in a guest whose memory is not shared, does its transfers in a thread of its own.
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
        let map = self.map();
        if map.regions.len() >= max_regions {
            return Err(Errno::NOSPC);
        }
        self.replace(map.with(request, file, sealed, &self.0.log)?)
    }

    /// Takes a mapping away. To be followed by [`released`](Self::released).
    pub(crate) fn unmap_region(&self, address: u64, size: u64) -> Result<Removed, MapError> {
        let (regions, removed) = self.map().without(address, size)?;
        self.replace(regions)?;
        Ok(Removed(vec![removed]))
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

/// How long to wait for a view in one go. Its end wakes the waiter, but for one that ends while the wait begins.
const SLICE: Duration = Duration::from_millis(20);
