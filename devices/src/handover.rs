//! Handing a device to another process of this host, which its server does not notice.
//!
//! The endpoint stays where it is until the other process has one of its own: first that is made of what the device is
//! ([`Attachment`](crate::Attachment)), while this one still uses it; then this one leaves the device, and the other takes
//! it over from where it was left ([`Standing`]). Neither says a word to the device, nor does either in the end: whoever
//! goes on just does.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use vfio_user_client::{Connected, Descriptors, Setup, Standing};

use crate::backend::BackendError;

/// A device that another process may have instead.
pub trait Handover: Send + Sync + fmt::Debug {
    /// Describes the way to the device for another process.
    fn describe(&self, descriptors: &mut Descriptors) -> Result<RemoteState, BackendError>;

    /// Leaves the device alone, after waiting for at most `limit` until nothing is on its way to it or from it. Every call
    /// then fails, until this process [goes on](Self::go_on).
    fn leave(
        &self,
        limit: Duration,
        descriptors: &mut Descriptors,
    ) -> Result<Standing, BackendError>;

    /// Learns where another process has left the device, which this one has not used yet.
    fn take_over(&self, standing: &Standing, descriptors: &Descriptors)
    -> Result<(), BackendError>;

    /// Uses the device, again or from now on.
    fn go_on(&self) -> Result<(), BackendError>;

    /// Whether it has been left, or not yet been taken over.
    fn is_away(&self) -> bool;

    /// What the device has been given.
    fn setup(&self) -> Setup;
}

/// The way to a device behind a vfio-user connection, and what the device has said of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RemoteState {
    pub(crate) connected: Connected,
    pub(crate) resettable: bool,
    /// How it can migrate, as of `VFIO_DEVICE_FEATURE_MIGRATION` in linux/vfio.h; 0 if it cannot.
    pub(crate) migration: u64,
}
