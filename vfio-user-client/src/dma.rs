//! The device's own accesses to guest memory, which come as commands from the server.

use std::fmt;
use std::sync::Arc;

use thiserror::Error;
use vfio_user_protocol::{Command, DmaAccess, Header, take};
use zerocopy::IntoBytes;

/// Guest memory as a device may reach it by messages.
///
/// Both calls come from whichever thread reads the connection at that moment, a vCPU's among them, or from the thread
/// of the twin socket. They must not call the connection and should not block.
pub trait GuestDma: Send + Sync {
    /// Fills `data` with guest memory from `address`, as it was mapped.
    ///
    /// # Errors
    ///
    /// [`DmaError`] if not every byte of the range is mapped for the device to read. What `data` holds then is not sent.
    fn read(&self, address: u64, data: &mut [u8]) -> Result<(), DmaError>;

    /// Writes `data` to guest memory at `address`, as it was mapped, and notes for migration that it was written.
    ///
    /// # Errors
    ///
    /// [`DmaError`] if not every byte of the range is mapped for the device to write.
    fn write(&self, address: u64, data: &[u8]) -> Result<(), DmaError>;
}

/// The device asked for memory that it may not access. The server is told `EFAULT`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("the device may not access this memory")]
pub struct DmaError;

/// Answers the server's commands.
pub(crate) struct DmaService {
    memory: Arc<dyn GuestDma>,
}

impl DmaService {
    pub(crate) fn new(memory: Arc<dyn GuestDma>) -> Self {
        Self { memory }
    }

    /// Does what a command asks, and appends the reply to `out` if it wants one.
    pub(crate) fn answer(&self, command: &Header, payload: &[u8], out: &mut Vec<u8>) {
        let start = out.len();
        if let Err(errno) = self.perform(command, payload, out) {
            out.truncate(start);
            out.extend_from_slice(command.refusal(errno).as_bytes());
        }
        if command.is_posted() {
            out.truncate(start);
        }
    }

    fn perform(&self, command: &Header, payload: &[u8], out: &mut Vec<u8>) -> Result<(), u32> {
        match Command::try_from(command.command) {
            Ok(Command::DmaRead) => self.read(command, payload, out),
            Ok(Command::DmaWrite) => self.write(command, payload, out),
            _ => Err(ENOSYS),
        }
    }

    fn read(&self, command: &Header, payload: &[u8], out: &mut Vec<u8>) -> Result<(), u32> {
        let (access, _) = take::<DmaAccess>(payload).map_err(|_| EINVAL)?;
        let count = usize::try_from(access.count)
            .ok()
            .filter(|&count| count <= MAX_DATA)
            .ok_or(EINVAL)?;
        out.extend_from_slice(command.reply(size_of::<DmaAccess>() + count).as_bytes());
        out.extend_from_slice(access.as_bytes());
        let start = out.len();
        out.resize(start + count, 0);
        let data = out.get_mut(start..).unwrap_or(&mut []);
        self.memory.read(access.address, data).map_err(|_| EFAULT)
    }

    fn write(&self, command: &Header, payload: &[u8], out: &mut Vec<u8>) -> Result<(), u32> {
        let (access, data) = take::<DmaAccess>(payload).map_err(|_| EINVAL)?;
        if access.count != data.len() as u64 || command.payload_size() != payload.len() {
            return Err(EINVAL);
        }
        self.memory
            .write(access.address, data)
            .map_err(|_| EFAULT)?;
        out.extend_from_slice(command.reply(size_of::<DmaAccess>()).as_bytes());
        out.extend_from_slice(access.as_bytes());
        Ok(())
    }
}

impl fmt::Debug for DmaService {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DmaService").finish_non_exhaustive()
    }
}

/// Most bytes of guest memory that one message may carry: as many pages as leave the whole message within
/// [`MAX_OUTGOING`](crate::connection::MAX_OUTGOING).
pub(crate) const MAX_DATA: usize = 28 << 10;

/// Most bytes of payload that a command of the server may have.
pub(crate) const MAX_COMMAND: usize = size_of::<DmaAccess>() + MAX_DATA;

// From `asm-generic/errno.h`.
const EFAULT: u32 = 14;
const EINVAL: u32 = 22;
const ENOSYS: u32 = 38;
