//! Whatever a server may send, as the payload of every kind of message.

#![no_main]

#[path = "../harness.rs"]
mod harness;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| harness::parsers(bytes));
