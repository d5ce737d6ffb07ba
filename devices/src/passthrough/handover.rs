//! The endpoint's part when its device goes to another process of this host: see [`Handover`].
//!
//! Here: with no vCPU running, [`disconnect_interrupts`](Passthrough::disconnect_interrupts), [`leave`](Passthrough::leave)
//! and [`save`](Passthrough::save). There: an endpoint of what this one [described](Passthrough::describe),
//! [`take_over`](Passthrough::take_over) and [`restore`](Passthrough::restore). Whoever is to have the device then calls
//! [`resume`](Passthrough::resume).

use std::time::Duration;

use vfio_user_client::{Descriptors, Setup, Standing};

use super::config::Config;
use super::interrupts::Mode;
use super::state::{EndpointState, RestoreError};
use super::{Attachment, Passthrough, Wiring};
use crate::backend::BackendError;
use crate::handover::Handover;

impl Passthrough {
    /// How another process gets the device, if it can.
    pub fn handover(&self) -> Option<&dyn Handover> {
        self.backend.handover()
    }

    /// Describes the device for another process that is to attach it, too. It is still used here.
    pub fn describe(&self, descriptors: &mut Descriptors) -> Result<Attachment, BackendError> {
        let survey = self.survey.as_ref().zip(self.handover());
        let (survey, handover) = survey.ok_or(BackendError::Tied)?;
        let remote = handover.describe(descriptors)?;
        Ok(Attachment::new(self.id(), remote, survey, descriptors))
    }

    /// Leaves the device to whoever goes on with it, after waiting for at most `limit` until nothing is on its way. No vCPU
    /// runs, and the interrupts are disconnected. Its events stay as they are, those that have been signalled, too.
    pub fn leave(
        &self,
        limit: Duration,
        descriptors: &mut Descriptors,
    ) -> Result<Standing, BackendError> {
        let handover = self.handover().ok_or(BackendError::Tied)?;
        handover.leave(limit, descriptors)
    }

    /// Learns where another process has left the device.
    pub fn take_over(
        &self,
        standing: &Standing,
        descriptors: &Descriptors,
    ) -> Result<(), BackendError> {
        let handover = self.handover().ok_or(BackendError::Tied)?;
        handover.take_over(standing, descriptors)
    }

    /// Whether the device has been left, or not yet been taken over.
    pub fn is_left(&self) -> bool {
        self.away().is_some()
    }

    /// The way to the device, if nobody in this process uses it.
    pub(super) fn away(&self) -> Option<&dyn Handover> {
        self.handover().filter(|handover| handover.is_away())
    }

    /// Takes over the state of an endpoint whose device has been `given` all that is needed.
    pub(super) fn take_quietly(
        &self,
        wiring: &mut Wiring,
        config: Config,
        state: &EndpointState,
        given: &Setup,
    ) -> Result<(), RestoreError> {
        let (mode, decoded) = (Mode::of(&config), config.decoded());
        self.unmap(wiring, &decoded);
        let messages = mode.messages(&config);
        *self.config() = config;
        let interrupts = &mut wiring.interrupts;
        interrupts
            .adopt(mode, &messages, given)
            .map_err(RestoreError::step("set up its interrupts"))?;
        // Those that the device has signalled itself are so already.
        interrupts
            .signal(&state.signalled)
            .map_err(RestoreError::step("signal what had been signalled"))?;
        self.map(wiring, &decoded);
        wiring.owed.clone_from(&state.rung);
        Ok(())
    }
}
