//! Saving and restoring an endpoint, and what has to be still meanwhile.
//!
//! To save: with no vCPU running, [`disconnect_interrupts`](Passthrough::disconnect_interrupts) before the interrupt
//! controllers are saved, stop the device, and [`save`](Passthrough::save). To restore:
//! [`restore`](Passthrough::restore) while the device runs or its data can be written, then that data and the interrupt
//! controllers. In either case the device then runs (again), and [`resume`](Passthrough::resume) gives everyone what they
//! have missed.

use std::io::IoSliceMut;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use pci::{BarIndex, Cause, TreePath};
use rustix::io::{ReadWriteFlags, preadv2};
use vfio_user_client::DeviceState;

use super::config::{Config, Effects};
use super::interrupts::{Mode, signal};
use super::state::{EndpointState, RestoreError, RungDoorbell, SaveError};
use super::{Fingerprint, Passthrough, Probe, Wiring};
use crate::backend::{BackendError, Doorbell, Region};
use crate::migration::{Fallback, Left, Migration, TransitionError, transition};

/// The doorbells of a device.
#[derive(Debug)]
pub(super) struct Bells(Vec<(RungDoorbell, Doorbell)>);

impl Passthrough {
    /// Its name.
    pub fn id(&self) -> &str {
        &self.fingerprint.id
    }

    /// Where it is.
    pub fn path(&self) -> &TreePath {
        &self.fingerprint.path
    }

    /// What a device must be like that is to take over this one's state.
    pub fn fingerprint(&self) -> &Fingerprint {
        &self.fingerprint
    }

    /// How the device's own state is taken out and put back, if it can be.
    pub fn migration(&self) -> Option<&dyn Migration> {
        self.backend.migration()
    }

    /// Fails if the device does not answer, as one whose server hangs. That takes no longer than an access of the guest.
    pub fn check_answers(&self) -> Result<(), BackendError> {
        let mut ids = [0; 4];
        self.backend.read(Region::Config, 0, &mut ids)
    }

    /// Brings the device into a state. If it does not get there, it is told where it has been left instead. One that
    /// cannot migrate runs, always.
    pub fn change_state(&self, state: DeviceState) -> Result<(), TransitionError> {
        let failed = |source| TransitionError {
            target: state,
            left: Left::Stuck,
            source,
        };
        let Some(device) = self.migration() else {
            return match state {
                DeviceState::Running => Ok(()),
                _ => Err(failed(BackendError::Unmigratable)),
            };
        };
        let fallback = Fallback::of(device.state().map_err(failed)?, state);
        transition(device, state, fallback, || Ok(self.backend.reset()?))
    }

    /// Takes the device's interrupts off the interrupt controllers, whose state then does not change any more. What the
    /// device signals from now on is kept, until [`resume`](Self::resume). Nothing happens if that is so already.
    pub fn disconnect_interrupts(&self) -> Result<(), Cause> {
        self.exclusively(|wiring| wiring.interrupts.disconnect())
    }

    /// Gives the guest the interrupts, and the device the doorbells, that waited while it was stopped or moved. The
    /// device runs; if it has been [left](Self::leave), it is this process' from now on. Both get nothing twice, except
    /// for INTx, which a guest may find to be for nothing.
    pub fn resume(&self) -> Result<(), Cause> {
        self.exclusively(|wiring| {
            let away = self.away();
            if let Some(handover) = away {
                handover.go_on()?;
            }
            for bell in std::mem::take(&mut wiring.owed) {
                if let Some(event) = self.bells.event(bell) {
                    signal(event);
                }
            }
            wiring.interrupts.connect(&self.backend, away.is_none())
        })
    }

    pub(super) fn exclusively(
        &self,
        what: impl FnOnce(&mut Wiring) -> Result<(), Cause>,
    ) -> Result<(), Cause> {
        if self.is_lost() {
            return Ok(());
        }
        let done = self.in_turn(what);
        done.unwrap_or_else(|| Err("the device is busy".into()))
    }

    /// What is to be saved. No vCPU runs, the interrupts are disconnected, and the device is stopped, so that it hears no
    /// doorbell any more. If it runs here again, [`resume`](Self::resume) rings those that it has not heard. A device that
    /// has been [left](Self::leave) runs on and hears its doorbells, whoever has it.
    pub fn save(&self) -> Result<EndpointState, SaveError> {
        if self.is_lost() {
            return Err(SaveError::Lost);
        }
        let saved = self.in_turn(|wiring| {
            let mut rung = match self.away() {
                Some(_) => Vec::new(),
                None => self.bells.take_rung(),
            };
            rung.append(&mut wiring.owed);
            rung.sort_unstable();
            rung.dedup();
            // It may go on to run here.
            wiring.owed.clone_from(&rung);
            EndpointState {
                id: self.id().to_owned(),
                path: self.path().clone(),
                config: self.config().save(),
                signalled: wiring.interrupts.signalled(),
                rung,
            }
        });
        saved.ok_or(SaveError::Busy)
    }

    /// Takes over what was saved, as far as the VMM is concerned: registers, mapped BARs, interrupts, which stay
    /// disconnected until [`resume`](Self::resume). No vCPU runs. The device runs, or its data can be written: not every
    /// server lets its interrupts be set up otherwise. One that has been [taken over](Self::take_over) is not told
    /// anything. The guest's memory is left alone.
    ///
    /// It can be done again with a newer state: what takes most of the time, BARs with their doorbells and memory slots,
    /// then stays where it is as far as it is the same.
    pub fn restore(&self, state: &EndpointState) -> Result<(), RestoreError> {
        if self.is_lost() {
            return Err(RestoreError::Lost);
        }
        if state.id != self.id() || state.path != *self.path() {
            return Err(RestoreError::OtherDevice {
                saved: state.id.clone(),
                path: state.path.clone(),
            });
        }
        let config = self.power_on.restored(&state.config)?;
        check_signalled(&state.signalled, Mode::of(&config).vectors())?;
        self.bells.check(&state.rung)?;
        let restored = self.in_turn(|wiring| {
            if let Some(handover) = self.away() {
                return self.take_quietly(wiring, config, state, &handover.setup());
            }
            let restored = self.take_state(wiring, config, state);
            if restored.is_err()
                && let Err(error) = self.reset_to(wiring, self.power_on.clone())
            {
                self.fault(format_args!("reset after it was not restored"), &error);
            }
            restored
        });
        restored.unwrap_or(Err(RestoreError::Busy))
    }

    fn take_state(
        &self,
        wiring: &mut Wiring,
        config: Config,
        state: &EndpointState,
    ) -> Result<(), RestoreError> {
        let (mode, decoded) = (Mode::of(&config), config.decoded());
        self.unmap(wiring, &decoded);
        let interrupts = &mut wiring.interrupts;
        interrupts
            .disable(self.backend.as_ref())
            .map_err(RestoreError::step("take away the interrupts that it had"))?;
        interrupts
            .disconnect()
            .map_err(RestoreError::step("disconnect its interrupts"))?;
        let effects = Effects {
            messages: mode.messages(&config),
            forward: config.visible_to_device(),
            ..Default::default()
        };
        *self.config() = config;
        interrupts
            .update(&self.backend, mode, &effects.messages)
            .map_err(RestoreError::step("set up its interrupts"))?;
        interrupts
            .signal(&state.signalled)
            .map_err(RestoreError::step("signal what had been signalled"))?;
        // What the guest has made of the registers may be more than the device or the machine goes along with. It has
        // been logged then, and no more than that.
        for forward in &effects.forward {
            self.forward(forward);
        }
        self.map(wiring, &decoded);
        if self.backend.is_lost() {
            return Err(RestoreError::Lost);
        }
        wiring.owed.clone_from(&state.rung);
        Ok(())
    }
}

fn check_signalled(signalled: &[u16], vectors: u16) -> Result<(), RestoreError> {
    let mut next = 0;
    for &vector in signalled {
        if vector < next || vector >= vectors {
            return Err(RestoreError::Vector(vector));
        }
        next = vector + 1;
    }
    Ok(())
}

/// Whether a doorbell has been rung; it is quiet then. Events are the server's, which may have made one that blocks, or
/// read it at the wrong moment: that keeps nobody waiting here.
fn was_rung(doorbell: &Doorbell) -> bool {
    /// As read(2) does.
    const AT_CURRENT_POSITION: u64 = u64::MAX;
    let mut count = [0; 8];
    let mut buffers = [IoSliceMut::new(&mut count)];
    let read = preadv2(
        &doorbell.event,
        &mut buffers,
        AT_CURRENT_POSITION,
        ReadWriteFlags::NOWAIT,
    );
    read.is_ok()
}

impl Bells {
    pub(super) fn new(probe: &Probe) -> Self {
        let mut bells = Vec::new();
        for (bar, layout) in BarIndex::ALL.into_iter().zip(probe.layouts()) {
            let doorbells = layout.into_iter().flat_map(|layout| layout.doorbells);
            for (index, doorbell) in (0..=u16::MAX).zip(doorbells) {
                let bar = bar.number();
                bells.push((RungDoorbell { bar, index }, doorbell));
            }
        }
        Self(bells)
    }

    /// Takes those that have been rung and not been heard.
    fn take_rung(&self) -> Vec<RungDoorbell> {
        let rung = self.0.iter().filter(|(_, doorbell)| was_rung(doorbell));
        rung.map(|(bell, _)| *bell).collect()
    }

    /// Checks that there are such doorbells, and each once.
    fn check(&self, rung: &[RungDoorbell]) -> Result<(), RestoreError> {
        let mut last = None;
        for &bell in rung {
            if last >= Some(bell) || self.event(bell).is_none() {
                return Err(RestoreError::Doorbell(bell));
            }
            last = Some(bell);
        }
        Ok(())
    }

    fn event(&self, bell: RungDoorbell) -> Option<BorrowedFd<'_>> {
        let found = self.0.iter().find(|(known, _)| *known == bell);
        found.map(|(_, doorbell)| Arc::as_ref(&doorbell.event).as_fd())
    }
}
