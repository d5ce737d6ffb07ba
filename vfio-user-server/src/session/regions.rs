//! `REGION_READ`, `REGION_WRITE` and `REGION_WRITE_MULTI`.

use rustix::io::Errno;
use vfio_user_protocol::{RegionAccess, RegionWrites, WriteMulti};
use zerocopy::FromBytes;

use super::{Session, parse};
use crate::device::Device;
use crate::reader::MAX_DATA;

impl<D: Device> Session<'_, D> {
    pub(super) fn region_read(&mut self, payload: &[u8]) -> Result<(), Errno> {
        let (access, _) = parse::<RegionAccess>(payload)?;
        let count = count(&access)?;
        self.reply.push(&access);
        let start = self.reply.payload.len();
        self.reply.payload.resize(start + count, 0);
        let data = self.reply.payload.get_mut(start..).unwrap_or(&mut []);
        self.core.read_region(access.region, access.offset, data)
    }

    pub(super) fn region_write(&mut self, payload: &[u8]) -> Result<(), Errno> {
        let (access, data) = parse::<RegionAccess>(payload)?;
        if data.len() != count(&access)? {
            return Err(Errno::INVAL);
        }
        self.reply.push(&access);
        self.core.write_region(access.region, access.offset, data)
    }

    /// Does the writes up to the first that fails, and says how many that were. If it is the first of all, that is an
    /// error.
    pub(super) fn region_write_multi(&mut self, payload: &[u8]) -> Result<(), Errno> {
        let (head, entries) = parse::<RegionWrites>(payload)?;
        let entries = <[WriteMulti]>::ref_from_bytes(entries).map_err(|_| Errno::INVAL)?;
        if head.count != entries.len() as u64 {
            return Err(Errno::INVAL);
        }
        let mut done = 0;
        for WriteMulti { access, data } in entries {
            let count = usize::try_from(access.count).unwrap_or(usize::MAX);
            let result = data.get(..count).ok_or(Errno::INVAL);
            match result.and_then(|data| self.core.write_region(access.region, access.offset, data))
            {
                Ok(()) => done += 1,
                Err(errno) if done == 0 => return Err(errno),
                Err(_) => break,
            }
        }
        self.reply.push(&RegionWrites { count: done });
        Ok(())
    }
}

/// The number of bytes of an access, if it is not more than is offered.
fn count(access: &RegionAccess) -> Result<usize, Errno> {
    let count = usize::try_from(access.count).map_err(|_| Errno::INVAL)?;
    if count > MAX_DATA {
        return Err(Errno::INVAL);
    }
    Ok(count)
}
