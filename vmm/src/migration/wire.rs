//! What is said between the two ends of a migration, byte by byte.
//!
//! Each connection is opened by the source and begins with a hello of 36 bytes: `outriggr`, this version of the protocol and
//! the oldest that is spoken, too (32 bits each), what the connection is for (32 bits), and the migration's name (16 bytes).
//! After it come frames: a kind, the length of what follows, both 32 bits, and that. All numbers are little-endian.
//!
//! | connection | to the destination | to the source |
//! |---|---|---|
//! | control | `Machine` | `Ready`, when there is a machine like it |
//! | | `DeviceData`... | |
//! | | `State` | `Prepared`, when nothing can fail any more |
//! | | `Commit` | `Committed`, when the VM runs |
//! | | `Heard` | |
//! | memory, 1 to 16 of them | `Pages`..., `RoundEnd` | `RoundTaken`, when these are in its RAM; and so on |
//! | | `Pages`..., `PagesEnd` | |
//! | question | | `Committed`, `Refused` or `Unknown` |
//!
//! A VM that is [handed over](super::local) has no connections for memory, and sends no `DeviceData`. As many descriptors as
//! `Machine` and `State` say follow these two, up to 253 with each byte, which says how many.
//!
//! Either end says `Refused`, with a reason, instead of what comes next, when it does not go on. What each of them makes of
//! what it hears, and of hearing nothing, is in [`commit`](super::commit).
//!
//! Nothing that a peer says is believed: a length is compared with what the kind can have before a byte of it is read.

use std::fmt::{self, Display};
use std::io::{self, IoSlice, Read, Write};

use rustix::io::retry_on_intr;
use rustix::rand::{GetRandomFlags, getrandom};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

/// This version of the protocol.
pub(super) const VERSION: u32 = 1;
/// The oldest version that this program speaks, too.
pub(super) const OLDEST: u32 = 1;

/// What a connection begins with.
const MAGIC: [u8; 8] = *b"outriggr";

/// The longest description of a machine and the state of its platform, in JSON.
const MAX_DOCUMENT: u32 = 64 << 20;
/// The longest piece of a device's state.
pub(super) const MAX_DEVICE_DATA: u32 = 1 << 20;
/// The longest reason.
const MAX_REASON: u32 = 64 << 10;

/// The name of one migration, told to nobody but its two ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub(crate) struct MigrationId(pub(crate) [u8; 16]);

impl MigrationId {
    /// One that no other migration has.
    pub(super) fn new() -> io::Result<Self> {
        let mut id = [0; 16];
        let mut rest = &mut id[..];
        while !rest.is_empty() {
            let length = retry_on_intr(|| getrandom(&mut *rest, GetRandomFlags::empty()))?;
            rest = rest.get_mut(length..).unwrap_or_default();
        }
        Ok(Self(id))
    }
}

impl Display for MigrationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// What is wrong with a peer, or with the way to it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum WireError {
    /// The connection does not work.
    #[error("the connection is lost")]
    Io(#[from] io::Error),
    /// It speaks something else.
    #[error("the other end does not speak this protocol")]
    Magic,
    /// It speaks only other versions.
    #[error(
        "the other end speaks versions {oldest} to {newest} of the protocol, and this one {OLDEST} to {VERSION}; \
         migrate by way of a version between the two"
    )]
    Version {
        /// Its oldest.
        oldest: u32,
        /// Its newest.
        newest: u32,
    },
    /// It says what makes no sense here.
    #[error("the other end has sent {0}")]
    Unexpected(String),
    /// The other end has said why it does not go on.
    #[error("the other end says: {0}")]
    Refused(String),
}

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    /// A new migration.
    Control,
    /// Guest RAM of a migration that has a control connection.
    Memory,
    /// The question of how a migration ended.
    Question,
}

/// The first thing that the source says on a connection.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct Hello {
    magic: [u8; 8],
    version: U32,
    oldest: U32,
    role: U32,
    id: MigrationId,
}

/// Says what a connection is for.
pub(super) fn say_hello(stream: &mut impl Write, role: Role, id: MigrationId) -> io::Result<()> {
    let role = match role {
        Role::Control => 0,
        Role::Memory => 1,
        Role::Question => 2,
    };
    let hello = Hello {
        magic: MAGIC,
        version: VERSION.into(),
        oldest: OLDEST.into(),
        role: U32::new(role),
        id,
    };
    stream.write_all(hello.as_bytes())
}

/// Hears what a connection is for.
pub(super) fn hear_hello(stream: &mut impl Read) -> Result<(Role, MigrationId), WireError> {
    let mut hello = Hello::new_zeroed();
    stream.read_exact(hello.as_mut_bytes())?;
    if hello.magic != MAGIC {
        return Err(WireError::Magic);
    }
    let (oldest, newest) = (hello.oldest.get(), hello.version.get());
    if oldest > VERSION || newest < OLDEST {
        return Err(WireError::Version { oldest, newest });
    }
    let role = match hello.role.get() {
        0 => Role::Control,
        1 => Role::Memory,
        2 => Role::Question,
        role => {
            return Err(WireError::Unexpected(format!(
                "a connection of the kind {role}"
            )));
        }
    };
    Ok((role, hello.id))
}

/// What a frame is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Kind {
    /// To the destination: the machine that is to come, as a document.
    Machine = 1,
    /// To the source: the destination has made such a machine.
    Ready = 2,
    /// To the destination, on a connection of its own: pages of RAM.
    Pages = 3,
    /// To the destination, on a connection of its own: no more pages come here.
    PagesEnd = 4,
    /// To the destination: the number of a device, 32 bits, and the next of its state.
    DeviceData = 5,
    /// To the destination: the state of the platform, as a document. Nothing more comes before the commit.
    State = 6,
    /// To the source: the destination has everything.
    Prepared = 7,
    /// To the destination: run the VM.
    Commit = 8,
    /// To the source: the VM runs.
    Committed = 9,
    /// To either: why the VM does not go there.
    Refused = 10,
    /// To the source: the destination knows nothing of this migration.
    Unknown = 11,
    /// To the destination: the source knows that the VM runs there, and will not ask.
    Heard = 12,
    /// To the destination, on a connection for pages: no more come before the destination has these.
    RoundEnd = 13,
    /// To the source, there: it has.
    RoundTaken = 14,
}

impl Kind {
    const ALL: [Self; 14] = [
        Self::Machine,
        Self::Ready,
        Self::Pages,
        Self::PagesEnd,
        Self::DeviceData,
        Self::State,
        Self::Prepared,
        Self::Commit,
        Self::Committed,
        Self::Refused,
        Self::Unknown,
        Self::Heard,
        Self::RoundEnd,
        Self::RoundTaken,
    ];

    fn from_number(number: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| *kind as u32 == number)
    }

    /// The most bytes that follow.
    fn limit(self) -> u32 {
        match self {
            Self::Machine | Self::State => MAX_DOCUMENT,
            Self::DeviceData => MAX_DEVICE_DATA + 4,
            Self::Pages => MAX_PAGES,
            Self::Refused => MAX_REASON,
            Self::Ready | Self::PagesEnd | Self::Prepared => 0,
            Self::RoundEnd | Self::RoundTaken => 0,
            Self::Commit | Self::Committed | Self::Unknown | Self::Heard => 0,
        }
    }
}

/// Which pages of guest RAM a frame has: those of [`BLOCK`] bytes from an address on, a bit for each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub(super) struct PagesHeader {
    /// The guest physical address of the first.
    pub(super) address: U64,
    /// Those whose contents follow, in the order of their addresses.
    pub(super) data: U64,
    /// Those that are all zeroes.
    pub(super) zero: U64,
}

/// How much of guest RAM a frame can have, in bytes: a word has a bit for each of its pages, and the CPU's cache holds it
/// between one end of the copying and the other.
pub(super) const BLOCK: u32 = 256 << 10;
/// A [`PagesHeader`] and all pages of a block.
const MAX_PAGES: u32 = BLOCK + 24;

#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct FrameHeader {
    kind: U32,
    length: U32,
}

/// Sends a frame that consists of these parts.
pub(super) fn send(stream: &mut impl Write, kind: Kind, parts: &[&[u8]]) -> io::Result<()> {
    let header = head(kind, parts.iter().map(|part| part.len()).sum())?;
    let mut slices = vec![IoSlice::new(header.as_bytes())];
    slices.extend(parts.iter().map(|part| IoSlice::new(part)));
    write_all(stream, &mut slices)?;
    stream.flush()
}

/// The head of a frame of which so many bytes follow.
pub(super) fn head(kind: Kind, length: usize) -> io::Result<impl IntoBytes + Immutable> {
    let length = u32::try_from(length)
        .ok()
        .filter(|length| *length <= kind.limit())
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "the frame is too long"))?;
    Ok(FrameHeader {
        kind: U32::new(kind as u32),
        length: length.into(),
    })
}

/// Writes all of several slices, as one piece if they are short.
fn write_all(stream: &mut impl Write, mut slices: &mut [IoSlice<'_>]) -> io::Result<()> {
    // (Those that are empty at the end would never be written.)
    while slices.iter().any(|slice| !slice.is_empty()) {
        match stream.write_vectored(slices) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => IoSlice::advance_slices(&mut slices, written),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Receives the head of a frame: its kind and the length of what follows.
pub(super) fn receive_head(stream: &mut impl Read) -> Result<(Kind, u32), WireError> {
    let mut header = FrameHeader::new_zeroed();
    stream.read_exact(header.as_mut_bytes())?;
    let (number, length) = (header.kind.get(), header.length.get());
    let unexpected = |what| Err(WireError::Unexpected(what));
    let Some(kind) = Kind::from_number(number) else {
        return unexpected(format!("a frame of the kind {number}"));
    };
    if length > kind.limit() {
        return unexpected(format!("a frame {kind:?} of {length} bytes"));
    }
    Ok((kind, length))
}

/// Receives what follows the head of a frame. Memory is taken as the bytes come, not as they are announced.
pub(super) fn receive_rest(stream: &mut impl Read, length: u32) -> Result<Vec<u8>, WireError> {
    let mut bytes = Vec::new();
    stream.take(length.into()).read_to_end(&mut bytes)?;
    if bytes.len() < length as usize {
        return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
    }
    Ok(bytes)
}

/// Receives a frame. One that says why the other end does not go on is an error.
pub(super) fn receive(stream: &mut impl Read) -> Result<(Kind, Vec<u8>), WireError> {
    let (kind, length) = receive_head(stream)?;
    let bytes = receive_rest(stream, length)?;
    match kind {
        Kind::Refused => Err(WireError::Refused(printable(&bytes))),
        _ => Ok((kind, bytes)),
    }
}

/// Says why the VM does not go there.
pub(super) fn refuse(stream: &mut impl Write, reason: &dyn Display) -> io::Result<()> {
    let mut reason = reason.to_string();
    let mut end = reason.len().min(MAX_REASON as usize);
    while !reason.is_char_boundary(end) {
        end -= 1;
    }
    reason.truncate(end);
    send(stream, Kind::Refused, &[reason.as_bytes()])
}

/// Receives a frame of this kind.
pub(super) fn expect(stream: &mut impl Read, expected: Kind) -> Result<Vec<u8>, WireError> {
    match receive(stream)? {
        (kind, bytes) if kind == expected => Ok(bytes),
        (kind, _) => Err(WireError::Unexpected(format!(
            "{kind:?}, where {expected:?} should come"
        ))),
    }
}

/// A peer's text as one can show it.
fn printable(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    text.chars()
        .map(|character| {
            if character.is_control() {
                ' '
            } else {
                character
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: MigrationId = MigrationId([7; 16]);

    fn receive_all(mut bytes: &[u8]) -> Result<(Kind, Vec<u8>), WireError> {
        receive(&mut bytes)
    }

    #[test]
    fn numbers_of_kinds_are_their_own() {
        for kind in Kind::ALL {
            assert_eq!(Kind::from_number(kind as u32), Some(kind));
        }
        assert_eq!(Kind::from_number(0), None);
        assert_eq!(Kind::from_number(15), None);
    }

    #[test]
    fn what_is_sent_is_received() {
        let mut wire = Vec::new();
        say_hello(&mut wire, Role::Memory, ID).unwrap();
        send(&mut wire, Kind::DeviceData, &[&[1, 0, 0, 0], &[9; 1000]]).unwrap();
        send(&mut wire, Kind::Commit, &[]).unwrap();
        let mut wire = &wire[..];
        assert_eq!(hear_hello(&mut wire).unwrap(), (Role::Memory, ID));
        let (kind, bytes) = receive(&mut wire).unwrap();
        assert_eq!(
            (kind, bytes.len(), bytes[0], bytes[4]),
            (Kind::DeviceData, 1004, 1, 9)
        );
        assert_eq!(receive(&mut wire).unwrap(), (Kind::Commit, vec![]));
        assert!(
            matches!(receive(&mut wire), Err(WireError::Io(_))),
            "the end"
        );
    }

    #[test]
    fn lengths_are_bounded() {
        let frame = |kind: u32, length: u32| [kind.to_le_bytes(), length.to_le_bytes()].concat();
        for kind in Kind::ALL {
            let longest = receive_all(&frame(kind as u32, kind.limit() + 1));
            assert!(matches!(longest, Err(WireError::Unexpected(_))), "{kind:?}");
        }
        assert!(receive_all(&frame(99, 0)).is_err());
        // Announced and not sent: an error, and not 64 MiB of memory.
        assert!(matches!(
            receive_all(&frame(1, MAX_DOCUMENT)),
            Err(WireError::Io(_))
        ));
        let sent = send(&mut Vec::new(), Kind::Commit, &[&[1]]);
        assert!(sent.is_err());
    }

    #[test]
    fn reasons_are_shown_without_tricks() {
        let mut wire = Vec::new();
        send(&mut wire, Kind::Refused, &[b"no room\x1b[2J\xff"]).unwrap();
        let error = receive_all(&wire).unwrap_err().to_string();
        assert_eq!(error, "the other end says: no room [2J\u{fffd}");
    }

    #[test]
    fn strangers_are_told_apart() {
        let mut wire = Vec::new();
        say_hello(&mut wire, Role::Control, ID).unwrap();
        let with = |offset: usize, bytes: &[u8]| {
            let mut wire = wire.clone();
            wire[offset..offset + bytes.len()].copy_from_slice(bytes);
            hear_hello(&mut &wire[..])
        };
        assert!(with(0, b"o").is_ok());
        assert!(matches!(with(0, b"GET / HT"), Err(WireError::Magic)));
        let newer = with(8, &[9, 0, 0, 0, 8, 0, 0, 0]);
        assert!(matches!(
            newer,
            Err(WireError::Version {
                oldest: 8,
                newest: 9
            })
        ));
        assert!(
            with(8, &[9, 0, 0, 0, 1, 0, 0, 0]).is_ok(),
            "newer, and speaks this one, too"
        );
        assert!(matches!(with(16, &[3]), Err(WireError::Unexpected(_))));
        assert!(matches!(
            hear_hello(&mut &wire[..20]),
            Err(WireError::Io(_))
        ));
    }
}
