//! What this VMM has decided of the VMs that were sent to it. It is asked for as long as a source may be in doubt.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::commit::{Destination, DestinationAction, DestinationInput};
use super::wire::MigrationId;
use crate::control::Cancel;

/// How many migrations are remembered.
const REMEMBERED: usize = 64;

/// The migrations that have come here, from the oldest on.
#[derive(Debug, Default)]
pub(crate) struct Record(Mutex<VecDeque<Entry>>);

#[derive(Debug)]
struct Entry {
    id: MigrationId,
    state: Destination,
    /// Ends the operation that takes in the VM.
    cancel: Arc<Cancel>,
}

impl Record {
    /// A migration begins that has not been here yet.
    pub(super) fn begin(&self, id: MigrationId, cancel: &Arc<Cancel>) {
        let mut entries = self.lock();
        if entries.len() == REMEMBERED {
            entries.pop_front();
        }
        entries.push_back(Entry {
            id,
            state: Destination::Receiving,
            cancel: Arc::clone(cancel),
        });
    }

    /// Goes on to where `input` leads, and says what is to be done; nothing if there has been no such migration. If it is
    /// the end of a copy because the source has asked for it, the operation that has the copy is told.
    pub(super) fn on(&self, id: MigrationId, input: DestinationInput) -> Option<DestinationAction> {
        let mut entries = self.lock();
        let entry = entries.iter_mut().find(|entry| entry.id == id)?;
        let was = entry.state;
        let (state, action) = was.on(input);
        entry.state = state;
        let is_taken_back =
            (input, action) == (DestinationInput::Asked, DestinationAction::Discard);
        // One in doubt waits for nothing else, and has not been cancelled by anybody.
        if is_taken_back && was != Destination::InDoubt {
            entry.cancel.ask();
        }
        Some(action)
    }

    /// Where a migration is.
    pub(super) fn state(&self, id: MigrationId) -> Option<Destination> {
        let entries = self.lock();
        let entry = entries.iter().find(|entry| entry.id == id);
        entry.map(|entry| entry.state)
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<Entry>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_for_good() {
        let record = Record::default();
        let cancel = Arc::<Cancel>::default();
        let id = |number| MigrationId([number; 16]);
        record.begin(id(1), &cancel);
        assert_eq!(record.on(id(2), DestinationInput::Asked), None);
        assert!(!cancel.is_asked());
        let asked = record.on(id(1), DestinationInput::Asked);
        assert_eq!(asked, Some(DestinationAction::Discard));
        assert!(cancel.is_asked(), "whoever takes it in hears of it");
        let late = record.on(id(1), DestinationInput::Commit);
        assert_eq!(late, Some(DestinationAction::SayRefused));
        // As many as are remembered may come, and no more.
        for number in 2..65 {
            record.begin(id(number), &cancel);
        }
        assert_eq!(record.state(id(1)), Some(Destination::Refused));
        record.begin(id(65), &cancel);
        assert_eq!(record.state(id(1)), None);
    }
}
