//! What tests with real kernels are made of: programs that are started and waited for, guests that report, and the
//! suite that runs the cases. Nothing in here sleeps for a fixed time: a test waits for an event, up to a deadline.

mod case;
mod process;
mod report;
mod suite;

pub use self::case::{BOOT, Case, Images, SOON, user_device};
pub use self::process::{Exit, Line, Process, Stream};
pub use self::report::Report;
pub use self::suite::Suite;
