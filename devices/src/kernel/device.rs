//! A device of the host.

use std::fmt;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use rustix::event::{EventfdFlags, eventfd};
use vfio_bindings::bindings::vfio::{
    VFIO_DEVICE_FLAGS_PCI, VFIO_IRQ_INFO_AUTOMASKED, VFIO_IRQ_INFO_NORESIZE,
    VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_IRQ_SET_ACTION_UNMASK, VFIO_PCI_ERR_IRQ_INDEX,
    VFIO_PCI_REQ_IRQ_INDEX, VFIO_REGION_INFO_FLAG_MMAP, VFIO_REGION_INFO_FLAG_WRITE,
};

use super::file::DeviceFile;
use super::info::RegionDescription;
use super::interrupts::{self, Vectors};
use super::migration::KernelMigration;
use super::{Hold, KernelError, Opened, ioctls, reset};
use crate::backend::{
    Backend, BackendError, Doorbell, Irq, IrqInfo, MappableArea, MessageControl, Region, RegionInfo,
};
use crate::handover::Handover;
use crate::migration::Migration;

/// The regions that every PCI device has (`VFIO_PCI_BAR0_REGION_INDEX` to `VFIO_PCI_CONFIG_REGION_INDEX`).
const REGIONS: u32 = 8;

/// A device of the host, as the kernel's VFIO gives it.
pub struct KernelDevice {
    name: String,
    file: SharedFile,
    regions: Vec<RegionDescription>,
    /// What the ids are if the hardware does not tell: a virtual function reads as all-ones.
    ids: Option<(u16, u16)>,
    vectors: Mutex<Vectors>,
    migration: Option<KernelMigration>,
    notices: Notices,
    // After the device.
    hold: Hold,
}

/// The device itself, until it is given back.
#[derive(Debug, Clone)]
pub(super) struct SharedFile(Arc<RwLock<Option<DeviceFile>>>);

impl SharedFile {
    /// Calls `with` with the device, unless it has been given back.
    pub(super) fn with<R>(
        &self,
        with: impl FnOnce(&File) -> Result<R, KernelError>,
    ) -> Result<R, BackendError> {
        let file = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let file: &DeviceFile = file.as_ref().ok_or(KernelError::Closed)?;
        Ok(with(file)?)
    }

    fn is_closed(&self) -> bool {
        let file = self.0.read().unwrap_or_else(PoisonError::into_inner);
        file.is_none()
    }

    fn close(&self) {
        let file = self
            .0
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        // What the kernel does about it keeps nobody waiting.
        drop(file);
    }
}

/// What the host has to say of a device, as events.
#[derive(Debug)]
pub struct Notices {
    /// The device reported an error that it does not recover from.
    pub failed: OwnedFd,
    /// The host wants the device back.
    pub wanted_back: OwnedFd,
}

impl KernelDevice {
    /// Takes a device that was opened. `name` names it in the log; `ids` are the vendor's and the device's, as sysfs
    /// shows them, if it does.
    pub fn new(name: &str, opened: Opened, ids: Option<(u16, u16)>) -> Result<Self, KernelError> {
        let device = opened.file.as_fd();
        let flags =
            ioctls::device_flags(device).map_err(KernelError::step("describe the device"))?;
        if flags & VFIO_DEVICE_FLAGS_PCI == 0 {
            return Err(KernelError::NotPci);
        }
        let regions = (0..REGIONS)
            .map(|index| describe_region(device, index))
            .collect::<Result<_, _>>()?;
        let msix = describe_irq(device, Irq::Msix.index())?;
        let notices = Notices::new(device)?;
        let Opened { file, hold } = opened;
        let file = SharedFile(Arc::new(RwLock::new(Some(file))));
        Ok(Self {
            name: name.to_owned(),
            migration: KernelMigration::new(file.clone()),
            file,
            regions,
            ids,
            vectors: Mutex::new(Vectors::new(msix.flags & VFIO_IRQ_INFO_NORESIZE != 0)),
            notices,
            hold,
        })
    }

    /// What the host has to say.
    pub fn notices(&self) -> &Notices {
        &self.notices
    }

    /// Calls `with` with the device, unless it has been given back.
    fn with<R>(
        &self,
        with: impl FnOnce(&File) -> Result<R, KernelError>,
    ) -> Result<R, BackendError> {
        self.file.with(with)
    }

    /// Where an access is in the device's file.
    fn position(&self, region: Region, offset: u64, length: usize) -> Result<u64, KernelError> {
        let description = self.regions.get(region.index() as usize);
        let description = description.ok_or(KernelError::Outside)?;
        let end = offset.checked_add(length as u64);
        if end.is_none_or(|end| end > description.size) {
            return Err(KernelError::Outside);
        }
        let position = description.offset.checked_add(offset);
        position.ok_or(KernelError::Outside)
    }

    fn vectors(&self) -> std::sync::MutexGuard<'_, Vectors> {
        self.vectors.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Backend for KernelDevice {
    fn region(&self, region: Region) -> Result<RegionInfo, BackendError> {
        let description = self.regions.get(region.index() as usize);
        let description = description.cloned().unwrap_or_default();
        let areas = if description.flags & VFIO_REGION_INFO_FLAG_MMAP == 0 {
            Vec::new()
        } else {
            let all = vec![(0, description.size)];
            description.sparse.unwrap_or(all)
        };
        let areas = self.with(|file| {
            let file = file
                .try_clone()
                .map_err(KernelError::step("give this process one more descriptor"))?;
            let file = Arc::new(OwnedFd::from(file));
            let area = |(offset, size)| MappableArea {
                offset,
                size,
                file: Arc::clone(&file),
                file_offset: description.offset.saturating_add(offset),
            };
            Ok(areas.into_iter().map(area).collect())
        })?;
        Ok(RegionInfo {
            size: description.size,
            writable: description.flags & VFIO_REGION_INFO_FLAG_WRITE != 0,
            areas,
        })
    }

    fn read(&self, region: Region, offset: u64, data: &mut [u8]) -> Result<(), BackendError> {
        let position = self.position(region, offset, data.len())?;
        self.with(|file| {
            file.read_exact_at(data, position)
                .map_err(KernelError::step("read from the device"))
        })?;
        if let (Region::Config, Some(ids)) = (region, self.ids) {
            show_ids(ids, offset, data);
        }
        Ok(())
    }

    fn write(&self, region: Region, offset: u64, data: &[u8]) -> Result<(), BackendError> {
        let position = self.position(region, offset, data.len())?;
        self.with(|file| {
            file.write_all_at(data, position)
                .map_err(KernelError::step("write to the device"))
        })
    }

    /// The kernel has the hardware do it at once.
    fn post(&self, region: Region, offset: u64, data: &[u8]) -> Result<(), BackendError> {
        self.write(region, offset, data)
    }

    fn irq(&self, irq: Irq) -> Result<IrqInfo, BackendError> {
        self.with(|file| {
            let info = describe_irq(file.as_fd(), irq.index())?;
            Ok(IrqInfo {
                count: info.count,
                automasked: info.flags & VFIO_IRQ_INFO_AUTOMASKED != 0,
            })
        })
    }

    fn arm(&self, irq: Irq, first: u16, events: &[BorrowedFd<'_>]) -> Result<(), BackendError> {
        self.with(|file| match irq {
            Irq::Msix => self.vectors().arm(file.as_fd(), first, events),
            Irq::Intx | Irq::Msi => interrupts::arm(file.as_fd(), irq, first, events),
        })
    }

    fn disarm(&self, irq: Irq) -> Result<(), BackendError> {
        self.with(|file| match irq {
            Irq::Msix => self.vectors().disarm(file.as_fd()),
            Irq::Intx | Irq::Msi => interrupts::disarm(file.as_fd(), irq),
        })
    }

    fn unmask(&self, irq: Irq) -> Result<(), BackendError> {
        self.with(|file| {
            ioctls::set_irqs(file.as_fd(), VFIO_IRQ_SET_ACTION_UNMASK, irq.index(), 1)
                .map_err(KernelError::step("unmask the device's interrupt"))
        })
    }

    fn unmask_on(&self, irq: Irq, event: BorrowedFd<'_>) -> Result<(), BackendError> {
        let (action, events) = (VFIO_IRQ_SET_ACTION_UNMASK, [Some(event)]);
        self.with(|file| {
            ioctls::set_irq_events(file.as_fd(), action, irq.index(), 0, &events)
                .map(drop)
                .map_err(KernelError::step(
                    "unmask the device's interrupt by an event",
                ))
        })
    }

    /// What a write to a device of the host means is the hardware's own affair.
    fn doorbells(&self, _: Region) -> Result<Vec<Doorbell>, BackendError> {
        Ok(Vec::new())
    }

    fn reset(&self) -> Result<(), BackendError> {
        self.with(|file| {
            // Neither decoding nor DMA, whatever the way of resetting it leaves.
            if let Ok(position) = self.position(Region::Config, pci::header::COMMAND.into(), 2) {
                file.write_all_at(&[0; 2], position)
                    .map_err(KernelError::step("write to the device"))?;
            }
            reset::reset(&self.name, file.as_fd(), &self.hold)
        })?;
        if let Some(migration) = &self.migration {
            migration.forget();
        }
        Ok(())
    }

    fn message_control(&self) -> MessageControl {
        MessageControl::Arming
    }

    /// What the driver keeps of the device is tied to the process that has opened it.
    fn handover(&self) -> Option<&dyn Handover> {
        None
    }

    fn migration(&self) -> Option<&dyn Migration> {
        self.migration
            .as_ref()
            .map(|migration| migration as &dyn Migration)
    }

    /// Its registers are reached by system calls, of which the endpoint counts what there is to count.
    fn counters(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }

    fn is_lost(&self) -> bool {
        self.file.is_closed()
    }

    fn close(&self) {
        if let Some(migration) = &self.migration {
            migration.forget();
        }
        self.file.close();
    }
}

impl Drop for KernelDevice {
    fn drop(&mut self) {
        if !self.is_lost()
            && let Err(error) = self.reset()
        {
            log::warn!("{}: it is given back as it is: {error}", self.name);
        }
        self.close();
    }
}

impl fmt::Debug for KernelDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KernelDevice")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

impl Notices {
    /// Has the host signal what it has to say; a device that is not known to fail, or is nobody else's, never does.
    fn new(device: BorrowedFd<'_>) -> Result<Self, KernelError> {
        let notice = |index: u32| {
            let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
                .map_err(|errno| KernelError::step("make an event")(errno.into()))?;
            if describe_irq(device, index)?.count > 0 {
                let events = [Some(event.as_fd())];
                ioctls::set_irq_events(device, VFIO_IRQ_SET_ACTION_TRIGGER, index, 0, &events)
                    .map_err(KernelError::step("tell of the device's errors"))?;
            }
            Ok(event)
        };
        Ok(Self {
            failed: notice(VFIO_PCI_ERR_IRQ_INDEX)?,
            wanted_back: notice(VFIO_PCI_REQ_IRQ_INDEX)?,
        })
    }
}

/// Puts the ids into what was read from configuration space, where it has all-ones for them.
fn show_ids((vendor, device): (u16, u16), offset: u64, data: &mut [u8]) {
    let [low, high] = vendor.to_le_bytes();
    let [device_low, device_high] = device.to_le_bytes();
    let ids = (0..).zip([low, high, device_low, device_high]);
    for (at, id) in ids {
        let place = usize::try_from(at - i128::from(offset)).ok();
        if let Some(byte) = place.and_then(|place| data.get_mut(place))
            && *byte == 0xff
        {
            *byte = id;
        }
    }
}

/// A region; one that the device does not have is empty.
fn describe_region(device: BorrowedFd<'_>, index: u32) -> Result<RegionDescription, KernelError> {
    match ioctls::region_info(device, index) {
        Ok(bytes) => Ok(RegionDescription::parse(&bytes)),
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            Ok(RegionDescription::default())
        }
        Err(error) => Err(KernelError::step("describe a region of the device")(error)),
    }
}

/// A kind of interrupt; one that the device does not have has no vectors.
fn describe_irq(
    device: BorrowedFd<'_>,
    index: u32,
) -> Result<vfio_bindings::bindings::vfio::vfio_irq_info, KernelError> {
    match ioctls::irq_info(device, index) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(Default::default()),
        info => info.map_err(KernelError::step("describe the device's interrupts")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_that_a_virtual_function_does_not_tell_are_shown() {
        let read = |offset: u64, mut data: [u8; 4], length: usize| {
            show_ids((0x8086, 0x10ca), offset, &mut data[..length]);
            data
        };
        let all_ones = [0xff; 4];
        assert_eq!(read(0, all_ones, 4), [0x86, 0x80, 0xca, 0x10]);
        assert_eq!(read(1, all_ones, 1), [0x80, 0xff, 0xff, 0xff]);
        assert_eq!(read(2, all_ones, 4), [0xca, 0x10, 0xff, 0xff]);
        assert_eq!(read(4, all_ones, 4), all_ones);
        let told = [0x52, 0x4f, 0x34, 0x12];
        assert_eq!(read(0, told, 4), told);
    }
}
