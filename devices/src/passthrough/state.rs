//! What is saved of an endpoint: what the VMM knows of it. What the device knows itself is its migration data.
//!
//! The types have nothing of the live ones in them, and are checked on the way in: they may come from another host.

use pci::{BarsState, Cause, ConfigSpaceState, MsiState, MsixState, StateError, TreePath};
use serde::{Deserialize, Serialize};

/// A saved endpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EndpointState {
    /// The device's name.
    pub id: String,
    /// Where it is.
    pub path: TreePath,
    /// Its configuration space.
    pub config: ConfigState,
    /// The vectors of MSI or MSI-X, whichever is enabled, that the device has signalled and the guest has not got, by
    /// ascending number.
    pub signalled: Vec<u16>,
    /// The doorbells that the guest has rung and the device has not heard, in ascending order.
    pub rung: Vec<RungDoorbell>,
}

/// The registers that the VMM owns.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConfigState {
    /// Those that have no model of their own.
    pub space: ConfigSpaceState,
    /// Where its BARs are.
    pub bars: BarsState,
    /// MSI, if it has that.
    pub msi: Option<MsiState>,
    /// MSI-X, if it has that.
    pub msix: Option<MsixState>,
    /// The power state that the guest has chosen, 0 (on) to 3.
    pub power_state: u8,
}

/// A doorbell.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RungDoorbell {
    /// The number of its BAR.
    pub bar: u8,
    /// Which of that BAR's doorbells it is.
    pub index: u16,
}

/// Why an endpoint cannot be saved.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// The device is gone.
    #[error("the device is lost")]
    Lost,
    /// Some access to the device does not end.
    #[error("the device is busy")]
    Busy,
}

/// Why an endpoint cannot be restored. It is then as after a reset.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The device is gone.
    #[error("the device is lost")]
    Lost,
    /// Some access to the device does not end.
    #[error("the device is busy")]
    Busy,
    /// It is another device's state.
    #[error("the state is that of {saved} at {path}")]
    OtherDevice {
        /// The saved device's name.
        saved: String,
        /// Where it was.
        path: TreePath,
    },
    /// The registers are those of another kind of device.
    #[error("the saved registers are not those of this device")]
    Registers(#[from] StateError),
    /// The saved device had a capability that this one has not, or the other way round.
    #[error("{0}: only one of the saved device and this one has it")]
    Capability(&'static str),
    /// There is no such power state.
    #[error("there is no power state {0} that it could be in")]
    PowerState(u8),
    /// A vector that is not enabled, or not in order.
    #[error("vector {0} was saved as signalled, and is out of order or not enabled")]
    Vector(u16),
    /// A doorbell that there is not, or not in order.
    #[error("doorbell {} of BAR{} was saved as rung, and is out of order or not there", .0.index, .0.bar)]
    Doorbell(RungDoorbell),
    /// The device or the machine did not do its part.
    #[error("cannot {step}")]
    Step {
        /// What could not be done.
        step: &'static str,
        /// Why.
        #[source]
        source: Cause,
    },
}

impl RestoreError {
    /// An error for a step that failed, to be given the reason.
    pub(super) fn step(step: &'static str) -> impl Fn(Cause) -> Self {
        move |source| Self::Step { step, source }
    }
}
