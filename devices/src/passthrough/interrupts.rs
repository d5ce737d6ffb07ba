//! An endpoint's way of interrupting the guest: by its pin, by MSI or by MSI-X, one at a time.

use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::{Arc, PoisonError, RwLock};

use pci::{Cause, InterruptPin, MsiMessage};
use vfio_user_client::Setup;

use super::config::Config;
use super::intx::Intx;
pub(super) use super::intx::signal;
use crate::backend::{Backend, Irq, IrqInfo};
use crate::interrupts::{EventVectors, InterruptSource, LineEvents};

/// Which of the three it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mode {
    /// None: the guest has switched its pin off, or it has none.
    Off,
    Pin(InterruptPin),
    Msi {
        vectors: u16,
    },
    Msix {
        vectors: u16,
    },
}

impl Mode {
    /// The mode that the registers tell.
    pub(super) fn of(config: &Config) -> Self {
        let msix = config
            .msix
            .as_ref()
            .map(|(_, msix)| msix)
            .filter(|msix| msix.enabled());
        let msi = config
            .msi
            .as_ref()
            .map(|(_, msi)| msi)
            .filter(|msi| msi.enabled());
        let pin_on = !config.command().contains(pci::Command::INTX_DISABLE);
        match (msix, msi, config.interrupt_pin()) {
            (Some(msix), _, _) => Self::Msix {
                vectors: msix.vectors(),
            },
            (None, Some(msi), _) => Self::Msi {
                vectors: msi.granted(),
            },
            (None, None, Some(pin)) if pin_on => Self::Pin(pin),
            _ => Self::Off,
        }
    }

    /// What all of its vectors send that send anything.
    pub(super) fn messages(self, config: &Config) -> Vec<(u16, Option<MsiMessage>)> {
        let message = |vector| match (self, &config.msi, &config.msix) {
            (Self::Msi { .. }, Some((_, msi)), _) => msi.message(vector),
            (Self::Msix { .. }, _, Some((_, msix))) => msix.message(vector),
            _ => None,
        };
        let all = (0..self.vectors()).map(|vector| (vector, message(vector)));
        all.filter(|(_, message)| message.is_some()).collect()
    }

    /// How many vectors it has.
    pub(super) fn vectors(self) -> u16 {
        match self {
            Self::Off | Self::Pin(_) => 0,
            Self::Msi { vectors } | Self::Msix { vectors } => vectors,
        }
    }

    fn irq(self) -> Option<Irq> {
        match self {
            Self::Off => None,
            Self::Pin(_) => Some(Irq::Intx),
            Self::Msi { .. } => Some(Irq::Msi),
            Self::Msix { .. } => Some(Irq::Msix),
        }
    }
}

/// The vectors of the mode that is on, for whoever wants to know what is pending.
#[derive(Debug, Default)]
pub(super) struct CurrentVectors(RwLock<Option<Arc<dyn EventVectors>>>);

impl CurrentVectors {
    pub(super) fn pending(&self, vector: u16) -> bool {
        self.current()
            .is_some_and(|vectors| vectors.pending(vector))
    }

    fn current(&self) -> Option<Arc<dyn EventVectors>> {
        self.0
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    fn set(&self, vectors: Option<Arc<dyn EventVectors>>) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = vectors;
    }
}

/// The interrupts as they are set up in the device and in the machine.
#[derive(Debug)]
pub(super) struct Interrupts {
    source: Box<dyn InterruptSource>,
    intx_info: IrqInfo,
    mode: Mode,
    intx: Option<Intx>,
    vectors: Arc<CurrentVectors>,
    /// The MSI-X vectors that the device has events for.
    armed: Vec<bool>,
    /// Whether what the device signals reaches the guest; else it waits.
    connected: bool,
}

impl Interrupts {
    pub(super) fn new(
        source: Box<dyn InterruptSource>,
        intx_info: IrqInfo,
        vectors: Arc<CurrentVectors>,
    ) -> Self {
        Self {
            source,
            intx_info,
            mode: Mode::Off,
            intx: None,
            vectors,
            armed: Vec::new(),
            connected: true,
        }
    }

    pub(super) fn mode(&self) -> Mode {
        self.mode
    }

    /// Takes whatever there is and will be off the interrupt controllers.
    pub(super) fn disconnect(&mut self) -> Result<(), Cause> {
        self.connected = false;
        if let Some(vectors) = self.vectors.current() {
            vectors.set_connected(false)?;
        }
        self.intx.as_mut().map_or(Ok(()), Intx::disconnect)
    }

    /// Connects it again, and sends what has been signalled meanwhile. If the device may not be asked whether it has
    /// something to say, the guest has to look.
    pub(super) fn connect(
        &mut self,
        backend: &Arc<dyn Backend>,
        may_ask: bool,
    ) -> Result<(), Cause> {
        if std::mem::replace(&mut self.connected, true) {
            return Ok(());
        }
        if let Some(vectors) = self.vectors.current() {
            vectors.set_connected(true)?;
        }
        let intx = self.intx.as_mut();
        intx.map_or(Ok(()), |intx| intx.connect(backend, may_ask))
    }

    /// The vectors that have been signalled and not been sent: masked ones, or all while they are disconnected.
    pub(super) fn signalled(&self) -> Vec<u16> {
        let all = 0..self.mode.vectors();
        all.filter(|vector| self.vectors.pending(*vector)).collect()
    }

    /// Makes it as if the device had signalled these vectors.
    pub(super) fn signal(&self, signalled: &[u16]) -> Result<(), Cause> {
        if let Some(vectors) = self.vectors.current() {
            for &vector in signalled.iter().filter(|vector| !vectors.pending(**vector)) {
                signal(vectors.event(vector)?);
            }
        }
        Ok(())
    }

    /// Changes to `mode`, and has vectors send `messages` from now on. The old mode is disabled before the new one is
    /// enabled: libvfio-user keeps the events of all three in one array.
    pub(super) fn update(
        &mut self,
        backend: &Arc<dyn Backend>,
        mode: Mode,
        messages: &[(u16, Option<MsiMessage>)],
    ) -> Result<(), Cause> {
        if mode != self.mode {
            let disabled = self.disable(backend.as_ref());
            self.enable(backend, mode)?;
            disabled?;
        }
        self.program(backend.as_ref(), messages)
    }

    /// Sets up in the machine, disconnected, what is set up in the device already: the events that it has been `given`.
    pub(super) fn adopt(
        &mut self,
        mode: Mode,
        messages: &[(u16, Option<MsiMessage>)],
        given: &Setup,
    ) -> Result<(), Cause> {
        self.disconnect()?;
        let Some(irq) = mode.irq() else {
            return Ok(());
        };
        let clone = |event: Option<&Arc<OwnedFd>>| event.map(|event| event.try_clone()).transpose();
        if let Mode::Pin(pin) = mode {
            let device = clone(given.event(irq.index(), 0))?;
            let resample = clone(given.unmask_event(irq.index(), 0))?;
            let by_thread = self.intx_info.automasked && resample.is_none();
            let (trigger, device) = if by_thread {
                (None, device)
            } else {
                (device, None)
            };
            let line = self.source.line(pin, LineEvents { trigger, resample })?;
            self.intx = Some(Intx::adopt(line, self.intx_info, device)?);
        } else {
            let vectors = self.new_vectors(mode.vectors())?;
            let mut armed = vec![false; mode.vectors().into()];
            for (vector, event) in given.events_of(irq.index()) {
                let vector = u16::try_from(vector)?;
                vectors.adopt(vector, event.try_clone()?)?;
                if let Some(armed) = armed.get_mut(usize::from(vector)) {
                    *armed = true;
                }
            }
            vectors.program(messages)?;
            self.vectors.set(Some(vectors));
            self.armed = armed;
        }
        self.mode = mode;
        Ok(())
    }

    /// Takes the device's interrupts away, in the machine even if the device does not answer.
    pub(super) fn disable(&mut self, backend: &dyn Backend) -> Result<(), Cause> {
        let old = std::mem::replace(&mut self.mode, Mode::Off);
        self.intx = None;
        self.vectors.set(None);
        self.armed.clear();
        if let Some(irq) = old.irq() {
            backend.disarm(irq)?;
        }
        Ok(())
    }

    fn enable(&mut self, backend: &Arc<dyn Backend>, mode: Mode) -> Result<(), Cause> {
        match mode {
            Mode::Off => {}
            Mode::Pin(pin) => {
                let line = self.source.line(pin, LineEvents::default())?;
                line.set_connected(self.connected)?;
                let intx = self.intx.insert(Intx::new(line, backend, self.intx_info)?);
                if !self.connected {
                    intx.disconnect()?;
                }
            }
            Mode::Msi { vectors: count } => {
                let vectors = self.new_vectors(count)?;
                // All at once: the device cannot be given more of them later.
                let events = (0..count)
                    .map(|vector| vectors.event(vector))
                    .collect::<Result<Vec<_>, _>>()?;
                backend.arm(Irq::Msi, 0, &events)?;
                drop(events);
                self.vectors.set(Some(vectors));
            }
            Mode::Msix { vectors: count } => {
                // The device has to be in this mode even if all vectors are masked.
                backend.arm(Irq::Msix, 0, &[])?;
                self.vectors.set(Some(self.new_vectors(count)?));
                self.armed = vec![false; count.into()];
            }
        }
        self.mode = mode;
        Ok(())
    }

    fn new_vectors(&self, count: u16) -> Result<Arc<dyn EventVectors>, Cause> {
        let vectors = self.source.vectors(count)?;
        vectors.set_connected(self.connected)?;
        Ok(vectors.into())
    }

    /// Has the vectors send these messages, and the device signal those of MSI-X that it has no events for yet.
    fn program(
        &mut self,
        backend: &dyn Backend,
        messages: &[(u16, Option<MsiMessage>)],
    ) -> Result<(), Cause> {
        let Some(vectors) = self.vectors.current() else {
            return Ok(());
        };
        if messages.is_empty() {
            return Ok(());
        }
        vectors.program(messages)?;
        if !matches!(self.mode, Mode::Msix { .. }) {
            return Ok(());
        }
        let unarmed = |(vector, message): &(u16, Option<_>)| {
            let armed = self
                .armed
                .get(usize::from(*vector))
                .copied()
                .unwrap_or(true);
            (message.is_some() && !armed).then_some(*vector)
        };
        let unarmed: Vec<_> = messages.iter().filter_map(unarmed).collect();
        for run in unarmed.chunk_by(|a, b| a + 1 == *b) {
            let events = run
                .iter()
                .map(|&vector| vectors.event(vector))
                .collect::<Result<Vec<_>, _>>()?;
            if let Some(&first) = run.first() {
                backend.arm(Irq::Msix, first, &events)?;
            }
            for &vector in run {
                if let Some(armed) = self.armed.get_mut(usize::from(vector)) {
                    *armed = true;
                }
            }
        }
        Ok(())
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Off => write!(f, "no interrupts"),
            Self::Pin(_) => write!(f, "INTx"),
            Self::Msi { .. } => write!(f, "MSI"),
            Self::Msix { .. } => write!(f, "MSI-X"),
        }
    }
}
