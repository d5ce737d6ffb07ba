//! Slows a guest down that writes to memory faster than it can be sent.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::vcpus::Vcpus;

/// How often vCPUs are held: often enough that a guest's timers come late by little.
const PERIOD: Duration = Duration::from_millis(20);

/// A brake on the vCPUs of a VM, which is off at first, and when it is dropped.
#[derive(Debug)]
pub(super) struct Brake {
    /// For how much of each period they are held.
    percent: Arc<AtomicU8>,
    vcpus: Vcpus,
    hold: Option<(Sender<()>, JoinHandle<()>)>,
}

impl Brake {
    pub(super) fn new(vcpus: Vcpus) -> Self {
        Self {
            percent: Arc::default(),
            vcpus,
            hold: None,
        }
    }

    /// Takes so much of their time from the vCPUs.
    pub(super) fn set(&mut self, percent: u8) {
        self.percent.store(percent, Ordering::Relaxed);
        if self.hold.is_some() || percent == 0 {
            return;
        }
        let (stop, stopped) = channel();
        let (vcpus, percent) = (self.vcpus.clone(), self.percent.clone());
        let thread = thread::Builder::new().name("brake".into()).spawn(move || {
            while stopped.recv_timeout(PERIOD) == Err(RecvTimeoutError::Timeout) {
                vcpus.nap(PERIOD * percent.load(Ordering::Relaxed).min(99).into() / 100);
            }
        });
        match thread {
            Ok(thread) => self.hold = Some((stop, thread)),
            Err(error) => log::warn!("the guest cannot be slowed down: {error}"),
        }
    }
}

impl Drop for Brake {
    fn drop(&mut self) {
        if let Some((stop, thread)) = self.hold.take() {
            drop(stop);
            if thread.join().is_err() {
                log::error!("the thread that slows vCPUs down has panicked");
            }
        }
    }
}
