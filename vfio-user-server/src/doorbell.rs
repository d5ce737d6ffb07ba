//! Doorbells: writes that signal an eventfd, by message or without one.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::{EventfdFlags, eventfd};

use crate::description::Doorbell;
use crate::eventfd;

/// The device's doorbells.
///
/// The library calls [`Device::doorbell`](crate::Device::doorbell) when one rings, unless a thread of the device has
/// [taken](Self::take) it to wait for it itself.
#[derive(Clone, Debug)]
pub struct Doorbells(Arc<[Bell]>);

#[derive(Debug)]
struct Bell {
    place: Doorbell,
    event: Arc<OwnedFd>,
    taken: AtomicBool,
}

/// A doorbell that a thread of the device waits for. It is readable when it has rung.
#[derive(Clone, Debug)]
pub struct DoorbellEvent(Arc<OwnedFd>);

impl Doorbells {
    pub(crate) fn new(places: &[Doorbell]) -> io::Result<Self> {
        let bells = places.iter().map(|place| {
            let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
            Ok(Bell {
                place: *place,
                event: Arc::new(event),
                taken: AtomicBool::new(false),
            })
        });
        Ok(Self(bells.collect::<io::Result<_>>()?))
    }

    /// Takes a doorbell from the library. `None` if there is none of this number, or it is taken.
    ///
    /// Whoever takes it does not read it while the device is [stopped](crate::Device::stop): what rings then is for the
    /// client to find, and to ring again where the device runs next.
    pub fn take(&self, doorbell: usize) -> Option<DoorbellEvent> {
        let bell = self.0.get(doorbell)?;
        let was_taken = bell.taken.swap(true, Ordering::SeqCst);
        (!was_taken).then(|| DoorbellEvent(Arc::clone(&bell.event)))
    }

    /// The number of the doorbell that a write rings.
    pub(crate) fn find(&self, bar: usize, offset: u64, data: &[u8]) -> Option<usize> {
        let rings = |bell: &Bell| {
            let Doorbell {
                bar: its_bar,
                offset: its_offset,
                size,
                value,
            } = bell.place;
            let matches = |value: u64| value.to_le_bytes().starts_with(data);
            usize::from(its_bar) == bar
                && its_offset == offset
                && usize::from(size) == data.len()
                && value.is_none_or(matches)
        };
        self.0.iter().position(rings)
    }

    /// Makes it as if the eventfd of a doorbell had been signalled by the guest.
    pub(crate) fn ring(&self, doorbell: usize) {
        if let Some(bell) = self.0.get(doorbell) {
            eventfd::signal(&bell.event);
        }
    }

    /// Whether the library waits for a doorbell itself.
    pub(crate) fn is_watched(&self, doorbell: usize) -> bool {
        let bell = self.0.get(doorbell);
        bell.is_some_and(|bell| !bell.taken.load(Ordering::SeqCst))
    }

    /// The eventfds that the library waits for, and the numbers of their doorbells.
    pub(crate) fn watched(&self) -> impl Iterator<Item = (usize, BorrowedFd<'_>)> {
        let bells = self.0.iter().enumerate();
        let watched = bells.filter(|(_, bell)| !bell.taken.load(Ordering::SeqCst));
        watched.map(|(number, bell)| (number, bell.event.as_fd()))
    }

    /// Those in a BAR, with their eventfds.
    pub(crate) fn in_bar(&self, bar: usize) -> impl Iterator<Item = (Doorbell, &Arc<OwnedFd>)> {
        let bells = self.0.iter();
        let in_bar = bells.filter(move |bell| usize::from(bell.place.bar) == bar);
        in_bar.map(|bell| (bell.place, &bell.event))
    }
}

impl DoorbellEvent {
    /// Returns whether the doorbell has rung since the last time. It does not block.
    pub fn has_rung(&self) -> bool {
        eventfd::drain(&self.0).unwrap_or(false)
    }
}

impl AsFd for DoorbellEvent {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
