//! Whether the lab runs at all. Its CPU is emulated, and may run one thread for minutes and no other: what is not done in
//! time then says nothing about who was to do it.

use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// How often it beats.
const PERIOD: Duration = Duration::from_secs(1);

/// A thread that wants to run once a second, and notices when it does not.
#[derive(Debug)]
pub(super) struct Heartbeat {
    stop: Sender<()>,
    thread: JoinHandle<Duration>,
}

impl Heartbeat {
    pub(super) fn start() -> Self {
        let (stop, stopped) = channel();
        let thread = thread::spawn(move || {
            let mut longest = Duration::ZERO;
            loop {
                let before = Instant::now();
                let heard = stopped.recv_timeout(PERIOD);
                longest = longest.max(before.elapsed());
                if heard != Err(RecvTimeoutError::Timeout) {
                    return longest.saturating_sub(PERIOD);
                }
            }
        });
        Self { stop, thread }
    }

    /// For how long it could not run, at the longest.
    pub(super) fn stop(self) -> Duration {
        drop(self.stop);
        self.thread.join().unwrap_or_default()
    }
}
