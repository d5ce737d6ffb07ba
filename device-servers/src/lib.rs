//! Outrigger's built-in devices. Each is a vfio-user server, to run in a process of its own.
//!
//! * [`demo`]: a device that does everything that a device can do, for demonstrations, tests, and the development of
//!   clients.
//!
//! [`virtio`] is what virtio devices are made with. The process locks itself into a [`sandbox`] before it serves anybody.

#![forbid(unsafe_code)]
#![warn(clippy::indexing_slicing)]

pub mod demo;
pub mod sandbox;
pub mod virtio;
