//! Interrupts: which vectors the kernel has events for.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use vfio_bindings::bindings::vfio::VFIO_IRQ_SET_ACTION_TRIGGER;

use super::{KernelError, ioctls};
use crate::backend::Irq;

/// The MSI-X vectors of a device, as the kernel has them.
///
/// A kernel that adds vectors one by one (since Linux 6.4) is asked for just those that the guest uses. An older one
/// has to be given all of them again whenever there is one with a higher number.
#[derive(Debug, Default)]
pub(super) struct Vectors {
    /// Whether vectors cannot be added one by one (`VFIO_IRQ_INFO_NORESIZE`).
    fixed: bool,
    /// The events of the vectors that a kernel which cannot add any has.
    events: Vec<Option<OwnedFd>>,
}

/// What is to be told to the kernel.
#[derive(Debug, PartialEq, Eq)]
enum Plan {
    /// The new events only.
    Add,
    /// All events, after all were taken away.
    Again,
}

impl Vectors {
    pub(super) fn new(fixed: bool) -> Self {
        Self {
            fixed,
            events: Vec::new(),
        }
    }

    /// Has the device signal `events` for its vectors from `first` on. No events just enable the kind.
    pub(super) fn arm(
        &mut self,
        device: BorrowedFd<'_>,
        first: u16,
        events: &[BorrowedFd<'_>],
    ) -> Result<(), KernelError> {
        if !self.fixed {
            return arm(device, Irq::Msix, first, events);
        }
        let plan = self.plan(first, events.len());
        self.keep(first, events)?;
        match plan {
            Plan::Add => arm(device, Irq::Msix, first, events),
            Plan::Again => self.arm_again(device),
        }
    }

    /// Takes all events away.
    pub(super) fn disarm(&mut self, device: BorrowedFd<'_>) -> Result<(), KernelError> {
        self.events.clear();
        disarm(device, Irq::Msix)
    }

    fn plan(&self, first: u16, count: usize) -> Plan {
        let end = usize::from(first) + count;
        if self.events.is_empty() || end <= self.events.len() {
            Plan::Add
        } else {
            Plan::Again
        }
    }

    fn keep(&mut self, first: u16, events: &[BorrowedFd<'_>]) -> Result<(), KernelError> {
        let first = usize::from(first);
        let end = (first + events.len()).max(1);
        if self.events.len() < end {
            self.events.resize_with(end, || None);
        }
        for (slot, event) in self.events.iter_mut().skip(first).zip(events) {
            let event = event
                .try_clone_to_owned()
                .map_err(KernelError::step("give this process one more descriptor"))?;
            *slot = Some(event);
        }
        Ok(())
    }

    fn arm_again(&self, device: BorrowedFd<'_>) -> Result<(), KernelError> {
        disarm(device, Irq::Msix)?;
        let events: Vec<_> = self
            .events
            .iter()
            .map(|event| event.as_ref().map(AsFd::as_fd))
            .collect();
        set(device, Irq::Msix, 0, &events)?;
        // What a device signalled meanwhile is lost. One interrupt too many does no harm.
        for event in self.events.iter().flatten() {
            let _ = rustix::io::write(event, &1_u64.to_ne_bytes());
        }
        Ok(())
    }
}

/// Has the device signal `events` for its vectors from `first` on. No events just enable the kind.
pub(super) fn arm(
    device: BorrowedFd<'_>,
    irq: Irq,
    first: u16,
    events: &[BorrowedFd<'_>],
) -> Result<(), KernelError> {
    if events.is_empty() {
        return set(device, irq, 0, &[None]);
    }
    let events: Vec<_> = events.iter().map(|event| Some(*event)).collect();
    set(device, irq, first, &events)
}

/// Takes all events of a kind away.
pub(super) fn disarm(device: BorrowedFd<'_>, irq: Irq) -> Result<(), KernelError> {
    ioctls::set_irqs(device, VFIO_IRQ_SET_ACTION_TRIGGER, irq.index(), 0)
        .map_err(KernelError::step("disable the device's interrupts"))
}

fn set(
    device: BorrowedFd<'_>,
    irq: Irq,
    first: u16,
    events: &[Option<BorrowedFd<'_>>],
) -> Result<(), KernelError> {
    let trigger = VFIO_IRQ_SET_ACTION_TRIGGER;
    let set = |events| {
        ioctls::set_irq_events(device, trigger, irq.index(), first.into(), events)
            .map_err(KernelError::step("have the device signal events"))
    };
    let available = set(events)?;
    if available == 0 {
        return Ok(());
    }
    log::warn!(
        "the host has {available} interrupt vectors for a device that is to have {}",
        events.len()
    );
    let some = events.get(..available as usize).unwrap_or(events);
    set(some).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vectors_are_given_again_when_there_is_a_higher_one() {
        let event = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
        let mut vectors = Vectors::new(true);
        assert_eq!(vectors.plan(0, 0), Plan::Add);
        vectors.keep(0, &[]).unwrap();
        assert_eq!(vectors.plan(0, 1), Plan::Add);
        vectors.keep(0, &[event.as_fd()]).unwrap();
        assert_eq!(vectors.plan(3, 2), Plan::Again);
        vectors.keep(3, &[event.as_fd(), event.as_fd()]).unwrap();
        let has = |vectors: &Vectors| {
            let has: Vec<_> = vectors.events.iter().map(Option::is_some).collect();
            has
        };
        assert_eq!(has(&vectors), [true, false, false, true, true]);
        assert_eq!(vectors.plan(1, 1), Plan::Add);
        assert_eq!(vectors.plan(4, 2), Plan::Again);
    }
}
