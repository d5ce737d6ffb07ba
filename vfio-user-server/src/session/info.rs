//! What the device is: the commands that ask.

use std::os::fd::AsFd;
use std::sync::Arc;

use rustix::io::Errno;
use vfio_user_protocol::{
    DeviceFlags, DeviceInfo, IoFd, IoFdFlags, IrqInfo, Limits, RegionFlags, RegionInfo,
    RegionIoFds, SparseArea, encode_io_fds, encode_sparse_areas,
};

use super::{Session, parse};
use crate::device::Device;
use crate::function::IRQS;

/// Number of regions: the BARs, the ROM, configuration space and VGA (`VFIO_PCI_NUM_REGIONS` of `linux/vfio.h`).
pub(super) const REGIONS: u32 = 9;

impl<D: Device> Session<'_, D> {
    pub(super) fn device_info(&mut self, payload: &[u8]) -> Result<(), Errno> {
        let (query, _) = parse::<DeviceInfo>(payload)?;
        let argsz = DeviceInfo::query().argsz;
        if query.argsz < argsz {
            return Err(Errno::INVAL);
        }
        self.reply.push(&DeviceInfo {
            argsz,
            flags: (DeviceFlags::PCI | DeviceFlags::RESET).bits(),
            num_regions: REGIONS,
            num_irqs: IRQS,
        });
        Ok(())
    }

    pub(super) fn region_info(&mut self, payload: &[u8], limits: &Limits) -> Result<(), Errno> {
        let (query, _) = parse::<RegionInfo>(payload)?;
        let least = u32::try_from(size_of::<RegionInfo>()).map_err(|_| Errno::INVAL)?;
        if query.index >= REGIONS || query.argsz < least {
            return Err(Errno::INVAL);
        }
        let size = self.core.region_size(query.index);
        let access = RegionFlags::READ | RegionFlags::WRITE;
        let info = RegionInfo {
            argsz: least,
            flags: if size == 0 { 0 } else { access.bits() },
            index: query.index,
            cap_offset: 0,
            size,
            offset: 0,
        };
        let bar = self
            .core
            .bar(query.index)
            .filter(|_| limits.max_msg_fds > 0);
        let Some((bar, file)) = bar.and_then(|bar| Some((bar, bar.file()?))) else {
            self.reply.push(&info);
            return Ok(());
        };
        let areas: Vec<_> = bar
            .areas()
            .iter()
            .map(|area| SparseArea {
                offset: area.start,
                size: area.end - area.start,
            })
            .collect();
        let reply = &mut self.reply;
        encode_sparse_areas(&info, &areas, query.argsz, &mut reply.payload);
        if reply.payload.len() > size_of::<RegionInfo>() {
            let file: Arc<dyn AsFd> = Arc::<std::fs::File>::clone(file);
            reply.fds.push(file);
        }
        Ok(())
    }

    /// Lists the doorbells of a region, as many as the client takes descriptors. The others ring by messages.
    pub(super) fn region_io_fds(&mut self, payload: &[u8], limits: &Limits) -> Result<(), Errno> {
        let (query, _) = parse::<RegionIoFds>(payload)?;
        let least = u32::try_from(size_of::<RegionIoFds>()).map_err(|_| Errno::INVAL)?;
        if query.index >= REGIONS || query.argsz < least {
            return Err(Errno::INVAL);
        }
        let index = usize::try_from(query.index).map_err(|_| Errno::INVAL)?;
        let is_io = self.core.bar(query.index).is_some_and(|bar| bar.is_io());
        let mut entries = Vec::new();
        let mut fds: Vec<Arc<dyn AsFd>> = Vec::new();
        let doorbells = self.core.host.doorbells.in_bar(index);
        for (fd_index, (doorbell, event)) in (0..).zip(doorbells.take(limits.max_msg_fds)) {
            let mut flags = IoFdFlags::empty();
            flags.set(IoFdFlags::DATAMATCH, doorbell.value.is_some());
            flags.set(IoFdFlags::PIO, is_io);
            entries.push(IoFd {
                offset: doorbell.offset,
                size: doorbell.size.into(),
                fd_index,
                kind: IoFd::EVENTFD,
                flags: flags.bits(),
                datamatch: doorbell.value.unwrap_or(0),
            });
            fds.push(Arc::<std::os::fd::OwnedFd>::clone(event));
        }
        let reply = &mut self.reply;
        encode_io_fds(query.index, &entries, query.argsz, &mut reply.payload);
        if reply.payload.len() > size_of::<RegionIoFds>() {
            reply.fds = fds;
        }
        Ok(())
    }

    pub(super) fn irq_info(&mut self, payload: &[u8]) -> Result<(), Errno> {
        let (query, _) = parse::<IrqInfo>(payload)?;
        let argsz = IrqInfo::query(0).argsz;
        if query.argsz < argsz {
            return Err(Errno::INVAL);
        }
        let info = self.core.function.irq_info(query.index);
        let (count, flags) = info.ok_or(Errno::INVAL)?;
        self.reply.push(&IrqInfo {
            argsz,
            flags: flags.bits(),
            index: query.index,
            count,
        });
        Ok(())
    }
}
