//! The host's devices as sysfs shows them: found by whatever users call them, and judged before one is opened.
//!
//! Nothing here writes or opens a device. What sysfs does not say, or says in a way that cannot be understood, is
//! `None`: the kernel has the last word when the device is opened, and no answer given here replaces its checks.

mod device;
mod group;
mod name;
mod ready;
mod sysfs;

#[cfg(test)]
mod fake;
#[cfg(test)]
mod tests;

pub use device::{DeviceNode, HostDevice, Kind};
pub use group::{Group, Member};
pub use ready::{GroupNode, NotReady, Obstacle, Ready};
pub use sysfs::{HostError, Sysfs};
