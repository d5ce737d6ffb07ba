//! The MSI-X table and the pending bits, as they are in a BAR.

use crate::description::MsixTable;

/// The table. What it holds means something to clients alone: which vector signals what is said by `DEVICE_SET_IRQS`.
#[derive(Clone, Debug)]
pub(super) struct Table(Vec<u8>);

/// What an access is to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// The table, at this offset in bytes.
    Table(usize),
    /// The pending bits, at this offset in bytes.
    Pending(usize),
}

/// Size of an entry of the table in bytes.
const ENTRY: usize = 16;

impl Table {
    pub(super) fn new(vectors: u16) -> Self {
        let mut table = Self(vec![0; ENTRY * usize::from(vectors)]);
        table.reset();
        table
    }

    /// Masks all vectors, and forgets their messages.
    pub(super) fn reset(&mut self) {
        for entry in self.0.chunks_mut(ENTRY) {
            for (at, byte) in entry.iter_mut().enumerate() {
                *byte = u8::from(at == 12);
            }
        }
    }

    pub(super) fn read(&self, start: usize, data: &mut [u8]) -> Option<()> {
        let bytes = self.0.get(start..start.checked_add(data.len())?)?;
        data.copy_from_slice(bytes);
        Some(())
    }

    pub(super) fn write(&mut self, start: usize, data: &[u8]) -> Option<()> {
        let bytes = self.0.get_mut(start..start.checked_add(data.len())?)?;
        bytes.copy_from_slice(data);
        Some(())
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.0
    }
}

/// Whether some of a range of a BAR is in the table or the pending bits.
pub(super) fn overlaps(msix: &MsixTable, bar: usize, offset: u64, count: usize) -> bool {
    let end = offset.saturating_add(count as u64);
    let ranges = [
        (msix.table_bar, msix.table()),
        (msix.pending_bar, msix.pending()),
    ];
    ranges.iter().any(|(its_bar, range)| {
        usize::from(*its_bar) == bar && range.start < end && offset < range.end
    })
}

/// Where in the table or the pending bits a range of a BAR is, if all of it is in one of them.
pub(super) fn find(msix: &MsixTable, bar: usize, offset: u64, count: usize) -> Option<Place> {
    let end = offset.checked_add(count as u64)?;
    let at = |its_bar: u8, range: std::ops::Range<u64>| {
        let is_in = usize::from(its_bar) == bar && range.start <= offset && end <= range.end;
        is_in.then(|| usize::try_from(offset - range.start).ok())?
    };
    at(msix.table_bar, msix.table())
        .map(Place::Table)
        .or_else(|| at(msix.pending_bar, msix.pending()).map(Place::Pending))
}
