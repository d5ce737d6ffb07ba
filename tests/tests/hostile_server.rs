//! Device servers that take away what they have given: the guest loses the device, and goes on.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use tests::outrigger::{self, has_kvm};
use tests::truncator;

/// (A KVM that only emulates asks the VMM for memory that it cannot read; on others, KVM_RUN fails: see the lab.)
#[test]
fn truncated_bar_is_lost_and_the_guest_goes_on() {
    if !has_kvm() {
        return;
    }
    let server = truncator::serve().unwrap();
    let kernel = truncator::guest().unwrap();
    let output = outrigger::run_with_device(kernel.path(), server.socket()).unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(
        (output.status.code(), output.stdout.as_slice()),
        (Some(0), b"AB".as_slice()),
        "{said}"
    );
}
