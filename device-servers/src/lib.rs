//! Outrigger's built-in devices. Each is a vfio-user server, to run in a process of its own.
//!
//! * [`demo`]: a device that does everything that a device can do, for demonstrations, tests, and the development of
//!   clients.
//! * [`disk`]: a disk, of a raw file or a block device.
//! * [`net`]: a network card, on a tap.
//!
//! [`virtio`] is what virtio devices are made with. The process locks itself into a [`sandbox`] before it serves anybody.

#![warn(clippy::indexing_slicing)]

pub mod demo;
pub mod disk;
pub mod net;
pub mod sandbox;
pub mod virtio;
