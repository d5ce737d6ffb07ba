//! Migration: the device's state, its data, and the log of what it writes.

use vfio_user_protocol::{
    Command, DeviceState, Feature, FeatureFlags, FeatureId, Header, LoggingRange, LoggingReport,
    LoggingStart, MigrationData, MigrationFlags, MigrationState, ProtocolError, take,
};
use zerocopy::{FromBytes, IntoBytes};

use crate::calls::Expected;
use crate::client::Client;
use crate::connection::{MAX_OUTGOING, Reply, Request};
use crate::error::ConnError;
use crate::reader::MAX_MESSAGE;

impl Client {
    /// How the device can migrate.
    ///
    /// # Errors
    ///
    /// [`ConnError::Refused`] if it cannot, and those that every call has.
    pub fn migration_flags(&self) -> Result<MigrationFlags, ConnError> {
        let reply = self.feature(FeatureId::Migration, FeatureFlags::GET, &[0; 8])?;
        let flags: u64 = self.feature_data(&reply)?.0;
        Ok(MigrationFlags::from_bits_retain(flags))
    }

    /// The device's state.
    ///
    /// # Errors
    ///
    /// [`ConnError::Refused`] if it has none, because it cannot migrate, and those that every call has.
    pub fn device_state(&self) -> Result<DeviceState, ConnError> {
        let reply = self.feature(FeatureId::MigrationState, FeatureFlags::GET, &[0; 8])?;
        let (state, _) = self.feature_data::<MigrationState>(&reply)?;
        DeviceState::try_from(state.state)
            .map_err(|source| self.bad_answer(Command::DeviceFeature, source))
    }

    /// Brings the device into a state, by way of others if need be.
    ///
    /// # Errors
    ///
    /// [`ConnError::Refused`] if that cannot be, and those that every call has. [`device_state`](Self::device_state)
    /// then says how far it came.
    pub fn set_device_state(&self, state: DeviceState) -> Result<(), ConnError> {
        let state = MigrationState {
            state: state as u32,
            data_fd: 0,
        };
        self.feature(
            FeatureId::MigrationState,
            FeatureFlags::SET,
            state.as_bytes(),
        )
        .map(drop)
    }

    /// Reads the next of the device's migration data into `data`, and returns how many bytes that was. Fewer than `data`
    /// has mean that there is no more for now: in `STOP_COPY` none at all, in `PRE_COPY` none yet.
    ///
    /// # Errors
    ///
    /// [`ConnError`], as for every call. Data that was read before the error is lost.
    pub fn migration_read(&self, data: &mut [u8]) -> Result<usize, ConnError> {
        let mut total = 0;
        for data in data.chunks_mut(self.migration_chunk()) {
            let count = self.migration_read_chunk(data)?;
            total += count;
            if count < data.len() {
                break;
            }
        }
        Ok(total)
    }

    /// Writes the next of the device's migration data.
    ///
    /// # Errors
    ///
    /// [`ConnError`], as for every call.
    pub fn migration_write(&self, data: &[u8]) -> Result<(), ConnError> {
        for data in data.chunks(self.migration_chunk()) {
            let head = MigrationData::new(size(data.len())?);
            let request = Request {
                command: Command::MigDataWrite,
                head: head.as_bytes(),
                data,
                fds: &[],
                expected: Expected { payload: 0, fds: 0 },
            };
            self.call(&request, self.deadlines.migration)?;
        }
        Ok(())
    }

    /// Starts to log what the device writes to guest memory by itself, and returns how many bytes a bit of the log
    /// stands for. What it writes through [`GuestDma`](crate::GuestDma) is not in the server's log.
    ///
    /// `page_size` is what the caller would like, in bytes; no `ranges` mean all that is mapped.
    ///
    /// # Errors
    ///
    /// [`ConnError::Limit`] for more than two thousand ranges, and those that every call has.
    pub fn start_dma_logging(
        &self,
        page_size: u64,
        ranges: &[LoggingRange],
    ) -> Result<u64, ConnError> {
        let start = LoggingStart {
            page_size,
            num_ranges: size(ranges.len())?,
            reserved: 0,
        };
        let data = [start.as_bytes(), ranges.as_bytes()].concat();
        let reply = self.feature(FeatureId::DmaLoggingStart, FeatureFlags::SET, &data)?;
        let (start, _) = self.feature_data::<LoggingStart>(&reply)?;
        if !start.page_size.is_power_of_two() {
            let source = ProtocolError::Count {
                count: start.page_size,
                expected: page_size,
            };
            return Err(self.bad_answer(Command::DeviceFeature, source));
        }
        Ok(start.page_size)
    }

    /// Stops logging.
    ///
    /// # Errors
    ///
    /// [`ConnError`], as for every call.
    pub fn stop_dma_logging(&self) -> Result<(), ConnError> {
        self.feature(FeatureId::DmaLoggingStop, FeatureFlags::SET, &[])
            .map(drop)
    }

    /// Reads and clears the log of `length` bytes from `iova`: a bit for each page, from the lowest bit of the first
    /// word on.
    ///
    /// libvfio-user wants the range to begin where a mapping does and to lie in it, and `page_size`, in bytes, to be
    /// what [`start_dma_logging`](Self::start_dma_logging) returned.
    ///
    /// # Errors
    ///
    /// [`ConnError::Limit`] if the log would be longer than 64 MiB, and those that every call has. An answer without a
    /// log, which some servers send for what they do not log, is [`ConnError::Answer`] and must not be taken for clean.
    pub fn dma_log(&self, iova: u64, length: u64, page_size: u64) -> Result<Vec<u64>, ConnError> {
        let pages = length
            .checked_next_multiple_of(page_size)
            .and_then(|length| length.checked_div(page_size))
            .ok_or(ConnError::Limit("pages have no size"))?;
        let words = usize::try_from(pages.div_ceil(64)).unwrap_or(usize::MAX);
        let room = words
            .checked_mul(8)
            .filter(|room| *room <= MAX_MESSAGE - (4 << 10))
            .ok_or(ConnError::Limit("the log would be too long"))?;
        let report = LoggingReport {
            iova,
            length,
            page_size,
        };
        let size = size(size_of::<Feature>() + size_of::<LoggingReport>() + room)?;
        let head = Feature::new(FeatureId::DmaLoggingReport, FeatureFlags::GET, size);
        let request = Request {
            command: Command::DeviceFeature,
            head: head.as_bytes(),
            data: report.as_bytes(),
            fds: &[],
            expected: Expected {
                payload: size_of::<Feature>() + size_of::<LoggingReport>() + room,
                fds: 0,
            },
        };
        let reply = self.call(&request, self.deadlines.migration)?;
        let (_, bitmap) = self.feature_data::<LoggingReport>(&reply)?;
        if bitmap.len() != room {
            let source = ProtocolError::Count {
                count: bitmap.len() as u64,
                expected: room as u64,
            };
            return Err(self.bad_answer(Command::DeviceFeature, source));
        }
        let (bitmap, _) = bitmap.as_chunks();
        Ok(bitmap
            .iter()
            .map(|word| u64::from_ne_bytes(*word))
            .collect())
    }

    /// Gets or sets a feature, whose data is `data` or as long as that.
    fn feature(
        &self,
        id: FeatureId,
        flags: FeatureFlags,
        data: &[u8],
    ) -> Result<Reply<'_>, ConnError> {
        let payload = size_of::<Feature>() + data.len();
        let head = Feature::new(id, flags, size(payload)?);
        let request = Request {
            command: Command::DeviceFeature,
            head: head.as_bytes(),
            data,
            fds: &[],
            expected: Expected { payload, fds: 0 },
        };
        self.call(&request, self.deadlines.migration)
    }

    /// The data of a feature from a reply, and what follows it.
    fn feature_data<'a, T: FromBytes>(
        &self,
        reply: &'a Reply<'_>,
    ) -> Result<(T, &'a [u8]), ConnError> {
        take::<Feature>(&reply.payload)
            .and_then(|(_, data)| take(data))
            .map_err(|source| self.bad_answer(Command::DeviceFeature, source))
    }

    fn migration_read_chunk(&self, data: &mut [u8]) -> Result<usize, ConnError> {
        let max = data.len() as u64;
        let head = MigrationData::new(size(data.len())?);
        let request = Request {
            command: Command::MigDataRead,
            head: head.as_bytes(),
            data: &[],
            fds: &[],
            expected: Expected {
                payload: size_of::<MigrationData>() + data.len(),
                fds: 0,
            },
        };
        self.query(
            &request,
            self.deadlines.migration,
            |read: MigrationData, bytes| {
                // The reply may be padded: what counts is the size that it names.
                let count = usize::try_from(read.size).unwrap_or(usize::MAX);
                let bytes = bytes.get(..count).zip(data.get_mut(..count));
                let (bytes, data) = bytes.ok_or_else(|| ProtocolError::Count {
                    count: u64::from(read.size),
                    expected: max,
                })?;
                data.copy_from_slice(bytes);
                Ok(count)
            },
        )
    }

    /// Most bytes of migration data in one message.
    fn migration_chunk(&self) -> usize {
        self.limits
            .max_data_xfer_size
            .min(MAX_OUTGOING - Header::SIZE - size_of::<MigrationData>())
    }
}

/// A size as messages hold it.
fn size(size: usize) -> Result<u32, ConnError> {
    u32::try_from(size).map_err(|_| ConnError::Limit("the message would be too long"))
}
