//! Guest memory: `DMA_MAP` and `DMA_UNMAP`.

use std::os::fd::OwnedFd;

use rustix::io::Errno;
use vfio_user_protocol::{DmaMap, DmaUnmap, DmaUnmapFlags, Limits};

use super::{Session, parse};
use crate::device::Device;

impl<D: Device> Session<'_, D> {
    pub(super) fn dma_map(
        &mut self,
        payload: &[u8],
        mut fds: Vec<OwnedFd>,
        limits: &Limits,
    ) -> Result<(), Errno> {
        let (request, _) = parse::<DmaMap>(payload)?;
        let file = fds.pop();
        if !fds.is_empty() {
            return Err(Errno::INVAL);
        }
        let sealed = self.core.options.sealed_memory;
        let memory = &self.core.host.memory;
        memory.map_region(&request, file, limits.max_dma_maps, sealed)?;
        self.core.device.memory_changed();
        Ok(())
    }

    pub(super) fn dma_unmap(&mut self, payload: &[u8]) -> Result<(), Errno> {
        let (request, _) = parse::<DmaUnmap>(payload)?;
        let memory = &self.core.host.memory;
        let flags = DmaUnmapFlags::from_bits(request.flags).ok_or(Errno::INVAL)?;
        let removed = if flags == DmaUnmapFlags::ALL {
            if (request.address, request.size) != (0, 0) {
                return Err(Errno::INVAL);
            }
            memory.unmap_all()?
        } else if flags.is_empty() {
            memory.unmap_region(request.address, request.size)?
        } else {
            // The bitmap that only libvfio-user has. The log does not lose what is unmapped.
            return Err(Errno::INVAL);
        };
        self.core.device.memory_changed();
        let limit = self.core.options.unmap_deadline;
        self.core.host.memory.released(removed, limit)?;
        self.reply.push(&request);
        Ok(())
    }
}
