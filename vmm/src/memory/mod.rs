//! Guest RAM: a sealed memfd for each of its one or two regions, shared with the devices.
//!
//! A region is mapped once and never split, punched or mapped again while the VM lives, so that a device may hold it
//! for as long as it likes, and it is one memory slot, so that devices' views and the guest's are laid out alike.

pub(crate) mod written;

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::num::NonZero;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt as _};
use std::sync::Arc;

use devices::{DmaTarget, Mapping};
use rustix::fs::{
    MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, ftruncate, memfd_create,
};
use vfio_user_client::{DmaError, GuestDma};
use vm_memory::bitmap::{AtomicBitmap, BS};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionMmap, MemoryRegionAddress, VolatileSlice,
};

use crate::config::MemoryConfig;
use crate::layout;
use crate::slots::{HostMemory, Slot, SlotError, Slots};

/// Why guest RAM could not be made.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The memfd could not be created, sized or sealed.
    #[error("--memory: cannot make {size} bytes of guest RAM{}", hugepage_hint(*hugepages))]
    File {
        /// Its size in bytes.
        size: u64,
        /// Whether huge pages were asked for.
        hugepages: bool,
        /// What the kernel says.
        #[source]
        source: io::Error,
    },
    /// What another process hands over as guest RAM cannot be that.
    #[error("what was handed over as {size} bytes of guest RAM {what}")]
    Inherited {
        /// How many bytes it should have.
        size: u64,
        /// What is wrong with it.
        what: &'static str,
    },
    /// The memfd could not be mapped.
    #[error("--memory: cannot map {size} bytes of guest RAM{}", hugepage_hint(*hugepages))]
    Map {
        /// Its size in bytes.
        size: u64,
        /// Whether huge pages were asked for.
        hugepages: bool,
        /// What the kernel says.
        #[source]
        source: vm_memory::mmap::MmapRegionError,
    },
    /// The regions do not fit together; the layout is wrong.
    #[error("--memory: the regions of guest RAM overlap")]
    Layout,
    /// KVM refused the memory slot.
    #[error("--memory: KVM does not take guest RAM")]
    Slot(#[source] SlotError),
}

fn hugepage_hint(hugepages: bool) -> &'static str {
    if hugepages {
        " in huge pages of 2 MiB (are there enough? set /proc/sys/vm/nr_hugepages, or leave hugepages=on out)"
    } else {
        ""
    }
}

/// Guest RAM as this process sees it. What the process itself writes is marked in its bitmap, a bit for each page, since
/// neither KVM nor a device logs that.
pub(crate) type Ram = GuestMemoryMmap<AtomicBitmap>;

type RamRegion = GuestRegionMmap<AtomicBitmap>;

/// Guest RAM.
#[derive(Debug)]
pub(crate) struct Memory {
    /// One for each region of RAM.
    slots: Vec<Slot>,
    ram: Ram,
    hugepages: bool,
}

impl Memory {
    /// Makes the RAM that `config` asks for, and has KVM map it.
    pub(crate) fn new(config: &MemoryConfig, slots: &Slots) -> Result<Self, MemoryError> {
        Self::of(config, slots, |size| new_file(size, config.hugepages))
    }

    /// Takes over RAM that another process has made with this `config`, whose memfds these are, from the lowest address on.
    pub(crate) fn inherit(
        config: &MemoryConfig,
        slots: &Slots,
        files: Vec<OwnedFd>,
    ) -> Result<Self, MemoryError> {
        let mut files = files.into_iter();
        Self::of(config, slots, |size| inherited_file(size, files.next()))
    }

    fn of(
        config: &MemoryConfig,
        slots: &Slots,
        mut file: impl FnMut(u64) -> Result<File, MemoryError>,
    ) -> Result<Self, MemoryError> {
        let regions = ranges(config.size)
            .map(|(start, size)| Ok(Arc::new(region(start, size, file(size)?, config)?)))
            .collect::<Result<Vec<_>, _>>()?;
        let slots = regions
            .iter()
            .map(|region| slots.add(region.start_addr().0, region.clone(), false))
            .collect::<Result<_, _>>()
            .map_err(MemoryError::Slot)?;
        let ram = Ram::from_arc_regions(regions).map_err(|_| MemoryError::Layout)?;
        Ok(Self {
            slots,
            ram,
            hugepages: config.hugepages,
        })
    }

    /// RAM that no VM has.
    #[cfg(any(test, fuzzing))]
    #[allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]
    pub(crate) fn without_kvm(size: u64) -> Self {
        let config = MemoryConfig {
            size,
            hugepages: false,
            prefault: false,
        };
        let regions = ranges(size).map(|(start, size)| {
            let file = new_file(size, false).unwrap();
            region(start, size, file, &config).unwrap()
        });
        Self {
            slots: Vec::new(),
            ram: Ram::from_regions(regions.collect()).unwrap(),
            hugepages: false,
        }
    }

    /// The RAM itself.
    pub(crate) fn ram(&self) -> &Ram {
        &self.ram
    }

    /// How many bytes it has.
    pub(crate) fn size(&self) -> u64 {
        self.ram.iter().map(GuestMemoryRegion::len).sum()
    }

    /// Its size, and how much of it the host has given so far, in bytes.
    pub(crate) fn counters(&self) -> BTreeMap<String, u64> {
        /// What the kernel counts blocks in, whatever the file system's are.
        const BLOCK: u64 = 512;
        let files = self.ram.iter().filter_map(GuestMemoryRegion::file_offset);
        let blocks = files.filter_map(|file| file.file().metadata().ok());
        let resident = blocks.map(|file| file.blocks().saturating_mul(BLOCK)).sum();
        [("size", self.size()), ("resident", resident)]
            .map(|(name, bytes)| (name.to_owned(), bytes))
            .into()
    }

    /// Its regions, from the lowest address on.
    pub(crate) fn regions(&self) -> impl Iterator<Item = Region<'_>> {
        self.ram.iter().filter_map(|region| {
            let start = region.start_addr().0;
            Some(Region {
                range: start..start + region.len(),
                file: region.file_offset()?.file(),
                mapping: region,
            })
        })
    }

    /// Writes to RAM that no guest uses yet. A range that is not wholly within a region is an
    /// [`InvalidInput`](io::ErrorKind::InvalidInput).
    pub(crate) fn write(&self, address: u64, data: &[u8]) -> io::Result<()> {
        let end = address.checked_add(data.len() as u64);
        let within = |region: &Region<'_>| {
            region.range.start <= address && end.is_some_and(|end| end <= region.range.end)
        };
        let Some(region) = self.regions().find(within) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        if self.hugepages {
            // Files of huge pages cannot be written to.
            let written = self.ram.write_slice(data, GuestAddress(address));
            written.map_err(|_| io::ErrorKind::InvalidInput.into())
        } else {
            region.file.write_all_at(data, address - region.range.start)
        }
    }

    /// The RAM for devices that reach it by messages.
    pub(crate) fn for_messages(&self) -> Arc<dyn GuestDma> {
        Arc::new(MessageDma(self.ram.clone()))
    }

    /// Has `target` map all of guest RAM.
    pub(crate) fn attach(&self, target: &dyn DmaTarget) -> Result<(), devices::BackendError> {
        for region in self.ram.iter() {
            if let Some(file) = region.file_offset() {
                target.map(&Mapping {
                    iova: region.start_addr().0,
                    size: region.len(),
                    address: region.as_ptr().cast_const(),
                    file: (file.file().as_fd(), file.start()),
                })?;
            }
        }
        Ok(())
    }
}

/// A region of guest RAM.
#[derive(Debug)]
pub(crate) struct Region<'m> {
    /// Its guest physical addresses.
    pub(crate) range: Range<u64>,
    /// Its memfd, from offset 0 on.
    pub(crate) file: &'m File,
    mapping: &'m RamRegion,
}

impl<'m> Region<'m> {
    /// What it has there, by offsets from its start, while the guest uses it. What has no memory yet gets some when it is
    /// looked at. A range that is not wholly within it is an [`InvalidInput`](io::ErrorKind::InvalidInput).
    pub(crate) fn contents(&self, range: Range<u64>) -> io::Result<Contents<'m>> {
        let invalid = |_| io::Error::from(io::ErrorKind::InvalidInput);
        let length =
            usize::try_from(range.end.saturating_sub(range.start)).map_err(|_| invalid(()))?;
        self.mapping
            .get_slice(MemoryRegionAddress(range.start), length)
            .map_err(|_| invalid(()))
    }
}

/// Memory that the guest may write to at any time.
pub(crate) type Contents<'m> = VolatileSlice<'m, BS<'m, AtomicBitmap>>;

impl HostMemory for RamRegion {
    fn address(&self) -> *mut u8 {
        self.as_ptr()
    }

    fn size(&self) -> u64 {
        self.len()
    }

    /// It is always there: its file is sealed.
    fn why_missing(&self, _: bool) -> Option<&'static str> {
        None
    }

    fn lose(&self, _: &'static str) {}
}

/// Guest RAM as a device reaches it that does not map it.
#[derive(Debug)]
struct MessageDma(Ram);

impl GuestDma for MessageDma {
    fn read(&self, address: u64, data: &mut [u8]) -> Result<(), DmaError> {
        self.0
            .read_slice(data, GuestAddress(address))
            .map_err(|_| DmaError)
    }

    fn write(&self, address: u64, data: &[u8]) -> Result<(), DmaError> {
        // Not partly: the whole range is looked up first.
        let fits = self.0.check_range(GuestAddress(address), data.len());
        if !fits {
            return Err(DmaError);
        }
        self.0
            .write_slice(data, GuestAddress(address))
            .map_err(|_| DmaError)
    }
}

/// The start and size of each region of RAM of `size` bytes.
pub(crate) fn ranges(size: u64) -> impl Iterator<Item = (u64, u64)> {
    let low = size.min(layout::LOW_RAM_END);
    let high = size - low;
    [(0, low), (layout::HIGH_RAM_START, high)]
        .into_iter()
        .filter(|&(_, size)| size > 0)
}

/// The first address beyond RAM of `size` bytes.
pub(crate) fn end(size: u64) -> u64 {
    ranges(size)
        .map(|(start, size)| start + size)
        .max()
        .unwrap_or(0)
}

fn new_file(size: u64, hugepages: bool) -> Result<File, MemoryError> {
    sealed_memfd(size, hugepages).map_err(|source| MemoryError::File {
        size,
        hugepages,
        source,
    })
}

/// A memfd that was handed over, if nobody can take its pages from under the guest.
fn inherited_file(size: u64, file: Option<OwnedFd>) -> Result<File, MemoryError> {
    let wrong = |what| MemoryError::Inherited { size, what };
    let file = File::from(file.ok_or_else(|| wrong("is missing"))?);
    let seals = fcntl_get_seals(&file).map_err(|_| wrong("is no memfd"))?;
    if !seals.contains(SEALS) {
        return Err(wrong("is not sealed"));
    }
    match file.metadata() {
        Ok(metadata) if metadata.len() == size => Ok(file),
        _ => Err(wrong("has another size")),
    }
}

/// What a bit of the RAM's own bitmap stands for, in bytes. This process writes little to RAM, here and there, but while
/// the VM stands still all bits are looked at.
const MARKED: NonZero<usize> = NonZero::new(64 << 10).unwrap();

fn region(
    start: u64,
    size: u64,
    file: File,
    config: &MemoryConfig,
) -> Result<RamRegion, MemoryError> {
    let hugepages = config.hugepages;
    let mut flags = libc::MAP_SHARED;
    if config.prefault || hugepages {
        // Huge pages that are missing shall fail here, not kill the VM when the guest touches them.
        flags |= libc::MAP_POPULATE;
    } else {
        flags |= libc::MAP_NORESERVE;
    }
    let length = usize::try_from(size).map_err(|_| MemoryError::Layout)?;
    let mapping = MmapRegionBuilder::new_with_bitmap(length, AtomicBitmap::new(length, MARKED))
        .with_file_offset(FileOffset::new(file, 0))
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(flags)
        .build()
        .map_err(|source| MemoryError::Map {
            size,
            hugepages,
            source,
        })?;
    RamRegion::new(mapping, GuestAddress(start)).ok_or(MemoryError::Layout)
}

/// A memfd that whoever receives it can neither grow, nor shrink, nor seal further: a device could otherwise take it
/// from under the guest, or forbid the VMM to write to it.
fn sealed_memfd(size: u64, hugepages: bool) -> io::Result<File> {
    let mut flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    if hugepages {
        flags |= MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    }
    let file = memfd_create("guest-ram", flags)?;
    ftruncate(&file, size)?;
    fcntl_add_seals(&file, SEALS)?;
    Ok(file.into())
}

const SEALS: SealFlags = SealFlags::SHRINK
    .union(SealFlags::GROW)
    .union(SealFlags::SEAL);

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::bitmap::Bitmap;

    #[test]
    fn ram_leaves_the_hole_free() {
        let split = |size| ranges(size).collect::<Vec<_>>();
        assert_eq!(split(64 << 20), [(0, 64 << 20)]);
        assert_eq!(split(3 << 30), [(0, 3 << 30)]);
        assert_eq!(split(4 << 30), [(0, 3 << 30), (4 << 30, 1 << 30)]);
        assert_eq!(end(4 << 30), 5 << 30);
        assert_eq!(end(512 << 20), 512 << 20);
    }

    #[test]
    fn what_comes_by_messages_is_marked() {
        let ram = Ram::from_ranges(&[(GuestAddress(0x10000), 0x4000)]).unwrap();
        let dma = MessageDma(ram.clone());
        dma.write(0x11ffe, &[1, 2, 3]).unwrap();
        assert!(dma.write(0x13fff, &[1, 2]).is_err());
        assert!(dma.write(u64::MAX, &[1, 2]).is_err());
        let bitmap = ram.iter().next().unwrap().bitmap();
        let marked = [0, 0x1000, 0x2000, 0x3000].map(|offset| bitmap.dirty_at(offset));
        assert_eq!(marked, [false, true, true, false]);
        let mut data = [0; 4];
        dma.read(0x11ffe, &mut data).unwrap();
        assert_eq!(data, [1, 2, 3, 0]);
        assert!(dma.read(0x13ffe, &mut data).is_err());
    }

    #[test]
    fn what_is_no_ram_is_not_taken_over() {
        let take = |file: Option<File>| inherited_file(1 << 20, file.map(OwnedFd::from));
        assert!(take(sealed_memfd(1 << 20, false).ok()).is_ok());
        let unsealed = memfd_create("ram", MemfdFlags::ALLOW_SEALING).unwrap();
        let unsealed = File::from(unsealed);
        unsealed.set_len(1 << 20).unwrap();
        for (file, what) in [
            (None, "missing"),
            (sealed_memfd(2 << 20, false).ok(), "size"),
            (Some(unsealed), "sealed"),
            (File::open("/dev/null").ok(), "memfd"),
        ] {
            let error = take(file).unwrap_err().to_string();
            assert!(error.contains(what), "{error}");
        }
    }

    #[test]
    fn memfd_is_sealed() {
        let file = sealed_memfd(1 << 20, false).unwrap();
        assert!(file.set_len(0).is_err());
        assert!(file.set_len(2 << 20).is_err());
        assert!(fcntl_add_seals(&file, SealFlags::FUTURE_WRITE).is_err());
        assert_eq!(file.metadata().unwrap().len(), 1 << 20);
    }
}
