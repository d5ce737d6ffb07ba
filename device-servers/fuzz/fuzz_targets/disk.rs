//! Whatever a guest may do to a virtio disk.

#![no_main]

#[path = "../../tests/support/drive.rs"]
mod drive;
#[path = "../harness.rs"]
mod harness;
#[path = "../../tests/support/mod.rs"]
mod support;

use std::cell::RefCell;
use std::time::Duration;

thread_local! {
    static GUEST: RefCell<harness::Guest> = RefCell::new(harness::Guest::new(Duration::from_millis(1)));
}

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    GUEST.with_borrow_mut(|guest| guest.act(bytes));
});
