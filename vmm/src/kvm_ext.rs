//! What kvm-ioctls cannot say.
#![expect(unsafe_code, reason = "ioctls")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use kvm_bindings::{
    KVMIO, kvm_ioeventfd, kvm_ioeventfd_flag_nr_datamatch, kvm_ioeventfd_flag_nr_deassign,
    kvm_ioeventfd_flag_nr_pio,
};
use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::ioctl::ioctl_with_ref;

/// The macros make undocumented public functions.
mod numbers {
    use super::{KVMIO, kvm_ioeventfd};
    use vmm_sys_util::ioctl_iow_nr;

    ioctl_iow_nr!(KVM_IOEVENTFD, KVMIO, 0x79, kvm_ioeventfd);
}

/// Which writes of the guest signal an event.
#[derive(Debug, Clone, Copy)]
pub(crate) struct IoEvent {
    /// The address or port.
    pub(crate) address: u64,
    /// The width of the write in bytes; 0 for any.
    pub(crate) width: u64,
    /// The value written, if not just any.
    pub(crate) value: Option<u64>,
    /// Whether `address` is a port.
    pub(crate) port: bool,
}

/// Has guest writes that match `when` signal `event`, or no more. Unlike kvm-ioctls' call, this can say "any value of
/// this width", which vfio-user servers ask for.
pub(crate) fn ioeventfd(
    vm: &VmFd,
    event: BorrowedFd<'_>,
    when: &IoEvent,
    assign: bool,
) -> io::Result<()> {
    let mut flags = 0;
    if when.value.is_some() {
        flags |= 1 << kvm_ioeventfd_flag_nr_datamatch;
    }
    if when.port {
        flags |= 1 << kvm_ioeventfd_flag_nr_pio;
    }
    if !assign {
        flags |= 1 << kvm_ioeventfd_flag_nr_deassign;
    }
    let request = kvm_ioeventfd {
        datamatch: when.value.unwrap_or(0),
        addr: when.address,
        len: u32::try_from(when.width).map_err(|_| io::ErrorKind::InvalidInput)?,
        fd: event.as_raw_fd(),
        flags,
        ..Default::default()
    };
    // SAFETY: the ioctl reads a `kvm_ioeventfd`, and `request` is one.
    let result = unsafe { ioctl_with_ref(vm, numbers::KVM_IOEVENTFD(), &request) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Borrows the descriptor of `event`, which does not offer it by itself.
pub(crate) fn borrow(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is open as long as `event` lives, and the result is bound to that.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}
