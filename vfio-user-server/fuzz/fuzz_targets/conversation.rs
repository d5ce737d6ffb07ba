//! Whatever a client may say, to a server of a device with everything.

#![no_main]

#[path = "../harness.rs"]
mod harness;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    harness::conversation(bytes);
});
