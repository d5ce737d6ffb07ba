//! Taking turns at a value.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// A value that one thread at a time has, possibly for as long as a device takes to answer. Unlike with a lock, who
/// waits for it gives up after a while.
#[derive(Debug)]
pub(super) struct Turn<T> {
    value: Mutex<Option<T>>,
    returned: Condvar,
}

impl<T> Turn<T> {
    pub(super) fn new(value: T) -> Self {
        Self {
            value: Mutex::new(Some(value)),
            returned: Condvar::new(),
        }
    }
    /// Calls `serve` with the value as soon as nobody else has it; `None` if that is not within `patience`.
    pub(super) fn take<R>(&self, patience: Duration, serve: impl FnOnce(&mut T) -> R) -> Option<R> {
        let value = self.lock();
        let (mut value, _) = self
            .returned
            .wait_timeout_while(value, patience, |value| value.is_none())
            .unwrap_or_else(PoisonError::into_inner);
        let mut taken = value.take()?;
        drop(value);
        let result = serve(&mut taken);
        *self.lock() = Some(taken);
        self.returned.notify_one();
        Some(result)
    }

    fn lock(&self) -> MutexGuard<'_, Option<T>> {
        self.value.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;
    use std::thread;

    #[test]
    fn who_waits_too_long_gives_up() {
        let turn = Turn::new(0);
        let (taken, is_taken) = mpsc::channel();
        let (give_back, wait) = mpsc::channel::<()>();
        thread::scope(|scope| {
            let turn = &turn;
            let holder = scope.spawn(move || {
                turn.take(Duration::ZERO, |value| {
                    taken.send(()).unwrap();
                    let _ = wait.recv();
                    *value += 1;
                })
            });
            is_taken.recv().unwrap();
            assert_eq!(turn.take(Duration::from_millis(1), |value| *value), None);
            drop(give_back);
            assert_eq!(turn.take(Duration::from_secs(60), |value| *value), Some(1));
            assert_eq!(holder.join().unwrap(), Some(()));
        });
    }
}
