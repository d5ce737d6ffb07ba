//! Capabilities, all of which go.

use rustix::io::{Errno, Result};
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities,
};

/// Empties all five sets of the calling thread. The bounding set stays as it is if the thread may not change it: it then
/// has no capability that it could be of use for, and will get none.
pub(super) fn drop_all() -> Result<()> {
    clear_ambient_capability_set()?;
    let held = capabilities(None)?;
    if held.effective.contains(CapabilitySet::SETPCAP) {
        empty_bounding_set()?;
    }
    let none = CapabilitySet::empty();
    set_capabilities(
        None,
        CapabilitySets {
            effective: none,
            permitted: none,
            inheritable: none,
        },
    )
}

fn empty_bounding_set() -> Result<()> {
    for number in 0..u64::BITS {
        let capability = CapabilitySet::from_bits_retain(1 << number);
        match remove_capability_from_bounding_set(capability) {
            Ok(()) => {}
            // The first that this kernel does not have.
            Err(Errno::INVAL) => break,
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::thread;

    use rustix::thread::{capability_is_in_ambient_set, capability_is_in_bounding_set};

    use super::*;

    /// Capabilities are each thread's own.
    #[test]
    fn nothing_is_left() {
        let dropped = || {
            let might = capabilities(None).unwrap().effective;
            drop_all().unwrap();
            let left = capabilities(None).unwrap();
            let all = left.effective | left.permitted | left.inheritable;
            assert_eq!(all, CapabilitySet::empty());
            let ambient = capability_is_in_ambient_set(CapabilitySet::NET_ADMIN);
            assert_eq!(ambient, Ok(false));
            if might.contains(CapabilitySet::SETPCAP) {
                let bounding = capability_is_in_bounding_set(CapabilitySet::CHECKPOINT_RESTORE);
                assert_eq!(bounding, Ok(false));
            }
        };
        thread::spawn(dropped).join().unwrap();
    }
}
