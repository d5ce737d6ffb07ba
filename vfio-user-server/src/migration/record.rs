//! The stream of a device's state: records, each a kind, a length and so many bytes, all little-endian.
//!
//! A head comes first, then the early state, configuration space, interrupts, the state, and an end that says how much
//! state there was.

use std::io;

use crate::function::SavedInterrupts;

/// What a record holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    /// [`MAGIC`] and [`VERSION`].
    Head = 1,
    /// A piece of what the device saved while it ran.
    Early = 2,
    /// Configuration space.
    Config = 3,
    /// [`SavedInterrupts`].
    Interrupts = 4,
    /// A piece of what the device saved when it was stopped.
    State = 5,
    /// How many bytes of early state and of state there were.
    End = 6,
}

/// Size of the head of a record in bytes.
pub(super) const RECORD_HEAD: usize = 8;

/// Most bytes in a record.
pub(super) const MAX_RECORD: usize = 64 << 10;

const MAGIC: [u8; 8] = *b"vfu-stat";
const VERSION: u32 = 1;

/// What [`Kind::Head`] holds.
pub(super) fn head() -> Vec<u8> {
    [&MAGIC[..], &VERSION.to_le_bytes()].concat()
}

/// Appends a record.
pub(super) fn push(out: &mut Vec<u8>, kind: Kind, data: &[u8]) {
    let length = u32::try_from(data.len()).unwrap_or(u32::MAX);
    out.extend((kind as u32).to_le_bytes());
    out.extend(length.to_le_bytes());
    out.extend(data);
}

/// Reads the head of a record: what it holds, and how many bytes.
pub(super) fn parse_head(head: &[u8; RECORD_HEAD]) -> io::Result<(Kind, usize)> {
    let [kind, length] = [&head[..4], &head[4..]].map(word);
    let kind = match kind {
        1 => Kind::Head,
        2 => Kind::Early,
        3 => Kind::Config,
        4 => Kind::Interrupts,
        5 => Kind::State,
        6 => Kind::End,
        _ => return Err(invalid("a record of an unknown kind")),
    };
    let length = usize::try_from(length).unwrap_or(usize::MAX);
    if length > MAX_RECORD {
        return Err(invalid("a record that is too long"));
    }
    Ok((kind, length))
}

/// What [`Kind::Interrupts`] holds.
pub(super) fn encode_interrupts(interrupts: &SavedInterrupts) -> Vec<u8> {
    let mut out = Vec::new();
    let [msi, msix] = &interrupts.pending;
    let lengths = [usize::from(interrupts.level), msi.len(), msix.len()];
    for number in lengths {
        out.extend(u32::try_from(number).unwrap_or(u32::MAX).to_le_bytes());
    }
    out.extend(
        msi.iter()
            .chain(msix)
            .flat_map(|vector| vector.to_le_bytes()),
    );
    out.extend(&interrupts.table);
    out
}

/// Reads what [`Kind::Interrupts`] holds.
pub(super) fn decode_interrupts(data: &[u8]) -> io::Result<SavedInterrupts> {
    let parsed = || {
        let (numbers, rest) = data.split_at_checked(12)?;
        let numbers: Vec<_> = numbers.chunks(4).map(word).collect();
        let [level, msi, msix] = numbers.try_into().ok()?;
        let vectors = |rest: &[u8], count: u32| -> Option<(Vec<u16>, usize)> {
            let length = usize::try_from(count).ok()?.checked_mul(2)?;
            let (bytes, _) = rest.get(..length)?.as_chunks();
            Some((
                bytes
                    .iter()
                    .map(|bytes| u16::from_le_bytes(*bytes))
                    .collect(),
                length,
            ))
        };
        let (msi, length) = vectors(rest, msi)?;
        let rest = rest.get(length..)?;
        let (msix, length) = vectors(rest, msix)?;
        Some(SavedInterrupts {
            level: level != 0,
            pending: [msi, msix],
            table: rest.get(length..)?.to_vec(),
        })
    };
    parsed().ok_or_else(|| invalid("interrupts that are no interrupts"))
}

/// What [`Kind::End`] holds.
pub(super) fn end(early: u64, state: u64) -> Vec<u8> {
    [early.to_le_bytes(), state.to_le_bytes()].concat()
}

pub(super) fn invalid(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

fn word(bytes: &[u8]) -> u32 {
    bytes
        .first_chunk()
        .map_or(0, |bytes| u32::from_le_bytes(*bytes))
}
