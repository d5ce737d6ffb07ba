//! One interrupt, and what `DEVICE_SET_IRQS` does with several.

use std::os::fd::OwnedFd;

use rustix::io::Errno;
use vfio_user_protocol::IrqSetFlags;

use crate::eventfd;

/// One interrupt.
#[derive(Debug, Default)]
pub(super) struct Vector {
    pub(super) event: Option<OwnedFd>,
    pub(super) masked: bool,
    /// Whether it has been triggered while it could not be signalled.
    pub(super) pending: bool,
}

impl Vector {
    /// Signals it, or remembers that it should be.
    pub(super) fn trigger(&mut self) {
        match &self.event {
            Some(event) if !self.masked => eventfd::signal(event),
            _ => self.pending = true,
        }
    }

    pub(super) fn unmask(&mut self) {
        self.masked = false;
        self.catch_up();
    }

    /// Signals it if it should have been.
    fn catch_up(&mut self) {
        if self.pending && self.event.is_some() && !self.masked {
            self.pending = false;
            self.signal();
        }
    }

    pub(super) fn signal(&self) {
        if let Some(event) = &self.event {
            eventfd::signal(event);
        }
    }
}

/// Assigns the vectors their eventfds, or takes them away if there are none.
pub(super) fn assign(vectors: &mut [Vector], fds: Vec<OwnedFd>) {
    let events = fds
        .into_iter()
        .map(Some)
        .chain(std::iter::repeat_with(|| None));
    for (vector, event) in vectors.iter_mut().zip(events) {
        vector.masked &= event.is_some();
        vector.event = event;
        vector.catch_up();
    }
}

/// The action, and what says to which vectors it applies: exactly one of each.
pub(super) fn parse_flags(flags: u32) -> Result<(IrqSetFlags, IrqSetFlags), Errno> {
    let flags = IrqSetFlags::from_bits(flags).ok_or(Errno::INVAL)?;
    let sources = IrqSetFlags::DATA_NONE | IrqSetFlags::DATA_BOOL | IrqSetFlags::DATA_EVENTFD;
    let (source, action) = (flags & sources, flags - sources);
    let one = |flags: IrqSetFlags| flags.bits().is_power_of_two();
    if one(source) && one(action) {
        Ok((action, source))
    } else {
        Err(Errno::INVAL)
    }
}

/// Which of `count` vectors are meant.
pub(super) fn chosen(source: IrqSetFlags, data: &[u8], count: usize) -> Result<Vec<bool>, Errno> {
    if source == IrqSetFlags::DATA_NONE {
        return Ok(vec![true; count]);
    }
    let data = data.get(..count).ok_or(Errno::INVAL)?;
    Ok(data.iter().map(|byte| *byte != 0).collect())
}
