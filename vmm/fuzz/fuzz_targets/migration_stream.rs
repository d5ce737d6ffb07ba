//! Whatever a peer may say on any connection of a migration.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    vmm::fuzz::migration_stream(bytes);
});
