//! The PCI function: its configuration space and its interrupts, which the session and the device's threads share.

mod msix;
mod vector;

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;
use vfio_user_protocol::{IrqFlags, IrqSet, IrqSetFlags};

use self::msix::{Place, Table};
use self::vector::{Vector, assign, chosen, parse_flags};
use crate::config::{ConfigSpace, command};
use crate::description::{Layout, MsixTable, Places};
use crate::eventfd;

/// The function, as several threads use it.
#[derive(Debug)]
pub(crate) struct Function {
    state: Mutex<State>,
    bus_master: AtomicBool,
    places: Places,
    msix: Option<MsixTable>,
}

#[derive(Debug)]
struct State {
    config: ConfigSpace,
    /// INTx, MSI and MSI-X.
    vectors: [Vec<Vector>; 3],
    /// The level of INTx.
    level: bool,
    /// What unmasks INTx when it is signalled.
    unmask: Option<Arc<OwnedFd>>,
    table: Table,
}

/// What a device interrupts by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InterruptMode {
    /// The wired interrupt, or nothing.
    Intx,
    /// Message signalled interrupts.
    Msi,
    /// Extended message signalled interrupts.
    Msix,
}

/// What a write to configuration space has led to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Effect {
    None,
    /// A function-level reset is due.
    Reset,
}

/// What migrates of the function, apart from configuration space.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct SavedInterrupts {
    pub(crate) level: bool,
    /// The vectors of MSI and of MSI-X that are pending.
    pub(crate) pending: [Vec<u16>; 2],
    pub(crate) table: Vec<u8>,
}

/// Numbers of the kinds of interrupt (`VFIO_PCI_*_IRQ_INDEX` of `linux/vfio.h`).
const INTX: usize = 0;
const MSI: usize = 1;
const MSIX: usize = 2;

/// Kinds of interrupt that a PCI device has, two of which, errors and requests, have no vectors here.
pub(crate) const IRQS: u32 = 5;

impl Function {
    pub(crate) fn new(layout: &Layout) -> Self {
        let msix = layout.msix.map_or(0, |msix| msix.vectors);
        let counts = [u16::from(layout.intx), layout.msi, msix];
        let state = State {
            config: layout.config.clone(),
            vectors: counts.map(|count| (0..count).map(|_| Vector::default()).collect()),
            level: false,
            unmask: None,
            table: Table::new(msix),
        };
        Self {
            state: Mutex::new(state),
            bus_master: AtomicBool::new(false),
            places: layout.places,
            msix: layout.msix,
        }
    }

    /// Reads configuration space; `None` beyond its end.
    pub(crate) fn read_config(&self, offset: u64, data: &mut [u8]) -> Option<()> {
        self.lock().config.read(offset, data)
    }

    /// Writes configuration space; `None` beyond its end.
    pub(crate) fn write_config(&self, offset: u64, data: &[u8]) -> Option<Effect> {
        let mut state = self.lock();
        state.config.write(offset, data)?;
        if self.starts_reset(offset, data) {
            return Some(Effect::Reset);
        }
        self.config_changed(&mut state);
        Some(Effect::None)
    }

    /// Whether the device may access memory.
    pub(crate) fn is_bus_master(&self) -> bool {
        self.bus_master.load(Ordering::Acquire)
    }

    /// What the device interrupts by.
    pub(crate) fn mode(&self) -> InterruptMode {
        let state = self.lock();
        match (self.is_enabled(&state, MSIX), self.is_enabled(&state, MSI)) {
            (true, _) => InterruptMode::Msix,
            (false, true) => InterruptMode::Msi,
            (false, false) => InterruptMode::Intx,
        }
    }

    /// Triggers a vector of MSI-X or MSI, whichever is in use.
    pub(crate) fn trigger(&self, vector: u16) {
        let mut state = self.lock();
        let state = &mut *state;
        for kind in [MSIX, MSI] {
            let enabled = self.is_enabled(state, kind);
            let vectors = state.vectors.get_mut(kind);
            let Some(vector) = vectors.and_then(|vectors| vectors.get_mut(usize::from(vector)))
            else {
                continue;
            };
            if vector.event.is_some() || enabled {
                return vector.trigger();
            }
        }
        log::debug!("vector {vector} is triggered, and neither MSI nor MSI-X has it");
    }

    /// Sets the level of INTx.
    pub(crate) fn set_level(&self, level: bool) {
        let mut state = self.lock();
        state.level = level;
        state.config.set_interrupt_status(level);
        self.update_intx(&mut state);
    }

    /// How many interrupts there are of a kind, and what can be done with them; `None` if there is no such kind.
    pub(crate) fn irq_info(&self, index: u32) -> Option<(u32, IrqFlags)> {
        if index >= IRQS {
            return None;
        }
        let state = self.lock();
        let index = usize::try_from(index).ok()?;
        let count = state.vectors.get(index).map_or(0, Vec::len);
        let mut flags = IrqFlags::EVENTFD | IrqFlags::MASKABLE;
        if index == INTX {
            flags |= IrqFlags::AUTOMASKED;
        }
        if count == 0 {
            flags = IrqFlags::empty();
        }
        Some((u32::try_from(count).ok()?, flags))
    }

    /// Does what `DEVICE_SET_IRQS` asks for. `data` is what follows the head of its payload.
    pub(crate) fn set_irqs(
        &self,
        set: &IrqSet,
        data: &[u8],
        fds: Vec<OwnedFd>,
    ) -> Result<(), Errno> {
        let index = usize::try_from(set.index).map_err(|_| Errno::INVAL)?;
        let [start, count] =
            [set.start, set.count].map(|number| usize::try_from(number).unwrap_or(usize::MAX));
        let mut state = self.lock();
        let state = &mut *state;
        let Some(vectors) = state.vectors.get_mut(index) else {
            // Errors and requests: there are none to take away.
            let nothing = set.index < IRQS && (start, count) == (0, 0);
            return nothing.then_some(()).ok_or(Errno::INVAL);
        };
        let end = start.checked_add(count).ok_or(Errno::INVAL)?;
        let range = vectors.get_mut(start..end).ok_or(Errno::INVAL)?;
        let (action, source) = parse_flags(set.flags)?;
        if source != IrqSetFlags::DATA_EVENTFD && !fds.is_empty() {
            return Err(Errno::INVAL);
        }
        if source == IrqSetFlags::DATA_EVENTFD {
            let is_assignment = fds.len() == count && fds.iter().all(eventfd::is_eventfd);
            if count == 0 || !(fds.is_empty() || is_assignment) {
                return Err(Errno::INVAL);
            }
            match action {
                IrqSetFlags::ACTION_TRIGGER => assign(range, fds),
                IrqSetFlags::ACTION_UNMASK if index == INTX => {
                    state.unmask = fds.into_iter().next().map(Arc::new);
                }
                // As the kernel has it: nothing else is masked or unmasked by an event.
                _ => return Err(Errno::NOTTY),
            }
        } else if count == 0 {
            if action != IrqSetFlags::ACTION_TRIGGER || start != 0 {
                return Err(Errno::INVAL);
            }
            vectors.fill_with(Vector::default);
            if index == INTX {
                state.unmask = None;
            }
        } else {
            let chosen = chosen(source, data, count)?;
            for (vector, _) in range.iter_mut().zip(chosen).filter(|(_, chosen)| *chosen) {
                match action {
                    IrqSetFlags::ACTION_MASK => vector.masked = true,
                    IrqSetFlags::ACTION_UNMASK => vector.unmask(),
                    _ => vector.signal(),
                }
            }
        }
        self.update_intx(state);
        Ok(())
    }

    /// What has to be watched, and [`unmask_event`](Self::unmask_event) called when it is readable.
    pub(crate) fn unmask_fd(&self) -> Option<Arc<OwnedFd>> {
        self.lock().unmask.clone()
    }

    /// Unmasks INTx, if the client has asked for it by an event.
    pub(crate) fn unmask_event(&self) {
        let mut state = self.lock();
        let Some(event) = &state.unmask else { return };
        match eventfd::drain(event) {
            Ok(false) => {}
            Ok(true) => {
                state.intx().for_each(Vector::unmask);
                self.update_intx(&mut state);
            }
            Err(errno) => {
                log::warn!("INTx cannot be unmasked by what the client has sent: {errno}");
                state.unmask = None;
            }
        }
    }

    /// Whether some of a range of a BAR is in the MSI-X table or the pending bits.
    pub(crate) fn has_msix_at(&self, bar: usize, offset: u64, count: usize) -> bool {
        let msix = self.msix.as_ref();
        msix.is_some_and(|msix| msix::overlaps(msix, bar, offset, count))
    }

    /// Reads the MSI-X table or the pending bits; `None` if the range is not all in one of them.
    pub(crate) fn read_msix(&self, bar: usize, offset: u64, data: &mut [u8]) -> Option<()> {
        let place = msix::find(self.msix.as_ref()?, bar, offset, data.len())?;
        let state = self.lock();
        match place {
            Place::Table(start) => state.table.read(start, data)?,
            Place::Pending(start) => {
                let vectors = state.vectors.get(MSIX)?;
                for (at, byte) in (start..).zip(data) {
                    let of_byte = vectors.iter().skip(8 * at).take(8).enumerate();
                    let bit = |(bit, vector): (usize, &Vector)| u8::from(vector.pending) << bit;
                    *byte = of_byte.map(bit).sum();
                }
            }
        }
        Some(())
    }

    /// Writes the MSI-X table, or the pending bits, which does nothing; `None` if the range is not all in one of them.
    pub(crate) fn write_msix(&self, bar: usize, offset: u64, data: &[u8]) -> Option<()> {
        match msix::find(self.msix.as_ref()?, bar, offset, data.len())? {
            Place::Table(start) => self.lock().table.write(start, data),
            Place::Pending(_) => Some(()),
        }
    }

    /// Resets what the device's reset resets: everything but the client's eventfds.
    pub(crate) fn reset(&self) {
        let mut state = self.lock();
        state.config.reset();
        state.level = false;
        state.table.reset();
        for vector in state.vectors.iter_mut().flatten() {
            vector.masked = false;
            vector.pending = false;
        }
        self.config_changed(&mut state);
    }

    /// Forgets what was the client's: its eventfds, and what it has masked.
    pub(crate) fn disconnect(&self) {
        let mut state = self.lock();
        state.unmask = None;
        for vector in state.vectors.iter_mut().flatten() {
            vector.event = None;
            vector.masked = false;
        }
    }

    pub(crate) fn save(&self) -> (Vec<u8>, SavedInterrupts) {
        let state = self.lock();
        let pending = [MSI, MSIX].map(|kind| {
            let vectors = (0..).zip(state.vectors.get(kind).into_iter().flatten());
            let pending = vectors.filter(|(_, vector)| vector.pending);
            pending.map(|(number, _)| number).collect()
        });
        let interrupts = SavedInterrupts {
            level: state.level,
            pending,
            table: state.table.bytes().to_vec(),
        };
        (state.config.bytes().to_vec(), interrupts)
    }

    /// Takes over what another function of the same kind had; `None`, and nothing is changed, if it is of another kind.
    pub(crate) fn restore(&self, config: &[u8], interrupts: &SavedInterrupts) -> Option<()> {
        let mut state = self.lock();
        let state = &mut *state;
        let counts = [MSI, MSIX].map(|kind| state.vectors.get(kind).map_or(0, Vec::len));
        let mut pending = interrupts.pending.iter().zip(counts);
        let exist = pending
            .all(|(pending, count)| pending.iter().all(|vector| usize::from(*vector) < count));
        if !exist || interrupts.table.len() != state.table.bytes().len() {
            return None;
        }
        state.config.restore(config)?;
        state.table.write(0, &interrupts.table)?;
        state.level = interrupts.level;
        state.config.set_interrupt_status(interrupts.level);
        for (kind, pending) in [MSI, MSIX].into_iter().zip(&interrupts.pending) {
            for vector in pending {
                let vectors = state.vectors.get_mut(kind);
                if let Some(vector) = vectors.and_then(|all| all.get_mut(usize::from(*vector))) {
                    vector.trigger();
                }
            }
        }
        self.config_changed(state);
        Some(())
    }

    /// Whether a write to configuration space sets the bit that starts a function-level reset.
    fn starts_reset(&self, offset: u64, data: &[u8]) -> bool {
        // The upper byte of Device Control, of which bit 7 is Initiate Function Level Reset (PCIe 5.0, 7.5.3.4).
        let Some(place) = self
            .places
            .express
            .and_then(|place| u64::try_from(place + 9).ok())
        else {
            return false;
        };
        let byte = place
            .checked_sub(offset)
            .and_then(|at| usize::try_from(at).ok());
        byte.and_then(|at| data.get(at))
            .is_some_and(|byte| byte & 0x80 != 0)
    }

    /// Lets the new values of configuration space take effect.
    fn config_changed(&self, state: &mut State) {
        let bus_master = state.config.is_set(command::BUS_MASTER);
        self.bus_master.store(bus_master, Ordering::Release);
        let level = state.level;
        state.config.set_interrupt_status(level);
        self.update_intx(state);
    }

    /// Signals INTx while its line is high and nothing is in the way.
    fn update_intx(&self, state: &mut State) {
        let silent = !state.level
            || state.config.is_set(command::INTX_DISABLE)
            || self.is_enabled(state, MSI)
            || self.is_enabled(state, MSIX);
        if silent {
            return;
        }
        for vector in state.intx() {
            if vector.event.is_some() && !vector.masked {
                vector.masked = true;
                vector.signal();
            }
        }
    }

    /// Whether configuration space has MSI or MSI-X enabled.
    fn is_enabled(&self, state: &State, kind: usize) -> bool {
        let (place, enable) = match kind {
            MSI => (self.places.msi, 1),
            _ => (self.places.msix, 1 << 15),
        };
        place.is_some_and(|place| state.config.word(place + 2) & enable != 0)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn intx(&mut self) -> impl Iterator<Item = &mut Vector> {
        self.vectors.get_mut(INTX).into_iter().flatten()
    }
}

/// The device's interrupts. Any thread of the device may use them, at any time: without a client, or while the client
/// has them masked, they wait.
#[derive(Clone, Debug)]
pub struct Interrupts(pub(crate) Arc<Function>);

impl Interrupts {
    /// Sends the message `vector` of MSI-X or of MSI, whichever the guest has enabled.
    pub fn trigger(&self, vector: u16) {
        self.0.trigger(vector);
    }

    /// Sets the level of the wired interrupt. While it is high, the guest is interrupted again whenever it has served
    /// the interrupt before.
    pub fn set_intx(&self, level: bool) {
        self.0.set_level(level);
    }

    /// What the guest has enabled: a device with both kinds of interrupt uses [`set_intx`](Self::set_intx) if this is
    /// [`InterruptMode::Intx`], else [`trigger`](Self::trigger).
    pub fn mode(&self) -> InterruptMode {
        self.0.mode()
    }
}
