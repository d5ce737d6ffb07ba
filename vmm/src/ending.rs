//! How a run of the guest ends, and who hears of it.

use std::fmt;
use std::io;
use std::sync::{Mutex, PoisonError};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// How a run of the guest ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ending {
    /// The guest switched itself off.
    PowerOff,
    /// The guest reset itself.
    Reset,
    /// A vCPU met a fault while it handled a double fault: a guest that has lost its way.
    TripleFault {
        /// The vCPU.
        vcpu: u32,
    },
    /// KVM cannot run the guest any further.
    KvmError {
        /// The vCPU.
        vcpu: u32,
        /// What KVM says, and where the guest was.
        what: String,
    },
    /// It goes on elsewhere.
    Departed,
    /// The user ended it.
    Quit,
}

impl Ending {
    /// The exit status that tells scripts which it was. (1 is a VM that did not come to run, or not through a reset.)
    pub fn exit_status(&self) -> u8 {
        match self {
            Self::PowerOff | Self::Departed | Self::Quit => 0,
            Self::Reset => 3,
            Self::TripleFault { .. } => 4,
            Self::KvmError { .. } => 5,
        }
    }

    /// Its name in events.
    pub(crate) fn event(&self) -> &'static str {
        match self {
            Self::PowerOff => "power-off",
            Self::Reset => "reset",
            Self::TripleFault { .. } => "triple-fault",
            Self::KvmError { .. } => "kvm-error",
            Self::Departed => "departed",
            Self::Quit => "quit",
        }
    }
}

impl fmt::Display for Ending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PowerOff => write!(f, "the guest powered off"),
            Self::Reset => write!(f, "the guest reset"),
            Self::TripleFault { vcpu } => {
                write!(f, "the guest crashed: triple fault on vCPU {vcpu}")
            }
            Self::KvmError { vcpu, what } => write!(f, "KVM cannot go on with vCPU {vcpu}: {what}"),
            Self::Departed => write!(f, "the guest goes on elsewhere"),
            Self::Quit => write!(f, "ended by the user"),
        }
    }
}

/// Where whoever sees the run end says so. The first to do so is heard.
#[derive(Debug)]
pub(crate) struct Endings {
    first: Mutex<Option<Ending>>,
    event: EventFd,
}

impl Endings {
    pub(crate) fn new() -> io::Result<Self> {
        let event = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?;
        Ok(Self {
            first: Mutex::default(),
            event,
        })
    }

    /// Says that the run has ended.
    pub(crate) fn report(&self, ending: Ending) {
        let mut first = self.first.lock().unwrap_or_else(PoisonError::into_inner);
        if first.is_none() {
            *first = Some(ending);
            self.wake();
        }
    }

    /// Wakes whoever waits, although the run goes on.
    pub(crate) fn wake(&self) {
        if let Err(error) = self.event.write(1) {
            log::error!("cannot wake the main thread: {error}");
        }
    }

    /// Is signalled when there may be something to [`Endings::take`].
    pub(crate) fn event(&self) -> &EventFd {
        &self.event
    }

    /// Forgets what the guest of a run that is over has done. What the user wants stays.
    pub(crate) fn forget_guest(&self) {
        let mut first = self.first.lock().unwrap_or_else(PoisonError::into_inner);
        if first.as_ref().is_some_and(|ending| *ending != Ending::Quit) {
            *first = None;
        }
    }

    /// How the run ended, if it has; the next run may then end in its own way.
    pub(crate) fn take(&self) -> Option<Ending> {
        let _ = self.event.read();
        self.first
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_ending_is_heard() {
        let endings = Endings::new().unwrap();
        assert_eq!(endings.take(), None);
        endings.report(Ending::Reset);
        endings.report(Ending::PowerOff);
        assert_eq!(endings.take(), Some(Ending::Reset));
        assert_eq!(endings.take(), None);
        assert!(endings.event().read().is_err(), "the event is drained");
    }

    #[test]
    fn what_the_user_wants_outlives_the_guest() {
        let endings = Endings::new().unwrap();
        for (ending, rest) in [(Ending::PowerOff, None), (Ending::Quit, Some(Ending::Quit))] {
            endings.report(ending);
            endings.forget_guest();
            assert_eq!(endings.take(), rest);
        }
    }

    #[test]
    fn endings_are_told_apart() {
        let what = String::new();
        let endings = [
            Ending::PowerOff,
            Ending::Reset,
            Ending::TripleFault { vcpu: 0 },
            Ending::KvmError { vcpu: 0, what },
        ];
        let statuses: std::collections::BTreeSet<_> =
            endings.iter().map(Ending::exit_status).collect();
        assert_eq!(statuses.len(), endings.len());
        assert!(!statuses.contains(&1));
    }
}
