//! The passthrough endpoint: a PCI function whose registers, memory and interrupts are a device's somewhere else.
//!
//! It virtualises what the guest must not reach, forwards the rest, and orders the one against the other. Its BARs'
//! contents cost nothing where they are mapped and one call of the [`Backend`] where they are not.

mod config;
mod faults;
mod fingerprint;
mod handover;
mod interrupts;
mod intx;
mod probe;
mod save;
mod state;
mod survey;
#[cfg(test)]
mod tests;
mod turn;

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use pci::{BarIndex, BarMapper, Cause, Decoded, Endpoint, MsixLayout, TreePath};

use self::config::{Config, Effects, Forward};
use self::faults::Faults;
pub use self::fingerprint::{
    BarFingerprint, Difference, DoorbellFingerprint, Fingerprint, Mismatch,
};
use self::interrupts::{CurrentVectors, Interrupts, Mode};
pub use self::probe::{BarLayout, Probe, ProbeError};
use self::save::Bells;
pub use self::state::{ConfigState, EndpointState, RestoreError, RungDoorbell, SaveError};
pub use self::survey::Attachment;
use self::survey::Survey;
use self::turn::Turn;

use crate::backend::{Backend, MessageControl, Region};
use crate::interrupts::InterruptSource;

/// How long an access waits for others of the same device's control registers to be done. Each of those takes a few
/// calls of the backend at most.
const PATIENCE: Duration = Duration::from_secs(10);

/// A device that is passed through to the guest.
///
/// Configuration writes and writes to the MSI-X table of one device take turns, for they may each take several calls
/// of the backend. Everything else goes by itself.
#[derive(Debug)]
pub struct Passthrough {
    // What is mapped and connected goes before the device does.
    wiring: Turn<Wiring>,
    backend: Arc<dyn Backend>,
    faults: Faults,
    fingerprint: Fingerprint,
    bells: Bells,
    /// Who else hears of the device's loss.
    on_loss: OnLoss,
    /// Accesses of the guest that came here: those that nothing is mapped for.
    accesses: AtomicU64,
    /// Whether the device is gone for good. The guest finds nothing where it was.
    lost: AtomicBool,
    /// To which BARs writes are not waited for.
    posted: [bool; 7],
    msix: Option<MsixLayout>,
    /// What the expansion ROM holds. It is read seldom, so every read of it is an exit.
    rom: Vec<u8>,
    /// What the device has said of itself, if another process may want to know.
    survey: Option<Survey>,
    /// What the registers are after a reset.
    power_on: Config,
    /// What they are now. Never locked while the backend is called.
    config: Mutex<Config>,
    vectors: Arc<CurrentVectors>,
}

/// What follows from the registers: set up in the machine and in the device.
#[derive(Debug)]
struct Wiring {
    // Before the mapper, so that a guest never sees a BAR of a device that cannot interrupt it.
    interrupts: Interrupts,
    mapper: Box<dyn BarMapper>,
    mapped: Decoded,
    /// The doorbells that the device has to hear when it runs next.
    owed: Vec<RungDoorbell>,
}

impl Passthrough {
    /// Makes an endpoint, at this place in the tree, of a device that has been probed. `id` names it in the log.
    pub fn new(
        id: &str,
        path: TreePath,
        mut probe: Probe,
        mapper: Box<dyn BarMapper>,
        source: Box<dyn InterruptSource>,
    ) -> Self {
        let vectors = Arc::new(CurrentVectors::default());
        let [intx, _, _] = probe.survey.irqs;
        let interrupts = Interrupts::new(source, intx, vectors.clone());
        let can_be_left = probe.backend.handover().is_some();
        Self {
            posted: probe.posted_bars(),
            fingerprint: Fingerprint::new(id, path, &probe),
            bells: Bells::new(&probe),
            backend: probe.backend,
            rom: std::mem::take(&mut probe.survey.rom),
            survey: can_be_left.then_some(probe.survey),
            faults: Faults::new(id),
            on_loss: OnLoss::default(),
            accesses: AtomicU64::new(0),
            lost: AtomicBool::new(false),
            msix: probe.msix,
            power_on: probe.config.clone(),
            config: Mutex::new(probe.config),
            vectors,
            wiring: Turn::new(Wiring {
                interrupts,
                mapper,
                mapped: Decoded::default(),
                owed: Vec::new(),
            }),
        }
    }

    /// Has `report` called, with the reason, when the device is [given up](Self::give_up).
    #[must_use]
    pub fn on_loss(mut self, report: impl Fn(&dyn fmt::Display) + Send + Sync + 'static) -> Self {
        self.on_loss = OnLoss(Some(Box::new(report)));
        self
    }

    /// What has been counted so far, of this endpoint and of its backend. It takes a moment and calls no device.
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        let mut counters = self.backend.counters();
        counters.extend([
            ("accesses", self.accesses.load(Ordering::Relaxed)),
            ("faults", self.faults.count()),
            ("lost", self.is_lost().into()),
        ]);
        counters
    }

    /// Gives the device up for good, and says so in the log once. From now on the guest reads all-ones, nothing of the
    /// device's is mapped any more, and no interrupt comes from it.
    pub fn give_up(&self, reason: &dyn fmt::Display) {
        if self.lost.swap(true, Ordering::AcqRel) {
            return;
        }
        log::error!(
            "{}: {reason}; from now on the guest reads all-ones",
            self.faults.id()
        );
        if let OnLoss(Some(report)) = &self.on_loss {
            report(reason);
        }
        // Whoever has the turn waits for the device no longer than this.
        self.backend.close();
        self.in_turn(|wiring| {
            self.unmap(wiring, &Decoded::default());
            wiring.mapped = Decoded::default();
            // What it holds of the device's would keep the device from whoever wants it now.
            wiring.mapper = Box::new(Nowhere);
            // The device cannot be told.
            let _ = wiring.interrupts.disable(self.backend.as_ref());
        });
    }

    /// Whether the device has been given up.
    pub fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Acquire)
    }

    /// Notes that something went wrong, except for what a lost device is to blame for: that is said once.
    fn fault(&self, what: fmt::Arguments<'_>, error: &dyn fmt::Display) {
        if !self.backend.is_lost() {
            self.faults.record(what, error);
        }
    }

    fn config(&self) -> MutexGuard<'_, Config> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Calls `serve` when it is this access' turn.
    fn in_turn<R>(&self, serve: impl FnOnce(&mut Wiring) -> R) -> Option<R> {
        let result = self.wiring.take(PATIENCE, serve);
        if result.is_none() {
            self.fault(
                format_args!("access given up"),
                &"the device is busy with others",
            );
        }
        result
    }

    /// Does what a configuration write leads to.
    fn apply(&self, wiring: &mut Wiring, effects: &Effects) {
        let (decoded, mode, all) = {
            let config = self.config();
            let mode = Mode::of(&config);
            // A new mode begins with nothing, whatever has changed.
            let is_new = mode != wiring.interrupts.mode();
            let all = is_new.then(|| mode.messages(&config));
            (config.decoded(), mode, all)
        };
        let messages = all.as_ref().unwrap_or(&effects.messages);
        // Off the bus before the device stops decoding, and onto it after the device has started.
        self.unmap(wiring, &decoded);
        let updated = wiring.interrupts.update(&self.backend, mode, messages);
        if let Err(error) = updated {
            self.fault(format_args!("cannot change to {mode}"), &error);
        }
        for forward in &effects.forward {
            self.forward(forward);
        }
        self.map(wiring, &decoded);
    }

    fn unmap(&self, wiring: &mut Wiring, decoded: &Decoded) {
        let (unmap, _) = wiring.mapped.changes(decoded);
        for bar in unmap {
            wiring.mapper.unmap(bar);
        }
    }

    fn map(&self, wiring: &mut Wiring, decoded: &Decoded) {
        let (_, map) = wiring.mapped.changes(decoded);
        for (bar, address) in map {
            if let Err(error) = wiring.mapper.map(bar, address) {
                self.fault(format_args!("{bar} is not mapped"), &error);
            }
        }
        wiring.mapped = *decoded;
    }

    fn forward(
        &self,
        Forward {
            offset,
            data,
            message_control,
        }: &Forward,
    ) {
        if *message_control && self.backend.message_control() == MessageControl::Arming {
            return;
        }
        if let Err(error) = self.backend.write(Region::Config, (*offset).into(), data) {
            self.fault(
                format_args!("write to configuration space at {offset:#x}"),
                &error,
            );
        }
    }

    /// Puts the function into the state that `config` tells.
    fn reset_to(&self, wiring: &mut Wiring, config: Config) -> Result<(), Cause> {
        self.unmap(wiring, &Decoded::default());
        wiring.mapped = Decoded::default();
        wiring.owed.clear();
        let disabled = wiring.interrupts.disable(self.backend.as_ref());
        let reset = self.backend.reset();
        let mode = Mode::of(&config);
        *self.config() = config;
        let enabled = wiring.interrupts.update(&self.backend, mode, &[]);
        disabled?;
        reset?;
        enabled
    }

    /// Which of the VMM's own parts of a BAR an access is in: none, or one of them entirely, or something in between.
    fn place(&self, bar: BarIndex, offset: u64, length: usize) -> Place {
        if bar == BarIndex::ROM {
            return Place::Rom(offset);
        }
        let Some(msix) = &self.msix else {
            return Place::Device;
        };
        let end = offset + length as u64;
        let table = (msix.table_bar == bar).then(|| msix.table_range());
        let pba = (msix.pba_bar == bar).then(|| msix.pba_range());
        let places = [
            (table, Place::Table as fn(u64) -> Place),
            (pba, Place::Pending),
        ];
        for (range, place) in places {
            match range {
                Some(range) if range.start <= offset && end <= range.end => {
                    return place(offset - range.start);
                }
                Some(range) if offset < range.end && range.start < end => return Place::Several,
                _ => {}
            }
        }
        Place::Device
    }
}

/// What is called when a device is lost.
#[derive(Default)]
struct OnLoss(Option<Report>);

type Report = Box<dyn Fn(&dyn fmt::Display) + Send + Sync>;

impl fmt::Debug for OnLoss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("OnLoss").finish_non_exhaustive()
    }
}

/// Where the BARs of a device are that is gone.
#[derive(Debug)]
struct Nowhere;

impl BarMapper for Nowhere {
    fn map(&self, _: BarIndex, _: u64) -> Result<(), Cause> {
        Err("the device is gone".into())
    }

    fn unmap(&self, _: BarIndex) {}
}

/// What part of a BAR an access is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// Wholly in the device's.
    Device,
    /// At this offset of the MSI-X table.
    Table(u64),
    /// At this offset of the pending bits.
    Pending(u64),
    /// At this offset of the expansion ROM.
    Rom(u64),
    /// In more than one.
    Several,
}

impl Endpoint for Passthrough {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.accesses.fetch_add(1, Ordering::Relaxed);
        if self.is_lost() {
            data.fill(0xff);
            return;
        }
        data.fill(0);
        let length = self.config().devices_part(offset, data.len());
        if let Some(data) = data.get_mut(..length).filter(|data| !data.is_empty())
            && let Err(error) = self.backend.read(Region::Config, offset.into(), data)
        {
            self.fault(
                format_args!("read of configuration space at {offset:#x}"),
                &error,
            );
            data.fill(0xff);
        }
        self.config()
            .read(offset, data, |vector| self.vectors.pending(vector));
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        self.accesses.fetch_add(1, Ordering::Relaxed);
        self.in_turn(|wiring| {
            if self.is_lost() {
                return;
            }
            let effects = self.config().write(offset, data);
            if effects.reset {
                let mut config = self.power_on.clone();
                config.forget_addresses();
                if let Err(error) = self.reset_to(wiring, config) {
                    self.fault(format_args!("function-level reset"), &error);
                }
            } else {
                self.apply(wiring, &effects);
            }
        });
    }

    fn bar_read(&self, bar: BarIndex, offset: u64, data: &mut [u8]) {
        self.accesses.fetch_add(1, Ordering::Relaxed);
        if self.is_lost() {
            data.fill(0xff);
            return;
        }
        match self.place(bar, offset, data.len()) {
            Place::Device => {
                if let Err(error) = self.backend.read(Region::Bar(bar), offset, data) {
                    self.fault(format_args!("read of {bar} at {offset:#x}"), &error);
                    data.fill(0xff);
                }
            }
            Place::Table(offset) => {
                if let Some((_, msix)) = &self.config().msix {
                    msix.read_table(offset, data);
                }
            }
            Place::Pending(offset) => {
                if let Some((_, msix)) = &self.config().msix {
                    msix.read_pba(offset, data, |vector| self.vectors.pending(vector));
                }
            }
            Place::Rom(offset) => {
                data.fill(0xff);
                let start = usize::try_from(offset).unwrap_or(usize::MAX);
                for (to, from) in data.iter_mut().zip(self.rom.iter().skip(start)) {
                    *to = *from;
                }
            }
            Place::Several => {
                for (byte, offset) in data.chunks_mut(1).zip(offset..) {
                    self.bar_read(bar, offset, byte);
                }
            }
        }
    }

    fn bar_write(&self, bar: BarIndex, offset: u64, data: &[u8]) {
        self.accesses.fetch_add(1, Ordering::Relaxed);
        match self.place(bar, offset, data.len()) {
            Place::Device => {
                let written = if self.posted.get(bar.index()) == Some(&true) {
                    self.backend.post(Region::Bar(bar), offset, data)
                } else {
                    self.backend.write(Region::Bar(bar), offset, data)
                };
                if let Err(error) = written {
                    self.fault(format_args!("write to {bar} at {offset:#x}"), &error);
                }
            }
            Place::Table(offset) => {
                self.in_turn(|wiring| {
                    if self.is_lost() {
                        return;
                    }
                    let messages = match &mut self.config().msix {
                        Some((_, msix)) => msix.write_table(offset, data),
                        None => Vec::new(),
                    };
                    self.apply(
                        wiring,
                        &Effects {
                            messages,
                            ..Default::default()
                        },
                    );
                });
            }
            Place::Pending(_) | Place::Rom(_) => {}
            Place::Several => {
                for (byte, offset) in data.chunks(1).zip(offset..) {
                    self.bar_write(bar, offset, byte);
                }
            }
        }
    }

    fn reset(&self) -> Result<(), Cause> {
        if self.is_lost() {
            return Ok(());
        }
        let reset = self.in_turn(|wiring| self.reset_to(wiring, self.power_on.clone()));
        reset.unwrap_or_else(|| Err("the device is busy".into()))
    }
}
