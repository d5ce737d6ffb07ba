//! Resetting a device, in the best way that there is.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use super::{Hold, KernelError, ioctls};

/// Resets the device alone, or together with others if all of them are this VM's. One that cannot be reset at all keeps
/// its state, and the user is told.
pub(super) fn reset(name: &str, device: BorrowedFd<'_>, hold: &Hold) -> Result<(), KernelError> {
    // Not every device that can be reset says so.
    let Err(alone) = ioctls::reset(device) else {
        return Ok(());
    };
    match with_others(device, hold) {
        Ok(()) => Ok(()),
        Err(others) if is_impossible(&alone) => {
            log::warn!(
                "{name}: it cannot be reset, neither alone nor with its neighbours ({others}); it keeps the state that it is in"
            );
            Ok(())
        }
        Err(_) => Err(KernelError::step("reset the device")(alone)),
    }
}

/// By a reset of the slot or the bus that the device is on.
fn with_others(device: BorrowedFd<'_>, hold: &Hold) -> io::Result<()> {
    match hold {
        Hold::Group(group) => {
            let ours = group.all();
            for dependent in ioctls::hot_reset_info(device)? {
                if !ours.iter().any(|group| group.number == dependent.id) {
                    return Err(io::Error::other(format!(
                        "{:04x}:{:02x}:{:02x}.{} is not this VM's",
                        dependent.segment,
                        dependent.bus,
                        dependent.devfn >> 3,
                        dependent.devfn & 7
                    )));
                }
            }
            let groups: Vec<_> = ours.iter().map(|group| group.as_fd()).collect();
            ioctls::hot_reset(device, &groups)
        }
        Hold::Iommufd(_) => ioctls::hot_reset(device, &[]),
    }
}

/// Whether the kernel has no way of resetting this device, as opposed to one that failed.
fn is_impossible(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EINVAL | libc::ENOTTY | libc::ENODEV | libc::EOPNOTSUPP)
    )
}
