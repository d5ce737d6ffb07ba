//! Whatever a file or a peer may say that the state of a VM is.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    vmm::fuzz::saved_state(bytes);
});
