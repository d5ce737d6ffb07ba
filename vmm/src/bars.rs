//! Puts an endpoint's BARs where the guest wants them: on the bus, in memory slots and on doorbells' events.

use std::fs::File;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use devices::{BarLayout, BusDevice, Doorbell, MappableArea, Passthrough};
use kvm_ioctls::VmFd;
use pci::{BarIndex, BarKind, BarMapper, BarSpec, Cause, Endpoint, Windows};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, MmapRegion};

use crate::bus::Bus;
use crate::kvm_ext::{IoEvent, ioeventfd};
use crate::slots::{HostMemory, Slot, Slots};

/// Why a BAR cannot be where the guest put it, or not at all.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BarError {
    #[error("{bar} of {size:#x} bytes at {address:#x} is outside the host bridge's windows")]
    OutsideWindows {
        bar: BarIndex,
        address: u64,
        size: u64,
    },
    #[error("cannot map the file behind {bar} at {offset:#x}")]
    Area {
        bar: BarIndex,
        offset: u64,
        #[source]
        source: vm_memory::mmap::MmapRegionError,
    },
    #[error("cannot map the file behind {bar} at {offset:#x}")]
    File {
        bar: BarIndex,
        offset: u64,
        #[source]
        source: std::io::Error,
    },
}

/// Where BARs can go: what all endpoints' mappers share.
#[derive(Debug)]
pub(crate) struct Space {
    pub(crate) vm: Arc<VmFd>,
    pub(crate) slots: Slots,
    pub(crate) memory: Arc<Bus>,
    pub(crate) ports: Arc<Bus>,
    pub(crate) windows: Windows,
}

/// The BARs of one endpoint.
#[derive(Debug)]
pub(crate) struct Bars {
    space: Arc<Space>,
    /// The endpoint owns this.
    endpoint: Weak<Passthrough>,
    bars: [Option<Bar>; 7],
    mapped: Mutex<[Option<Mapped>; 7]>,
}

/// A BAR, wherever it is mapped.
#[derive(Debug)]
struct Bar {
    spec: BarSpec,
    areas: Vec<Area>,
    doorbells: Vec<Doorbell>,
}

/// A part of a BAR with memory behind it.
#[derive(Debug)]
struct Area {
    offset: u64,
    readonly: bool,
    mapping: Arc<MmapRegion>,
}

/// A BAR that is mapped. All of it goes when the value is dropped.
#[derive(Debug)]
struct Mapped {
    _slots: Vec<Slot>,
    _doorbells: Vec<InstalledDoorbell>,
    _range: BusRange,
}

impl Bars {
    /// Maps the files behind BARs into this process.
    pub(crate) fn new(
        space: Arc<Space>,
        layouts: [Option<BarLayout>; 7],
    ) -> Result<Self, BarError> {
        let mut bars = [const { None }; 7];
        for ((index, layout), bar) in BarIndex::ALL_AND_ROM
            .into_iter()
            .zip(layouts)
            .zip(&mut bars)
        {
            let Some(layout) = layout else { continue };
            let areas = layout
                .areas
                .iter()
                .map(|area| Area::new(index, area, !layout.writable))
                .collect::<Result<_, _>>()?;
            *bar = Some(Bar {
                spec: layout.spec,
                areas,
                doorbells: layout.doorbells,
            });
        }
        Ok(Self {
            space,
            endpoint: Weak::new(),
            bars,
            mapped: Mutex::default(),
        })
    }

    /// Has `endpoint`, which may still be under construction, serve what is not mapped.
    pub(crate) fn serve_by(self, endpoint: Weak<Passthrough>) -> Self {
        Self { endpoint, ..self }
    }

    fn mapped(&self) -> MutexGuard<'_, [Option<Mapped>; 7]> {
        self.mapped.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl BarMapper for Bars {
    fn map(&self, index: BarIndex, address: u64) -> Result<(), Cause> {
        let Some(Some(bar)) = self.bars.get(index.index()) else {
            return Ok(());
        };
        let target = Target {
            endpoint: self.endpoint.clone(),
            bar: index,
        };
        let mapped = bar.map(&self.space, target, address)?;
        if let Some(slot) = self.mapped().get_mut(index.index()) {
            *slot = Some(mapped);
        }
        Ok(())
    }

    fn unmap(&self, index: BarIndex) {
        if let Some(slot) = self.mapped().get_mut(index.index()) {
            *slot = None;
        }
    }
}

impl Bar {
    fn map(&self, space: &Arc<Space>, target: Target, address: u64) -> Result<Mapped, Cause> {
        let BarSpec { kind, size } = self.spec;
        if !space.windows.contain(&self.spec, address) {
            return Err(BarError::OutsideWindows {
                bar: target.bar,
                address,
                size,
            }
            .into());
        }
        let bus = if kind == BarKind::Io {
            &space.ports
        } else {
            &space.memory
        };
        let endpoint = target.endpoint.clone();
        bus.insert(address..=address + (size - 1), Arc::new(target))?;
        let range = BusRange {
            bus: bus.clone(),
            start: address,
        };
        let add_slot = |area: &Area| {
            let memory = DeviceMemory {
                mapping: area.mapping.clone(),
                endpoint: endpoint.clone(),
            };
            let address = address + area.offset;
            space.slots.add(address, Arc::new(memory), area.readonly)
        };
        let slots = self.areas.iter().map(add_slot).collect::<Result<_, _>>()?;
        let doorbells = self
            .doorbells
            .iter()
            .map(|doorbell| InstalledDoorbell::new(space, kind, address, doorbell))
            .collect::<Result<_, _>>()?;
        Ok(Mapped {
            _slots: slots,
            _doorbells: doorbells,
            _range: range,
        })
    }
}

impl Area {
    fn new(bar: BarIndex, area: &MappableArea, readonly: bool) -> Result<Self, BarError> {
        let offset = area.offset;
        let file: File = area
            .file
            .as_fd()
            .try_clone_to_owned()
            .map_err(|source| BarError::File {
                bar,
                offset,
                source,
            })?
            .into();
        let prot = if readonly {
            libc::PROT_READ
        } else {
            libc::PROT_READ | libc::PROT_WRITE
        };
        let too_long = BarError::Area {
            bar,
            offset,
            source: vm_memory::mmap::MmapRegionError::InvalidOffsetLength,
        };
        let mapping = MmapRegionBuilder::new(usize::try_from(area.size).map_err(|_| too_long)?)
            .with_file_offset(FileOffset::new(file, area.file_offset))
            .with_mmap_prot(prot)
            .with_mmap_flags(libc::MAP_SHARED)
            .build()
            .map_err(|source| BarError::Area {
                bar,
                offset,
                source,
            })?;
        Ok(Self {
            offset,
            readonly,
            mapping: Arc::new(mapping),
        })
    }
}

/// Memory of a device, which the guest reaches without an exit.
struct DeviceMemory {
    mapping: Arc<MmapRegion>,
    endpoint: Weak<Passthrough>,
}

impl HostMemory for DeviceMemory {
    fn address(&self) -> *mut u8 {
        self.mapping.as_ptr()
    }

    fn size(&self) -> u64 {
        self.mapping.size() as u64
    }

    fn why_missing(&self, touched: bool) -> Option<&'static str> {
        let file = self.mapping.file_offset()?;
        let metadata = file.file().metadata().ok()?;
        if !metadata.is_file() {
            // A device of the host, which has been switched off under the guest.
            return touched.then_some("its memory does not answer");
        }
        let is_truncated = metadata.len() < file.start() + self.size();
        is_truncated.then_some("the file behind its memory was truncated")
    }

    fn lose(&self, why: &'static str) {
        if let Some(endpoint) = self.endpoint.upgrade() {
            endpoint.give_up(&why);
        }
    }
}

/// What the bus calls for a BAR.
#[derive(Debug)]
struct Target {
    endpoint: Weak<Passthrough>,
    bar: BarIndex,
}

impl BusDevice for Target {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match self.endpoint.upgrade() {
            Some(endpoint) => endpoint.bar_read(self.bar, offset, data),
            None => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some(endpoint) = self.endpoint.upgrade() {
            endpoint.bar_write(self.bar, offset, data);
        }
    }
}

/// A range on a bus, taken off on drop.
#[derive(Debug)]
struct BusRange {
    bus: Arc<Bus>,
    start: u64,
}

impl Drop for BusRange {
    fn drop(&mut self) {
        self.bus.remove(self.start);
    }
}

/// An ioeventfd, taken away on drop.
#[derive(Debug)]
struct InstalledDoorbell {
    space: Arc<Space>,
    doorbell: Doorbell,
    when: IoEvent,
}

impl InstalledDoorbell {
    fn new(
        space: &Arc<Space>,
        kind: BarKind,
        address: u64,
        doorbell: &Doorbell,
    ) -> std::io::Result<Self> {
        let when = IoEvent {
            address: address + doorbell.offset,
            width: doorbell.width,
            value: doorbell.value,
            port: kind == BarKind::Io,
        };
        ioeventfd(&space.vm, doorbell.event.as_fd(), &when, true)?;
        Ok(Self {
            space: space.clone(),
            doorbell: doorbell.clone(),
            when,
        })
    }
}

impl Drop for InstalledDoorbell {
    fn drop(&mut self) {
        if let Err(error) = ioeventfd(
            &self.space.vm,
            self.doorbell.event.as_fd(),
            &self.when,
            false,
        ) {
            log::warn!(
                "cannot take the doorbell at {:#x} away: {error}",
                self.when.address
            );
        }
    }
}
