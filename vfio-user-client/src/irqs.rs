//! Interrupts.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

use vfio_user_protocol::{Command, IrqSet, IrqSetFlags};
use zerocopy::IntoBytes;

use crate::calls::Expected;
use crate::client::Client;
use crate::connection::Request;
use crate::error::ConnError;

/// What to do with interrupts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IrqAction {
    /// Keep them from being signalled.
    Mask,
    /// Let them be signalled again.
    Unmask,
    /// Signal them.
    Trigger,
}

/// Which interrupts to do something with, from the first of a range on, and when.
#[derive(Clone, Copy, Debug)]
pub enum Irqs<'a> {
    /// As many as this, now.
    All(u32),
    /// Those whose byte is not 0, now.
    Chosen(&'a [u8]),
    /// Each when its eventfd is signalled; [`IrqAction::Trigger`]: signal its eventfd when the device triggers it.
    Events(&'a [BorrowedFd<'a>]),
}

impl Client {
    /// Lets the device signal `events` for the interrupts of a kind from `start` on.
    ///
    /// An event stays until it is replaced or the whole kind is [disabled](Self::disable_irqs). libvfio-user keeps one
    /// table for INTx, MSI and MSI-X: disable one kind before another is enabled.
    ///
    /// # Errors
    ///
    /// [`ConnError::Limit`] if the server takes no descriptors, and those that every call has.
    pub fn set_irq_events(
        &self,
        index: u32,
        start: u32,
        events: &[BorrowedFd<'_>],
    ) -> Result<(), ConnError> {
        self.set_irqs(index, start, IrqAction::Trigger, Irqs::Events(events))
    }

    /// Takes all events from the interrupts of a kind, of which there must be at least one.
    ///
    /// # Errors
    ///
    /// [`ConnError`], as for every call.
    pub fn disable_irqs(&self, index: u32) -> Result<(), ConnError> {
        self.set_irqs(index, 0, IrqAction::Trigger, Irqs::All(0))
    }

    /// Unmasks `count` interrupts from `start` on.
    ///
    /// # Errors
    ///
    /// [`ConnError`], as for every call.
    pub fn unmask_irq(&self, index: u32, start: u32, count: u32) -> Result<(), ConnError> {
        self.set_irqs(index, start, IrqAction::Unmask, Irqs::All(count))
    }

    /// Lets the device unmask the first interrupt of a kind whenever `event` is signalled.
    ///
    /// # Errors
    ///
    /// [`ConnError::Limit`] if the server takes no descriptors, and those that every call has.
    pub fn unmask_irq_by_event(&self, index: u32, event: BorrowedFd<'_>) -> Result<(), ConnError> {
        self.set_irqs(index, 0, IrqAction::Unmask, Irqs::Events(&[event]))
    }

    /// Does something with the interrupts of a kind from `start` on. More events than the server takes at once go in
    /// several messages, of which those before a failed one have had their effect.
    ///
    /// # Errors
    ///
    /// [`ConnError::Limit`] if the server takes no descriptors, or more than 32 thousand interrupts are chosen,
    /// [`ConnError::System`] if this process can have no more descriptors, and those that every call has.
    pub fn set_irqs(
        &self,
        index: u32,
        start: u32,
        action: IrqAction,
        irqs: Irqs<'_>,
    ) -> Result<(), ConnError> {
        let flags = match action {
            IrqAction::Mask => IrqSetFlags::ACTION_MASK,
            IrqAction::Unmask => IrqSetFlags::ACTION_UNMASK,
            IrqAction::Trigger => IrqSetFlags::ACTION_TRIGGER,
        };
        match irqs {
            Irqs::All(count) => {
                let set = IrqSet::new(flags | IrqSetFlags::DATA_NONE, index, start, count, 0);
                self.send_irqs(&set, &[], &[])?;
                if action == IrqAction::Trigger && count == 0 {
                    self.lock_setup().remove_events(index);
                }
                Ok(())
            }
            Irqs::Chosen(chosen) => {
                let count = length(chosen)?;
                let set = IrqSet::new(flags | IrqSetFlags::DATA_BOOL, index, start, count, count);
                self.send_irqs(&set, chosen, &[])
            }
            Irqs::Events(events) => {
                if self.limits.max_msg_fds == 0 {
                    return Err(ConnError::Limit("it takes no descriptors"));
                }
                let mut start = start;
                for events in events.chunks(self.limits.max_msg_fds) {
                    let count = length(events)?;
                    let set =
                        IrqSet::new(flags | IrqSetFlags::DATA_EVENTFD, index, start, count, 0);
                    let kept = keep(events)?;
                    self.send_irqs(&set, &[], events)?;
                    self.lock_setup().add_events(index, start, action, kept);
                    start = start.saturating_add(count);
                }
                Ok(())
            }
        }
    }

    fn send_irqs(
        &self,
        set: &IrqSet,
        data: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), ConnError> {
        let request = Request {
            command: Command::DeviceSetIrqs,
            head: set.as_bytes(),
            data,
            fds,
            expected: Expected { payload: 0, fds: 0 },
        };
        self.call(&request, self.deadlines.control).map(drop)
    }
}

/// Descriptors of our own for the events.
fn keep(events: &[BorrowedFd<'_>]) -> Result<Vec<Arc<OwnedFd>>, ConnError> {
    let keep = |event: &BorrowedFd<'_>| event.try_clone_to_owned().map(Arc::new);
    let kept = events.iter().map(keep).collect::<Result<_, _>>();
    kept.map_err(ConnError::System)
}

/// The length of a list that goes into one message.
fn length<T>(list: &[T]) -> Result<u32, ConnError> {
    u32::try_from(list.len()).map_err(|_| ConnError::Limit("too many interrupts"))
}
