//! Whatever a server may say, to a client that asks it for everything.

#![no_main]

#[path = "../harness.rs"]
mod harness;

use std::time::Duration;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    harness::conversation(bytes, Duration::from_millis(1));
});
