//! The way from a device's events to the guest's interrupt controllers, which the machine provides.

use std::fmt;
use std::os::fd::{BorrowedFd, OwnedFd};

use pci::{Cause, InterruptPin, Vectors};

/// Gives an endpoint its interrupts.
pub trait InterruptSource: Send + Sync + fmt::Debug {
    /// The vectors of one MSI or MSI-X capability. Dropping them gives all they use back.
    fn vectors(&self, count: u16) -> Result<Box<dyn EventVectors>, Cause>;

    /// Connects an event to the interrupt line that `pin` of this function leads to. Dropping it disconnects it. If the
    /// device has events already, which may have been signalled, the line is disconnected at first.
    fn line(&self, pin: InterruptPin, events: LineEvents) -> Result<Box<dyn InterruptLine>, Cause>;
}

/// The events of a line that its device has already. Others are made.
#[derive(Debug, Default)]
pub struct LineEvents {
    /// What the device signals.
    pub trigger: Option<OwnedFd>,
    /// What tells the device that the guest has served the interrupt.
    pub resample: Option<OwnedFd>,
}

impl LineEvents {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.trigger.is_none() && self.resample.is_none()
    }
}

/// Vectors that a device signals through events.
pub trait EventVectors: Vectors {
    /// The event that sends this vector's message.
    fn event(&self, vector: u16) -> Result<BorrowedFd<'_>, Cause>;

    /// Has a vector that nothing has been done with yet use this event, which its device has already.
    fn adopt(&self, vector: u16, event: OwnedFd) -> Result<(), Cause>;

    /// Takes all vectors off the interrupt controllers, or, if `connected`, connects them again, as they are at first.
    /// Meanwhile every vector is [pending](Vectors::pending) that is signalled, and is sent once when it is connected
    /// again.
    fn set_connected(&self, connected: bool) -> Result<(), Cause>;
}

/// A level-triggered interrupt line: signalled, it stays asserted until the guest has served the interrupt.
pub trait InterruptLine: Send + Sync + fmt::Debug {
    /// What the device signals.
    fn trigger(&self) -> BorrowedFd<'_>;

    /// What is signalled when the guest has served the interrupt, and the line is down again.
    fn resample(&self) -> BorrowedFd<'_>;

    /// Takes the line off the interrupt controllers, where it goes down, or, if `connected`, connects it again, as it is
    /// at first. If it was signalled meanwhile, it is asserted then; whether it was asserted before is forgotten.
    fn set_connected(&self, connected: bool) -> Result<(), Cause>;
}
