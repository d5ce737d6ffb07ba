//! The control API: HTTP and JSON over a Unix socket, with Cloud Hypervisor's endpoints and bodies.
//!
//! It is served by one thread, and only if there is a socket. That thread never waits for anything but its clients: what
//! they ask for is for [`Control`](crate::control::Control) to do.

pub mod body;

mod connection;
mod endpoints;
mod reply;

pub use self::connection::{Api, ApiError};

/// What all endpoints' paths begin with.
pub const ROOT: &str = "/api/v1";
