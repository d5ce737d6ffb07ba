//! What the server has been told to keep: the one place that knows what a fresh server would have to be told.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use crate::client::Client;
use crate::error::ConnError;
use crate::irqs::{IrqAction, Irqs};
use crate::maps::DmaAccess;

/// The memory and the events that the server of a device has been given.
///
/// What [`Client::setup`] returns stays when the connection is lost, and can be [applied](Self::apply) to a connection
/// to another server, which then can do what the first one could. It holds descriptors of its own. What is masked is not
/// in it, for devices mask interrupts too.
#[derive(Clone, Debug, Default)]
pub struct Setup {
    pub(crate) maps: BTreeMap<u64, Map>,
    /// By the kind of interrupt and the number of the interrupt.
    pub(crate) events: BTreeMap<(u32, u32), Arc<OwnedFd>>,
    /// The events that unmask an interrupt.
    pub(crate) unmask_events: BTreeMap<(u32, u32), Arc<OwnedFd>>,
}

/// Memory that the device has, at the address that is the key.
#[derive(Clone, Debug)]
pub(crate) struct Map {
    pub(crate) size: u64,
    /// The file and the offset in it, in bytes.
    pub(crate) file: Option<(Arc<OwnedFd>, u64)>,
    pub(crate) access: DmaAccess,
}

impl Setup {
    /// Gives all of it to the server of another connection, memory first.
    ///
    /// # Errors
    ///
    /// As of [`Client::dma_map`] and [`Client::set_irqs`]. What was given before the error stays given.
    pub fn apply(&self, client: &Client) -> Result<(), ConnError> {
        for (&iova, Map { size, file, access }) in &self.maps {
            let file = file.as_ref().map(|(file, offset)| (file.as_fd(), *offset));
            client.dma_map(iova, *size, file, *access)?;
        }
        for (action, events) in [
            (IrqAction::Trigger, &self.events),
            (IrqAction::Unmask, &self.unmask_events),
        ] {
            let all: Vec<_> = events.iter().collect();
            let follows = |((index, irq), _): &(&(u32, u32), _), (next, _): &(&(u32, u32), _)| {
                *next == &(*index, irq + 1)
            };
            for run in all.chunk_by(follows) {
                let events: Vec<_> = run.iter().map(|(_, event)| event.as_fd()).collect();
                if let Some(&(&(index, start), _)) = run.first() {
                    client.set_irqs(index, start, action, Irqs::Events(&events))?;
                }
            }
        }
        Ok(())
    }

    /// The event that the device signals for an interrupt, by its kind and its number.
    pub fn event(&self, index: u32, irq: u32) -> Option<&Arc<OwnedFd>> {
        self.events.get(&(index, irq))
    }

    /// The interrupts of a kind that have an event, by their numbers.
    pub fn events_of(&self, index: u32) -> impl Iterator<Item = (u32, &Arc<OwnedFd>)> {
        let events = self.events.range((index, 0)..=(index, u32::MAX));
        events.map(|((_, irq), event)| (*irq, event))
    }

    /// The event that unmasks an interrupt.
    pub fn unmask_event(&self, index: u32, irq: u32) -> Option<&Arc<OwnedFd>> {
        self.unmask_events.get(&(index, irq))
    }

    /// How many pieces of memory the device has.
    pub fn maps(&self) -> usize {
        self.maps.len()
    }

    /// How many interrupts have an event that the device signals.
    pub fn events(&self) -> usize {
        self.events.len()
    }

    pub(crate) fn add_map(&mut self, iova: u64, map: Map) {
        self.maps.insert(iova, map);
    }

    pub(crate) fn remove_map(&mut self, iova: u64) {
        self.maps.remove(&iova);
    }

    pub(crate) fn remove_maps(&mut self) {
        self.maps.clear();
    }

    /// Notes the events of interrupts of a kind from `start` on.
    pub(crate) fn add_events(
        &mut self,
        index: u32,
        start: u32,
        action: IrqAction,
        events: Vec<Arc<OwnedFd>>,
    ) {
        let all = match action {
            IrqAction::Trigger => &mut self.events,
            IrqAction::Unmask => &mut self.unmask_events,
            IrqAction::Mask => return,
        };
        all.extend((start..).map(|irq| (index, irq)).zip(events));
    }

    /// Forgets all events of a kind.
    pub(crate) fn remove_events(&mut self, index: u32) {
        self.events.retain(|(kind, _), _| *kind != index);
        self.unmask_events.retain(|(kind, _), _| *kind != index);
    }
}
