//! Which writes a queue's thread does itself, instead of leaving them to the ring.
//!
//! Many file systems cannot write to the page cache without perhaps having to wait: ext4, tmpfs and most others. io_uring
//! gives such a write to a thread of the kernel, one after the other for a file, and waking that thread takes several times
//! as long as the copy into the page cache, which is all that there is to do. So the queue's thread does it. It then has to
//! wait itself where a write has to: when there is too much in the page cache that is not on the storage yet. When that has
//! happened, the ring gets the writes for a while, and reads do not wait for them.

use std::time::{Duration, Instant};

/// What is known about the writes of a queue. For those to the page cache alone: others are always for the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AtOnce {
    /// Nothing yet: the next write that is not to wait will tell.
    Untried,
    /// The ring does them at once, too.
    Never,
    /// They are done here, but not before this, if it is given.
    Always { not_before: Option<Instant> },
}

/// Most bytes of a write that is done here, so that others do not wait long.
pub(super) const MAX_LENGTH: usize = 1 << 20;

/// A write that takes longer had to wait for the storage (or, seldom, for a CPU that others had), and for how long the next
/// ones are left to the ring. To find out which of the two it was would cost each request a system call.
const LONG: Duration = Duration::from_millis(20);
const PAUSE: Duration = Duration::from_secs(1);

impl AtOnce {
    /// Whether to do a write here that begins now.
    pub(super) fn is_due(self, now: Instant) -> bool {
        match self {
            Self::Untried => true,
            Self::Never => false,
            Self::Always { not_before } => not_before.is_none_or(|time| time <= now),
        }
    }

    /// A write has been done here, and has taken so long.
    pub(super) fn note(&mut self, begin: Instant, end: Instant) {
        let is_long = end.saturating_duration_since(begin) > LONG;
        *self = Self::Always {
            not_before: is_long.then(|| end + PAUSE),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_are_left_to_the_ring_for_a_while_after_one_that_had_to_wait() {
        let start = Instant::now();
        let at = |milliseconds| start + Duration::from_millis(milliseconds);
        let mut at_once = AtOnce::Always { not_before: None };
        assert!(at_once.is_due(at(0)));
        at_once.note(at(0), at(19));
        assert!(at_once.is_due(at(19)));
        at_once.note(at(20), at(50));
        assert!(!at_once.is_due(at(51)) && !at_once.is_due(at(1049)));
        assert!(at_once.is_due(at(1050)));
        at_once.note(at(1050), at(1051));
        assert!(at_once.is_due(at(1051)));
    }

    #[test]
    fn who_knows_nothing_tries_and_who_knows_better_does_not() {
        let now = Instant::now();
        assert!(AtOnce::Untried.is_due(now));
        assert!(!AtOnce::Never.is_due(now));
    }
}
