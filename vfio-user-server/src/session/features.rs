//! `DEVICE_FEATURE`, and migration data.

use rustix::io::Errno;
use vfio_user_protocol::{
    DeviceState, Feature, FeatureFlags, FeatureId, LoggingRange, LoggingReport, LoggingStart,
    MigrationData, MigrationState,
};
use zerocopy::{FromBytes, IntoBytes};

use super::{Session, parse, size};
use crate::device::Device;
use crate::dirty;
use crate::migration;
use crate::reader::MAX_DATA;

/// Largest log that is reported at once, in bytes: that of 2 TiB of memory in pages of 4 KiB.
const MAX_REPORT: u64 = 64 << 20;

impl<D: Device> Session<'_, D> {
    pub(super) fn feature(&mut self, payload: &[u8]) -> Result<(), Errno> {
        const ID: u32 = 0xffff;
        let (head, data) = parse::<Feature>(payload)?;
        let id = feature_id(head.flags & ID).ok_or(Errno::NOTTY)?;
        let flags = FeatureFlags::from_bits(head.flags & !ID).ok_or(Errno::INVAL)?;
        if matches!(id, FeatureId::Migration | FeatureId::MigrationState)
            && migration::flags(&mut self.core.device).is_none()
        {
            return Err(Errno::NOTTY);
        }
        let wanted = flags - FeatureFlags::PROBE;
        if wanted.is_empty() || !operations(id).contains(wanted) {
            return Err(Errno::INVAL);
        }
        if flags.contains(FeatureFlags::PROBE) {
            self.reply.payload.extend_from_slice(payload);
            return Ok(());
        }
        if wanted == FeatureFlags::GET {
            self.get_feature(id, &head, data)
        } else if wanted == FeatureFlags::SET {
            self.set_feature(id, data)?;
            if id != FeatureId::DmaLoggingStart {
                self.reply.payload.extend_from_slice(payload);
                return Ok(());
            }
            self.reply_to_start(&head, data)
        } else {
            Err(Errno::INVAL)
        }
    }

    fn get_feature(&mut self, id: FeatureId, head: &Feature, data: &[u8]) -> Result<(), Errno> {
        match id {
            FeatureId::Migration => {
                let flags = migration::flags(&mut self.core.device).ok_or(Errno::NOTTY)?;
                self.reply_with(head, flags.bits().as_bytes())
            }
            FeatureId::MigrationState => {
                let state = MigrationState {
                    state: self.core.machine.state() as u32,
                    data_fd: 0,
                };
                self.reply_with(head, state.as_bytes())
            }
            FeatureId::DmaLoggingReport => self.report(head, data),
            FeatureId::DmaLoggingStart | FeatureId::DmaLoggingStop => Err(Errno::INVAL),
        }
    }

    fn set_feature(&mut self, id: FeatureId, data: &[u8]) -> Result<(), Errno> {
        match id {
            FeatureId::MigrationState => {
                let (state, _) = parse::<MigrationState>(data)?;
                let state = DeviceState::try_from(state.state).map_err(|_| Errno::INVAL)?;
                self.core.set_state(state)
            }
            FeatureId::DmaLoggingStart => {
                let (start, ranges) = parse::<LoggingStart>(data)?;
                let ranges = <[LoggingRange]>::ref_from_bytes(ranges).map_err(|_| Errno::INVAL)?;
                let count = usize::try_from(start.num_ranges).map_err(|_| Errno::INVAL)?;
                let in_space =
                    |range: &LoggingRange| range.iova.checked_add(range.length).is_some();
                if count != ranges.len()
                    || !start.page_size.is_power_of_two()
                    || !ranges.iter().all(in_space)
                {
                    return Err(Errno::INVAL);
                }
                // More than was asked for is logged: all of memory.
                self.core.host.memory.log().start();
                Ok(())
            }
            FeatureId::DmaLoggingStop => {
                self.core.host.memory.log().stop();
                Ok(())
            }
            FeatureId::Migration | FeatureId::DmaLoggingReport => Err(Errno::INVAL),
        }
    }

    /// Tells how many bytes a bit of the log stands for.
    fn reply_to_start(&mut self, head: &Feature, data: &[u8]) -> Result<(), Errno> {
        let (start, ranges) = parse::<LoggingStart>(data)?;
        self.reply.push(head);
        self.reply.push(&LoggingStart {
            page_size: start.page_size.max(dirty::PAGE_SIZE),
            ..start
        });
        self.reply.payload.extend_from_slice(ranges);
        Ok(())
    }

    fn report(&mut self, head: &Feature, data: &[u8]) -> Result<(), Errno> {
        let (report, _) = parse::<LoggingReport>(data)?;
        let LoggingReport {
            iova,
            length,
            page_size,
        } = report;
        let log = self.core.host.memory.log();
        let in_space = length > 0 && iova.checked_add(length).is_some();
        if !log.is_on() || !in_space || !page_size.is_power_of_two() {
            return Err(Errno::INVAL);
        }
        let words = length.div_ceil(page_size).div_ceil(64);
        let fixed = (size_of::<Feature>() + size_of::<LoggingReport>()) as u64;
        // A reply without its log would look like a clean one, so there is none.
        let bytes = words
            .checked_mul(8)
            .filter(|bytes| *bytes <= MAX_REPORT && fixed + bytes <= u64::from(head.argsz));
        let bytes = bytes.ok_or(Errno::NOSPC)?;
        let words = usize::try_from(bytes / 8).map_err(|_| Errno::NOSPC)?;
        let mut bitmap = vec![0_u64; words];
        log.report(iova, length, page_size, &mut bitmap);
        self.reply.push(&Feature {
            argsz: size(size_of::<Feature>() + size_of::<LoggingReport>() + 8 * words)?,
            ..*head
        });
        self.reply.push(&report);
        self.reply.payload.extend_from_slice(bitmap.as_bytes());
        Ok(())
    }

    /// Replies with the data of a feature, for which there has to be room.
    fn reply_with(&mut self, head: &Feature, data: &[u8]) -> Result<(), Errno> {
        let argsz = size(size_of::<Feature>() + data.len())?;
        if head.argsz < argsz {
            return Err(Errno::INVAL);
        }
        self.reply.push(&Feature { argsz, ..*head });
        self.reply.payload.extend_from_slice(data);
        Ok(())
    }

    pub(super) fn migration_read(&mut self, payload: &[u8]) -> Result<(), Errno> {
        let (request, _) = parse::<MigrationData>(payload)?;
        let wanted = usize::try_from(request.size).map_err(|_| Errno::INVAL)?;
        let needed = MigrationData::new(request.size).argsz;
        if wanted > MAX_DATA || request.argsz < needed {
            return Err(Errno::INVAL);
        }
        let start = size_of::<MigrationData>();
        let reply = &mut self.reply.payload;
        reply.resize(start + wanted, 0);
        let data = reply.get_mut(start..).unwrap_or(&mut []);
        let count = self.core.read_state(data)?;
        reply.truncate(start + count);
        let head = MigrationData::new(size(count)?);
        if let Some(bytes) = reply.get_mut(..start) {
            bytes.copy_from_slice(head.as_bytes());
        }
        Ok(())
    }

    pub(super) fn migration_write(&mut self, payload: &[u8]) -> Result<(), Errno> {
        let (request, data) = parse::<MigrationData>(payload)?;
        if data.len() > MAX_DATA || u64::from(request.size) != data.len() as u64 {
            return Err(Errno::INVAL);
        }
        self.core.write_state(data)
    }
}

fn feature_id(number: u32) -> Option<FeatureId> {
    Some(match number {
        1 => FeatureId::Migration,
        2 => FeatureId::MigrationState,
        6 => FeatureId::DmaLoggingStart,
        7 => FeatureId::DmaLoggingStop,
        8 => FeatureId::DmaLoggingReport,
        _ => return None,
    })
}

/// What can be done with a feature.
fn operations(id: FeatureId) -> FeatureFlags {
    match id {
        FeatureId::Migration | FeatureId::DmaLoggingReport => FeatureFlags::GET,
        FeatureId::MigrationState => FeatureFlags::GET | FeatureFlags::SET,
        FeatureId::DmaLoggingStart | FeatureId::DmaLoggingStop => FeatureFlags::SET,
    }
}
