//! The device's interrupts: the eventfds that the client has assigned, and the INTx line.

use std::fs::File;
use std::io::{self, ErrorKind, Write};
use std::ops::Range;
use std::slice;

use vfio_bindings::bindings::vfio::{
    VFIO_IRQ_INFO_AUTOMASKED, VFIO_IRQ_INFO_EVENTFD, VFIO_IRQ_INFO_MASKABLE,
    VFIO_IRQ_SET_ACTION_MASK, VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_IRQ_SET_ACTION_UNMASK,
    VFIO_IRQ_SET_DATA_EVENTFD, VFIO_IRQ_SET_DATA_NONE, VFIO_PCI_INTX_IRQ_INDEX,
    VFIO_PCI_MSIX_IRQ_INDEX,
};
use vfio_user::IrqInfo;

use super::VECTORS;
use super::config::ConfigSpace;

/// What the client is told. INTx is masked by each interrupt until the client unmasks it.
pub(super) fn info() -> Vec<IrqInfo> {
    let info = |index| match index {
        VFIO_PCI_INTX_IRQ_INDEX => IrqInfo {
            index,
            flags: VFIO_IRQ_INFO_EVENTFD | VFIO_IRQ_INFO_MASKABLE | VFIO_IRQ_INFO_AUTOMASKED,
            count: 1,
        },
        VFIO_PCI_MSIX_IRQ_INDEX => IrqInfo {
            index,
            flags: VFIO_IRQ_INFO_EVENTFD,
            count: VECTORS.into(),
        },
        _ => IrqInfo {
            index,
            flags: 0,
            count: 0,
        },
    };
    (0..5).map(info).collect()
}

#[derive(Debug, Default)]
pub(super) struct Interrupts {
    intx: Option<File>,
    msix: [Option<File>; VECTORS as usize],
    level: bool,
    masked: bool,
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
        const NONE: u32 = VFIO_IRQ_SET_DATA_NONE;
        const EVENTFD: u32 = VFIO_IRQ_SET_DATA_EVENTFD;

        let is_intx = index == VFIO_PCI_INTX_IRQ_INDEX;
        let all = match index {
            VFIO_PCI_INTX_IRQ_INDEX => slice::from_mut(&mut self.intx),
            VFIO_PCI_MSIX_IRQ_INDEX => &mut self.msix,
            _ => return Err(ErrorKind::InvalidInput.into()),
        };
        let vectors = vectors.start as usize..vectors.end as usize;
        let disable = vectors.is_empty();
        let some = all.get_mut(vectors).ok_or(ErrorKind::InvalidInput)?;
        match (flags & !(NONE | EVENTFD), flags & (NONE | EVENTFD)) {
            (VFIO_IRQ_SET_ACTION_TRIGGER, NONE) if disable => all.fill_with(|| None),
            (VFIO_IRQ_SET_ACTION_TRIGGER, EVENTFD) if fds.len() == some.len() => {
                some.iter_mut()
                    .zip(fds)
                    .for_each(|(slot, fd)| *slot = Some(fd));
            }
            (VFIO_IRQ_SET_ACTION_MASK, NONE) if is_intx => self.masked = true,
            (VFIO_IRQ_SET_ACTION_UNMASK, NONE) if is_intx => self.masked = false,
            _ => return Err(ErrorKind::InvalidInput.into()),
        }
        self.update_intx(config)
    }

    /// Sends a message.
    pub(super) fn raise(&self, vector: u32) -> io::Result<()> {
        let vector = usize::try_from(vector).ok();
        vector
            .and_then(|vector| self.msix.get(vector)?.as_ref())
            .map_or(Ok(()), signal)
    }

    /// The level of the INTx line.
    pub(super) fn level(&self) -> bool {
        self.level
    }

    /// Sets the level of the INTx line.
    pub(super) fn set_level(&mut self, config: &ConfigSpace, level: bool) -> io::Result<()> {
        self.level = level;
        self.update_intx(config)
    }

    /// Interrupts while the line is high and nothing is in the way.
    pub(super) fn update_intx(&mut self, config: &ConfigSpace) -> io::Result<()> {
        let silent = self.masked || config.is_msix_enabled() || config.is_intx_disabled();
        match &self.intx {
            Some(eventfd) if self.level && !silent => {
                self.masked = true;
                signal(eventfd)
            }
            _ => Ok(()),
        }
    }
}

fn signal(mut eventfd: &File) -> io::Result<()> {
    eventfd.write_all(&1_u64.to_ne_bytes())
}
