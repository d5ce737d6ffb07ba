//! Whether to look at a queue that has run empty for a little while, before its thread sleeps.
//!
//! To sleep costs the driver a notification and the thread a wake-up. A driver that is about to make more requests saves
//! both, if the thread looks for them meanwhile. One that is not costs the thread its time, so it looks where that has paid
//! off lately, and else only now and then, to find out. Memory that the client takes away meanwhile stays until the look
//! ends.

use std::time::Duration;

/// Longest look. That is about what it costs to notify and to wake up, so that a look that is for nothing doubles these
/// costs, and no more.
pub(super) const LONGEST: Duration = Duration::from_micros(32);

/// Most often that the thread sleeps without having looked before. All looks of a disk that is used now and then thus cost
/// it half a microsecond each time.
const MOST_SLEEPS: u8 = 63;

/// What earlier looks have shown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Polling {
    /// How often to sleep after a look that was for nothing: each time twice as often.
    pause: u8,
    /// How often to sleep before the next look.
    sleeps: u8,
}

impl Polling {
    /// The queue has run empty. Returns whether to look for more.
    pub(super) fn is_due(&mut self) -> bool {
        let is_due = self.sleeps == 0;
        self.sleeps = self.sleeps.saturating_sub(1);
        is_due
    }

    /// The thread has looked, and something came, or not.
    pub(super) fn note(&mut self, something_came: bool) {
        self.pause = if something_came {
            0
        } else {
            (2 * self.pause + 1).min(MOST_SLEEPS)
        };
        self.sleeps = self.pause;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How often the thread sleeps until the next look, which is for something or not.
    fn sleeps_before(polling: &mut Polling, something_comes: bool) -> u32 {
        let mut sleeps = 0;
        while !polling.is_due() {
            sleeps += 1;
        }
        polling.note(something_comes);
        sleeps
    }

    #[test]
    fn looks_that_are_for_nothing_become_rare() {
        let mut polling = Polling::default();
        let sleeps: [_; 9] = std::array::from_fn(|_| sleeps_before(&mut polling, false));
        assert_eq!(sleeps, [0, 1, 3, 7, 15, 31, 63, 63, 63]);
    }

    #[test]
    fn looks_that_pay_off_are_taken_each_time() {
        let mut polling = Polling::default();
        for something_comes in [false, false, false, true] {
            sleeps_before(&mut polling, something_comes);
        }
        assert_eq!(sleeps_before(&mut polling, true), 0);
        assert_eq!(sleeps_before(&mut polling, false), 0);
        assert_eq!(sleeps_before(&mut polling, true), 1);
        assert_eq!(sleeps_before(&mut polling, true), 0);
    }
}
