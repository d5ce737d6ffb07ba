//! Reading and writing regions.

use vfio_user_protocol::{
    Command, Header, ProtocolError, RegionAccess, RegionWrites, WriteMulti, take,
};
use zerocopy::IntoBytes;

use crate::calls::Expected;
use crate::client::Client;
use crate::connection::{MAX_OUTGOING, Request};
use crate::error::ConnError;

/// A small write to a region.
#[derive(Clone, Copy, Debug)]
pub struct RegionWrite<'a> {
    /// The region.
    pub region: u32,
    /// Offset in the region, in bytes.
    pub offset: u64,
    /// What to write: at most 8 bytes.
    pub data: &'a [u8],
}

impl Client {
    /// Reads from a region. More than fits into a message is read with several.
    ///
    /// # Errors
    ///
    /// [`ConnError`], as for every call. What `data` holds then means nothing.
    pub fn region_read(&self, region: u32, offset: u64, data: &mut [u8]) -> Result<(), ConnError> {
        let mut offset = offset;
        for data in data.chunks_mut(self.chunk()) {
            self.read_chunk(region, offset, data)?;
            offset = offset.saturating_add(data.len() as u64);
        }
        Ok(())
    }

    /// Writes to a region, and returns when the device has taken it. More than fits into a message is written with
    /// several, of which those before a failed one have had their effect.
    ///
    /// # Errors
    ///
    /// [`ConnError`], as for every call.
    pub fn region_write(&self, region: u32, offset: u64, data: &[u8]) -> Result<(), ConnError> {
        let mut offset = offset;
        for data in data.chunks(self.chunk()) {
            self.write_chunk(region, offset, data)?;
            offset = offset.saturating_add(data.len() as u64);
        }
        Ok(())
    }

    /// Writes to a region and does not wait for the device to take it, nor learn if it refuses. It takes it before
    /// anything that is sent later.
    ///
    /// The caller has to know that the device does not mind: its registers must not be reachable past this connection,
    /// by a mapped area or an eventfd, which would overtake the write. A server that uses one socket for both directions
    /// is written to as by [`region_write`](Self::region_write).
    ///
    /// # Errors
    ///
    /// [`ConnError`], as for every call, if the write could not be sent.
    pub fn region_post(&self, region: u32, offset: u64, data: &[u8]) -> Result<(), ConnError> {
        let mut offset = offset;
        for data in data.chunks(self.chunk()) {
            let access = access(region, offset, data.len())?;
            let request = write_request(&access, data);
            if !self.connection.post(&request, self.deadlines.region_io)? {
                self.write_chunk(region, offset, data)?;
            }
            offset = offset.saturating_add(data.len() as u64);
        }
        Ok(())
    }

    /// Does several small writes, in one message if the server [knows that](vfio_user_protocol::Limits), and returns
    /// when the device has taken them. Those before one that fails have had their effect.
    ///
    /// # Errors
    ///
    /// [`ConnError::Limit`] if a write has more than 8 bytes, and those that every call has.
    pub fn region_write_multi(&self, writes: &[RegionWrite<'_>]) -> Result<(), ConnError> {
        if !self.limits.write_multiple {
            return writes
                .iter()
                .try_for_each(|write| self.write_chunk(write.region, write.offset, write.data));
        }
        let command = Command::RegionWriteMulti;
        for writes in writes.chunks(MAX_WRITES) {
            let entries = writes
                .iter()
                .map(entry)
                .collect::<Result<Vec<_>, ConnError>>()?;
            let count = entries.len() as u64;
            let head = RegionWrites { count };
            let request = Request {
                command,
                head: head.as_bytes(),
                data: entries.as_bytes(),
                fds: &[],
                expected: Expected {
                    payload: size_of::<RegionWrites>(),
                    fds: 0,
                },
            };
            self.query(
                &request,
                self.deadlines.region_io,
                |done: RegionWrites, _| expect(done.count, count),
            )?;
        }
        Ok(())
    }

    /// Most bytes of a region that go into one message.
    fn chunk(&self) -> usize {
        self.limits
            .max_data_xfer_size
            .min(MAX_OUTGOING - Header::SIZE - size_of::<RegionAccess>())
    }

    fn read_chunk(&self, region: u32, offset: u64, data: &mut [u8]) -> Result<(), ConnError> {
        let access = access(region, offset, data.len())?;
        let request = Request {
            command: Command::RegionRead,
            head: access.as_bytes(),
            data: &[],
            fds: &[],
            expected: Expected {
                payload: size_of::<RegionAccess>() + data.len(),
                fds: 0,
            },
        };
        self.query(
            &request,
            self.deadlines.region_io,
            |done: RegionAccess, bytes| {
                expect(u64::from(done.count), data.len() as u64)?;
                expect(bytes.len() as u64, data.len() as u64)?;
                data.copy_from_slice(bytes);
                Ok(())
            },
        )
    }

    fn write_chunk(&self, region: u32, offset: u64, data: &[u8]) -> Result<(), ConnError> {
        let access = access(region, offset, data.len())?;
        let request = write_request(&access, data);
        let reply = self.call(&request, self.deadlines.region_io)?;
        // Success without a word is success.
        if reply.payload.is_empty() {
            return Ok(());
        }
        take::<RegionAccess>(&reply.payload)
            .and_then(|(done, _)| expect(u64::from(done.count), data.len() as u64))
            .map_err(|source| self.bad_answer(request.command, source))
    }
}

fn write_request<'a>(access: &'a RegionAccess, data: &'a [u8]) -> Request<'a> {
    Request {
        command: Command::RegionWrite,
        head: access.as_bytes(),
        data,
        fds: &[],
        expected: Expected {
            payload: size_of::<RegionAccess>(),
            fds: 0,
        },
    }
}

fn access(region: u32, offset: u64, count: usize) -> Result<RegionAccess, ConnError> {
    let count = u32::try_from(count).map_err(|_| ConnError::Limit("the access is too long"))?;
    Ok(RegionAccess {
        offset,
        region,
        count,
    })
}

/// One of several writes as it is in the message.
fn entry(write: &RegionWrite<'_>) -> Result<WriteMulti, ConnError> {
    let mut data = [0; 8];
    data.get_mut(..write.data.len())
        .ok_or(ConnError::Limit("a write has more than 8 bytes"))?
        .copy_from_slice(write.data);
    Ok(WriteMulti {
        access: access(write.region, write.offset, write.data.len())?,
        data,
    })
}

/// Checks that the server did as much as it was asked to.
fn expect(count: u64, expected: u64) -> Result<(), ProtocolError> {
    if count == expected {
        return Ok(());
    }
    Err(ProtocolError::Count { count, expected })
}

/// Most small writes in one message.
const MAX_WRITES: usize =
    (MAX_OUTGOING - Header::SIZE - size_of::<RegionWrites>()) / size_of::<WriteMulti>();
