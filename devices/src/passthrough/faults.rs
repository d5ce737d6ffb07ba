//! What goes wrong between an endpoint and its device: all counted, and logged ever more rarely.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

/// The faults of one endpoint. The guest sees them as all-ones, and may cause as many as it likes.
#[derive(Debug)]
pub(super) struct Faults {
    id: String,
    count: AtomicU64,
}

impl Faults {
    /// The device's name in the log.
    pub(super) fn id(&self) -> &str {
        &self.id
    }

    pub(super) fn new(id: &str) -> Self {
        Self {
            id: id.to_owned(),
            count: AtomicU64::new(0),
        }
    }

    /// How many there have been.
    pub(super) fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }

    /// Counts a fault; the first, second, fourth, eighth and so on are logged.
    pub(super) fn record(&self, what: fmt::Arguments<'_>, error: &dyn fmt::Display) {
        let count = self.count.fetch_add(1, Ordering::Relaxed).wrapping_add(1);
        if count.is_power_of_two() {
            log::warn!(
                "{}: {what}: {error} (fault {count} of this device)",
                self.id
            );
        }
    }
}
