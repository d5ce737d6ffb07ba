//! Changing a device's state, and what becomes of it when that fails.
//!
//! A device that fails to get somewhere may have stopped anywhere on the way, or be in [`DeviceState::Error`], which
//! only a reset ends. So it is asked where it is, brought back where it can wait if there is such a place, and reset as
//! the last resort. Whoever asked is told which of these it came to: after a reset the device runs, but is not any more
//! what the guest thinks it is.

use pci::Cause;
use vfio_user_client::{ConnError, DeviceState};

use super::Migration;
use crate::backend::BackendError;

/// Where a device goes that does not get where it should.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fallback {
    /// Into this state, with what it knows.
    State(DeviceState),
    /// Through a reset: what it knows is worthless.
    Reset,
}

impl Fallback {
    /// What is best for a device on its way from `from` to `to`: one that was to be stopped and saved goes on to run,
    /// and one that was to be restored, or to run, is reset.
    pub fn of(from: DeviceState, to: DeviceState) -> Self {
        use DeviceState::{
            Error, PreCopy, PreCopyP2p, Resuming, Running, RunningP2p, Stop, StopCopy,
        };
        match (from, to) {
            (Error | Resuming, _) | (_, Error | Resuming | Running) => Self::Reset,
            (_, Stop | StopCopy | RunningP2p | PreCopy | PreCopyP2p) => Self::State(Running),
        }
    }
}

/// Where a device has been left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Left {
    /// In the state to fall back to, with what it knew.
    FellBack(DeviceState),
    /// In this state, usually [`DeviceState::Running`], as after a reset.
    Reset(DeviceState),
    /// Nobody knows where, or in a state that nothing gets it out of.
    Stuck,
}

/// A device could not be brought into a state.
#[derive(Debug, thiserror::Error)]
#[error("the device does not get into the state {target:?}; {}", describe(*left))]
pub struct TransitionError {
    /// Where it should have been.
    pub target: DeviceState,
    /// Where it is.
    pub left: Left,
    /// Why it is not where it should be.
    #[source]
    pub source: BackendError,
}

fn describe(left: Left) -> String {
    match left {
        Left::FellBack(state) => format!("it is in the state {state:?}"),
        Left::Reset(state) => format!("it has been reset, and is in the state {state:?}"),
        Left::Stuck => "it does not get into any other either".to_owned(),
    }
}

/// Brings a device into a state. If it does not get there, it falls back, and `reset` resets it if need be.
pub fn transition(
    device: &dyn Migration,
    target: DeviceState,
    fallback: Fallback,
    reset: impl FnOnce() -> Result<(), Cause>,
) -> Result<(), TransitionError> {
    let Err(source) = device.set_state(target) else {
        return Ok(());
    };
    // The answer may just have taken too long.
    if is_late(&source) && matches!(device.state(), Ok(state) if state == target) {
        return Ok(());
    }
    let left = fall_back(device, fallback, reset);
    Err(TransitionError {
        target,
        left,
        source,
    })
}

fn fall_back(
    device: &dyn Migration,
    fallback: Fallback,
    reset: impl FnOnce() -> Result<(), Cause>,
) -> Left {
    if let Fallback::State(state) = fallback
        && is_or_gets(device, state)
    {
        return Left::FellBack(state);
    }
    if let Err(error) = reset() {
        log::debug!("the device does not even reset: {error}");
        return Left::Stuck;
    }
    match device.state() {
        // libvfio-user's devices keep their state through a reset.
        Ok(DeviceState::Error) | Err(_) => Left::Stuck,
        Ok(state) => Left::Reset(state),
    }
}

/// Whether the device is in a state, or can be brought into it from where it is.
fn is_or_gets(device: &dyn Migration, state: DeviceState) -> bool {
    match device.state() {
        Ok(now) if now == state => true,
        // Only a reset gets it out of an error.
        Ok(DeviceState::Error) | Err(_) => false,
        Ok(_) => device.set_state(state).is_ok(),
    }
}

fn is_late(error: &BackendError) -> bool {
    matches!(error, BackendError::Remote(ConnError::TimedOut { .. }))
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::io;
    use std::ops::Range;
    use std::sync::Mutex;
    use std::time::Duration;

    use DeviceState::{Error, PreCopy, Resuming, Running, RunningP2p, Stop, StopCopy};
    use vfio_user_client::{Command, MigrationFlags};

    use super::*;
    use crate::migration::{Chunk, Next};

    /// A device that goes wherever it is told, except where it fails.
    #[derive(Debug)]
    struct Mock(Mutex<Inner>);

    #[derive(Debug)]
    struct Inner {
        state: DeviceState,
        /// States that it does not get into, and where it ends up instead.
        failures: Vec<(DeviceState, DeviceState)>,
        /// Whether it says where it is.
        answers: bool,
        /// Whether its failures are late answers.
        late: bool,
    }

    impl Mock {
        fn new(state: DeviceState, failures: &[(DeviceState, DeviceState)]) -> Self {
            Self(Mutex::new(Inner {
                state,
                failures: failures.to_vec(),
                answers: true,
                late: false,
            }))
        }

        fn error(late: bool) -> BackendError {
            let error = if late {
                ConnError::TimedOut {
                    command: Command::DeviceFeature,
                    limit: Duration::ZERO,
                }
            } else {
                ConnError::System(io::ErrorKind::InvalidInput.into())
            };
            error.into()
        }
    }

    impl Migration for Mock {
        fn flags(&self) -> MigrationFlags {
            MigrationFlags::all()
        }

        fn state(&self) -> Result<DeviceState, BackendError> {
            let inner = self.0.lock().unwrap();
            let state = inner.answers.then_some(inner.state);
            state.ok_or_else(|| Self::error(true))
        }

        fn set_state(&self, state: DeviceState) -> Result<(), BackendError> {
            let mut inner = self.0.lock().unwrap();
            let failure = inner.failures.iter().find(|(to, _)| *to == state).copied();
            inner.state = failure.map_or(state, |(_, end)| end);
            match failure {
                Some(_) => Err(Self::error(inner.late)),
                None => Ok(()),
            }
        }

        fn read(&self, _: &mut [u8]) -> Result<Chunk, BackendError> {
            Ok(Chunk {
                length: 0,
                next: Next::End,
            })
        }

        fn write(&self, _: &[u8]) -> Result<(), BackendError> {
            Ok(())
        }

        fn remaining(&self) -> Option<u64> {
            None
        }

        fn start_dirty(&self, page_size: u64, _: &[Range<u64>]) -> Result<u64, BackendError> {
            Ok(page_size)
        }

        fn dirty(&self, _: Range<u64>, _: u64) -> Result<Vec<u64>, BackendError> {
            Ok(Vec::new())
        }

        fn stop_dirty(&self) -> Result<(), BackendError> {
            Ok(())
        }
    }

    /// What a failed change leads to, whether the device was reset, and the state that it is in.
    fn outcome(device: &Mock, from: DeviceState, target: DeviceState) -> (Left, bool, DeviceState) {
        let was_reset = Cell::new(false);
        let reset = || {
            was_reset.set(true);
            device.0.lock().unwrap().state = Running;
            Ok(())
        };
        let failed = transition(device, target, Fallback::of(from, target), reset).unwrap_err();
        assert_eq!(failed.target, target);
        let state = device.0.lock().unwrap().state;
        (failed.left, was_reset.get(), state)
    }

    #[test]
    fn a_device_that_fails_goes_where_it_does_no_harm() {
        type Failures<'a> = &'a [(DeviceState, DeviceState)];
        let table: [(DeviceState, DeviceState, Failures<'_>, Left); 12] = [
            // It did not move.
            (Running, Stop, &[(Stop, Running)], Left::FellBack(Running)),
            (
                Running,
                PreCopy,
                &[(PreCopy, Running)],
                Left::FellBack(Running),
            ),
            // It got half of the way.
            (
                Running,
                StopCopy,
                &[(StopCopy, Stop)],
                Left::FellBack(Running),
            ),
            (
                Running,
                Stop,
                &[(Stop, RunningP2p)],
                Left::FellBack(Running),
            ),
            (
                PreCopy,
                StopCopy,
                &[(StopCopy, PreCopy)],
                Left::FellBack(Running),
            ),
            // It does not come back either.
            (
                Running,
                StopCopy,
                &[(StopCopy, Stop), (Running, Stop)],
                Left::Reset(Running),
            ),
            (
                PreCopy,
                StopCopy,
                &[(StopCopy, Stop), (Running, Error)],
                Left::Reset(Running),
            ),
            // It is in the error state, which nothing else ends.
            (Running, Stop, &[(Stop, Error)], Left::Reset(Running)),
            // What it has been given is worth nothing.
            (Stop, Resuming, &[(Resuming, Stop)], Left::Reset(Running)),
            (Resuming, Stop, &[(Stop, Resuming)], Left::Reset(Running)),
            (Resuming, Running, &[(Running, Stop)], Left::Reset(Running)),
            // There is nowhere to fall back to.
            (Stop, Running, &[(Running, Stop)], Left::Reset(Running)),
        ];
        for (from, target, failures, left) in table {
            let device = Mock::new(from, failures);
            let is_reset = matches!(left, Left::Reset(_));
            assert_eq!(
                outcome(&device, from, target),
                (left, is_reset, Running),
                "from {from:?} to {target:?} with {failures:?}"
            );
        }
    }

    #[test]
    fn a_device_that_arrives_is_left_alone() {
        let device = Mock::new(Running, &[]);
        transition(&device, StopCopy, Fallback::Reset, || unreachable!()).unwrap();
        assert_eq!(device.state().unwrap(), StopCopy);
    }

    #[test]
    fn a_late_answer_is_no_failure_if_the_device_has_arrived() {
        let device = Mock::new(Stop, &[(Running, Running)]);
        device.0.lock().unwrap().late = true;
        transition(&device, Running, Fallback::Reset, || unreachable!()).unwrap();
        // A refusal is one: the kernel may have had no descriptor for its data.
        device.0.lock().unwrap().late = false;
        assert_eq!(
            outcome(&device, Stop, Running),
            (Left::Reset(Running), true, Running)
        );
    }

    #[test]
    fn a_device_that_says_nothing_or_does_not_reset_is_stuck() {
        let device = Mock::new(Running, &[(Stop, Stop)]);
        device.0.lock().unwrap().answers = false;
        let (left, was_reset, _) = outcome(&device, Running, Stop);
        assert_eq!((left, was_reset), (Left::Stuck, true));

        let device = Mock::new(Running, &[(Stop, Error)]);
        let reset = || Err("it does not reset".into());
        let failed = transition(&device, Stop, Fallback::State(Running), reset).unwrap_err();
        assert_eq!(failed.left, Left::Stuck);
    }
}
