//! What tests with real kernels are made of: programs that are started and waited for, guests that report, and the
//! suite that runs the cases. Nothing in here sleeps for a fixed time: a test waits for an event, up to a deadline.

mod case;
mod cost;
mod counters;
mod heartbeat;
mod host;
mod kernel_log;
mod lan;
pub mod ledger;
mod monitor;
mod process;
mod report;
mod servers;
mod suite;
mod tap;

pub use self::case::{BOOT, Case, Images, NOBODY, SOON, user_device};
pub use self::cost::{Cost, Counts, Meter};
pub use self::counters::{Counters, Trips};
pub use self::host::{HostDevice, Mtty, join_wire, load, run};
pub use self::lan::{Host, Lan};
pub use self::monitor::Monitor;
pub use self::process::{Exit, Line, Process, Stream};
pub use self::report::Report;
pub use self::servers::Server;
pub use self::suite::Suite;
pub use self::tap::{Peer, Tap};
