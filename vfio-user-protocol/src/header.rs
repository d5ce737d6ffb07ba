//! The header that every message begins with.

use bitflags::bitflags;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::ProtocolError;

/// The first 16 bytes of every message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Header {
    /// Chosen by whoever sends the command, echoed in the reply.
    pub id: u16,
    /// Number of the command; see [`Command`]. The reply repeats it.
    pub command: u16,
    /// Size of the whole message in bytes, header included.
    pub size: u32,
    /// See [`MessageFlags`].
    pub flags: u32,
    /// In a reply with [`MessageFlags::ERROR`]: an errno, or 0 if the peer does not say. Otherwise reserved.
    pub error: u32,
}

impl Header {
    /// Size of a header in bytes.
    pub const SIZE: usize = size_of::<Self>();

    /// The header of a command with `payload` bytes after it.
    pub fn command(id: u16, command: Command, payload: usize) -> Self {
        Self {
            id,
            command: command as u16,
            size: message_size(payload),
            flags: 0,
            error: 0,
        }
    }

    /// The header of the reply to `self`, with `payload` bytes after it.
    pub fn reply(&self, payload: usize) -> Self {
        Self {
            size: message_size(payload),
            flags: MessageFlags::REPLY.bits(),
            error: 0,
            ..*self
        }
    }

    /// The header, and whole message, that refuses `self` with `errno`.
    pub fn refusal(&self, errno: u32) -> Self {
        Self {
            flags: (MessageFlags::REPLY | MessageFlags::ERROR).bits(),
            error: errno,
            ..self.reply(0)
        }
    }

    /// Checks the fields on which the framing of the stream depends.
    ///
    /// `max_size` bounds the size in bytes that a message may claim. The command is not looked at: a message with an
    /// unknown one can still be skipped.
    ///
    /// # Errors
    ///
    /// [`ProtocolError::MessageSize`] and [`ProtocolError::MessageType`]. After either, where the next message begins
    /// is anybody's guess, so the connection is of no further use.
    pub fn check(&self, max_size: usize) -> Result<(), ProtocolError> {
        let size = usize::try_from(self.size).unwrap_or(usize::MAX);
        if size < Self::SIZE || size > max_size {
            return Err(ProtocolError::MessageSize(self.size));
        }
        if self.flags & TYPE_MASK > MessageFlags::REPLY.bits() {
            return Err(ProtocolError::MessageType(self.flags));
        }
        Ok(())
    }

    /// Size of the payload in bytes.
    pub fn payload_size(&self) -> usize {
        usize::try_from(self.size)
            .unwrap_or(usize::MAX)
            .saturating_sub(Self::SIZE)
    }

    /// Whether this is a reply. If not, it is a command.
    pub fn is_reply(&self) -> bool {
        self.flags & TYPE_MASK == MessageFlags::REPLY.bits()
    }

    /// Whether this is a command that wants no reply.
    pub fn is_posted(&self) -> bool {
        self.flags & MessageFlags::NO_REPLY.bits() != 0
    }

    /// Whether this is a reply that says that the command failed.
    pub fn is_error(&self) -> bool {
        self.flags & MessageFlags::ERROR.bits() != 0
    }
}

bitflags! {
    /// The flags of a header. The lowest four bits are the type: 0 a command, 1 a reply.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct MessageFlags: u32 {
        /// The message is a reply.
        const REPLY = 1;
        /// The command wants no reply.
        const NO_REPLY = 1 << 4;
        /// The command failed; the header's `error` may say why.
        const ERROR = 1 << 5;
    }
}

/// The bits of a header's flags that hold the message's type.
const TYPE_MASK: u32 = 0xf;

/// The size field of a message whose payload has `payload` bytes.
fn message_size(payload: usize) -> u32 {
    u32::try_from(Header::SIZE + payload).unwrap_or(u32::MAX)
}

/// What a message asks for.
///
/// Number 14 was `DIRTY_PAGES` before version 0.9.2 and is no command any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum Command {
    /// Agree on version and capabilities. Payload [`crate::Version`] and JSON.
    Version = 1,
    /// Map guest memory. Payload [`crate::DmaMap`]; at most one descriptor.
    DmaMap = 2,
    /// Unmap guest memory. Payload [`crate::DmaUnmap`].
    DmaUnmap = 3,
    /// Describe the device. Payload [`crate::DeviceInfo`].
    DeviceGetInfo = 4,
    /// Describe a region. Payload [`crate::RegionInfo`], in the reply with capabilities and a descriptor.
    DeviceGetRegionInfo = 5,
    /// List the descriptors that stand for parts of a region. Payload [`crate::RegionIoFds`].
    DeviceGetRegionIoFds = 6,
    /// Describe a kind of interrupt. Payload [`crate::IrqInfo`].
    DeviceGetIrqInfo = 7,
    /// Wire, mask, unmask or trigger interrupts. Payload [`crate::IrqSet`], with eventfds.
    DeviceSetIrqs = 8,
    /// Read from a region. Payload [`crate::RegionAccess`], in the reply with the data.
    RegionRead = 9,
    /// Write to a region. Payload [`crate::RegionAccess`], with the data.
    RegionWrite = 10,
    /// Read guest memory for the device. Payload [`crate::DmaAccess`], in the reply with the data.
    DmaRead = 11,
    /// Write guest memory for the device. Payload [`crate::DmaAccess`], with the data.
    DmaWrite = 12,
    /// Reset the device. No payload.
    DeviceReset = 13,
    /// Several small writes at once. Payload [`crate::RegionWrites`] and [`crate::WriteMulti`]s.
    RegionWriteMulti = 15,
    /// Probe, get or set a feature of the device. Payload [`crate::Feature`] and the feature's data.
    DeviceFeature = 16,
    /// Read from the device's migration stream. Payload [`crate::MigrationData`], in the reply with the data.
    MigDataRead = 17,
    /// Write to the device's migration stream. Payload [`crate::MigrationData`], with the data.
    MigDataWrite = 18,
}

impl TryFrom<u16> for Command {
    type Error = ProtocolError;

    fn try_from(number: u16) -> Result<Self, ProtocolError> {
        Ok(match number {
            1 => Self::Version,
            2 => Self::DmaMap,
            3 => Self::DmaUnmap,
            4 => Self::DeviceGetInfo,
            5 => Self::DeviceGetRegionInfo,
            6 => Self::DeviceGetRegionIoFds,
            7 => Self::DeviceGetIrqInfo,
            8 => Self::DeviceSetIrqs,
            9 => Self::RegionRead,
            10 => Self::RegionWrite,
            11 => Self::DmaRead,
            12 => Self::DmaWrite,
            13 => Self::DeviceReset,
            15 => Self::RegionWriteMulti,
            16 => Self::DeviceFeature,
            17 => Self::MigDataRead,
            18 => Self::MigDataWrite,
            _ => return Err(ProtocolError::UnknownCommand(number)),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_has_the_layout_of_the_specification() {
        let header = Header {
            id: 0x1234,
            command: 9,
            size: 32,
            flags: 0x21,
            error: 22,
        };
        let bytes = [
            0x34, 0x12, 9, 0, 32, 0, 0, 0, 0x21, 0, 0, 0, 22, 0, 0, 0, //
        ];
        assert_eq!(header.as_bytes(), bytes);
        assert!(header.is_reply() && header.is_error() && !header.is_posted());
        assert_eq!(header.payload_size(), 16);
    }

    #[test]
    fn every_command_keeps_its_number() {
        for number in 0..=u16::MAX {
            match Command::try_from(number) {
                Ok(command) => assert_eq!(command as u16, number),
                Err(_) => assert!(!matches!(number, 1..=13 | 15..=18), "{number}"),
            }
        }
    }

    #[test]
    fn impossible_headers_are_refused() {
        let good = Header::command(1, Command::RegionRead, 16);
        assert!(good.check(32).is_ok());
        for size in [0, 15, 33, u32::MAX] {
            assert!(Header { size, ..good }.check(32).is_err(), "{size}");
        }
        for flags in [2, 3, 0xf, 0x32] {
            assert!(Header { flags, ..good }.check(32).is_err(), "{flags}");
        }
    }

    #[test]
    fn a_refusal_is_a_bare_header_with_the_errno() {
        let refusal = Header::command(7, Command::DmaRead, 16).refusal(14);
        assert_eq!(
            refusal.as_bytes(),
            [7, 0, 11, 0, 16, 0, 0, 0, 0x21, 0, 0, 0, 14, 0, 0, 0]
        );
    }
}
