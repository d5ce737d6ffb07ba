//! The device's interrupts: the eventfds that the client has assigned, and the INTx line.

use std::fs::File;
use std::io::{self, ErrorKind, Write};
use std::ops::Range;

use guest::{MSI_VECTORS, MSIX_VECTORS};
use vfio_bindings::bindings::vfio::{
    VFIO_IRQ_INFO_AUTOMASKED, VFIO_IRQ_INFO_EVENTFD, VFIO_IRQ_INFO_MASKABLE,
    VFIO_IRQ_SET_ACTION_MASK, VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_IRQ_SET_ACTION_UNMASK,
    VFIO_IRQ_SET_DATA_EVENTFD, VFIO_IRQ_SET_DATA_NONE, VFIO_PCI_INTX_IRQ_INDEX,
    VFIO_PCI_MSI_IRQ_INDEX, VFIO_PCI_MSIX_IRQ_INDEX,
};
use vfio_user::IrqInfo;

use super::config::ConfigSpace;

/// Vectors of INTx, MSI, MSI-X, error and request interrupts, in the order of their indexes.
const COUNTS: [u16; 5] = [1, MSI_VECTORS, MSIX_VECTORS, 0, 0];

const INTX: usize = VFIO_PCI_INTX_IRQ_INDEX as usize;
const MSI: usize = VFIO_PCI_MSI_IRQ_INDEX as usize;
const MSIX: usize = VFIO_PCI_MSIX_IRQ_INDEX as usize;

/// What the client is told. INTx is masked by each interrupt until the client unmasks it.
pub(super) fn info() -> Vec<IrqInfo> {
    let info = |(index, count)| IrqInfo {
        index,
        flags: match index {
            VFIO_PCI_INTX_IRQ_INDEX => {
                VFIO_IRQ_INFO_EVENTFD | VFIO_IRQ_INFO_MASKABLE | VFIO_IRQ_INFO_AUTOMASKED
            }
            _ => VFIO_IRQ_INFO_EVENTFD,
        },
        count: u32::from(count),
    };
    (0..).zip(COUNTS).map(info).collect()
}

#[derive(Debug)]
pub(super) struct Interrupts {
    eventfds: [Vec<Option<File>>; 5],
    level: bool,
    masked: bool,
}

impl Default for Interrupts {
    fn default() -> Self {
        let eventfds = COUNTS.map(|count| (0..count).map(|_| None).collect());
        Self {
            eventfds,
            level: false,
            masked: false,
        }
    }
}

impl Interrupts {
    /// What SET_IRQS asks for.
    pub(super) fn set(
        &mut self,
        config: &ConfigSpace,
        index: u32,
        flags: u32,
        vectors: Range<u32>,
        fds: Vec<File>,
    ) -> io::Result<()> {
        let index = usize::try_from(index).map_err(|_| ErrorKind::InvalidInput)?;
        let vectors = vectors.start as usize..vectors.end as usize;
        let all = self
            .eventfds
            .get_mut(index)
            .ok_or(ErrorKind::InvalidInput)?;
        let disable = vectors.is_empty();
        let some = all.get_mut(vectors).ok_or(ErrorKind::InvalidInput)?;

        const NONE: u32 = VFIO_IRQ_SET_DATA_NONE;
        const EVENTFD: u32 = VFIO_IRQ_SET_DATA_EVENTFD;
        match (flags & !(NONE | EVENTFD), flags & (NONE | EVENTFD)) {
            (VFIO_IRQ_SET_ACTION_TRIGGER, NONE) if disable => all.fill_with(|| None),
            (VFIO_IRQ_SET_ACTION_TRIGGER, NONE) => some.iter().for_each(signal),
            (VFIO_IRQ_SET_ACTION_TRIGGER, EVENTFD) if fds.is_empty() => some.fill_with(|| None),
            (VFIO_IRQ_SET_ACTION_TRIGGER, EVENTFD) if fds.len() == some.len() => {
                some.iter_mut()
                    .zip(fds)
                    .for_each(|(slot, fd)| *slot = Some(fd));
            }
            (VFIO_IRQ_SET_ACTION_MASK, NONE) if index == INTX => self.masked = true,
            (VFIO_IRQ_SET_ACTION_UNMASK, NONE) if index == INTX => self.masked = false,
            _ => return Err(ErrorKind::InvalidInput.into()),
        }
        self.update_intx(config);
        Ok(())
    }

    /// Sends a message by whatever config space has enabled.
    pub(super) fn raise(&self, config: &ConfigSpace, vector: u32) {
        let index = match (config.is_msix_enabled(), config.is_msi_enabled()) {
            (true, _) => MSIX,
            (false, true) => MSI,
            (false, false) => {
                return log::warn!("vector {vector} is raised and nothing is enabled");
            }
        };
        match self.eventfds[index].get(vector as usize) {
            Some(eventfd @ Some(_)) => signal(eventfd),
            _ => log::warn!("vector {vector} is raised and has no eventfd"),
        }
    }

    /// The level of the INTx line.
    pub(super) fn level(&self) -> bool {
        self.level
    }

    /// Sets the level of the INTx line.
    pub(super) fn set_level(&mut self, config: &ConfigSpace, level: bool) {
        self.level = level;
        self.update_intx(config);
    }

    /// Interrupts while the line is high and nothing is in the way.
    pub(super) fn update_intx(&mut self, config: &ConfigSpace) {
        let message = config.is_msix_enabled() || config.is_msi_enabled();
        log::debug!(
            "INTx: level {}, masked {}, messages {message}",
            self.level,
            self.masked
        );
        let silent = self.masked || message || config.is_intx_disabled();
        if let Some(eventfd @ Some(_)) = self.eventfds[INTX].first()
            && self.level
            && !silent
        {
            self.masked = true;
            signal(eventfd);
        }
    }
}

fn signal(eventfd: &Option<File>) {
    let Some(mut eventfd) = eventfd.as_ref() else {
        return;
    };
    if let Err(error) = eventfd.write_all(&1_u64.to_ne_bytes()) {
        log::warn!("an eventfd cannot be signalled: {error}");
    }
}
