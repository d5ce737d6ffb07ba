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

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::test_machine::{Guest, Machine, ROUNDS, Rest, Timer, has_kvm};

    /// How fast the guest's rounds are, in rounds per second.
    fn speed(machine: &Machine) -> f64 {
        let (began, before) = (Instant::now(), machine.word(ROUNDS));
        thread::sleep(Duration::from_millis(100));
        let rounds = machine.word(ROUNDS).wrapping_sub(before);
        f64::from(rounds) / began.elapsed().as_secs_f64()
    }

    #[test]
    fn vcpus_are_slower_on_the_brake_and_as_fast_as_before_without() {
        if !has_kvm() {
            return;
        }
        let guest = Guest::new(Timer::Periodic, Rest::Never, false);
        let mut machine = Machine::with_guest(2, &guest);
        machine.run();
        machine.wait_for_more(ROUNDS, 100);
        let (mut free, mut braked) = (0.0, 0.0);
        // Others may use the CPUs, now more, now less.
        for _ in 0..5 {
            free += speed(&machine);
            let mut brake = Brake::new(machine.vcpus.clone());
            brake.set(20);
            brake.set(80);
            braked += speed(&machine);
        }
        assert!(braked > 0.0 && braked < 0.6 * free, "{braked} of {free}");
        // It does not stand in the way of a pause, nor the other way round.
        let mut brake = Brake::new(machine.vcpus.clone());
        brake.set(99);
        for _ in 0..10 {
            machine.pause();
            machine.vcpus.resume();
            machine.wait_for_more(ROUNDS, 1);
        }
    }
}
