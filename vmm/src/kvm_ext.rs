//! What kvm-ioctls cannot say.
#![expect(unsafe_code, reason = "ioctls")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd as _, IntoRawFd as _, OwnedFd};

use kvm_bindings::{
    KVMIO, kvm_clear_dirty_log, kvm_clear_dirty_log__bindgen_ty_1, kvm_ioeventfd,
    kvm_ioeventfd_flag_nr_datamatch, kvm_ioeventfd_flag_nr_deassign, kvm_ioeventfd_flag_nr_pio,
};
use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::ioctl::ioctl_with_ref;

/// The macros make undocumented public functions.
mod numbers {
    use super::{KVMIO, kvm_clear_dirty_log, kvm_ioeventfd};
    use vmm_sys_util::{ioctl_iow_nr, ioctl_iowr_nr};

    ioctl_iow_nr!(KVM_IOEVENTFD, KVMIO, 0x79, kvm_ioeventfd);
    ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);
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

/// Has KVM log writes again to the pages of a memory slot whose bits are set: the first bit is that of `first_page`, a
/// multiple of 64. Bits beyond the slot's end are ignored.
pub(crate) fn clear_dirty_log(
    vm: &VmFd,
    slot: u32,
    first_page: u64,
    pages: u64,
    bits: &[u64],
) -> io::Result<()> {
    let covered = pages.div_ceil(u64::from(u64::BITS)) <= bits.len() as u64;
    let num_pages = u32::try_from(pages).ok().filter(|_| covered);
    let request = kvm_clear_dirty_log {
        slot,
        num_pages: num_pages.ok_or(io::ErrorKind::InvalidInput)?,
        first_page,
        __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 {
            dirty_bitmap: bits.as_ptr().cast_mut().cast(),
        },
    };
    // SAFETY: the ioctl reads a `kvm_clear_dirty_log`, which `request` is, and a bit for each of `num_pages` from where
    // it points, which `bits` has.
    let result = unsafe { ioctl_with_ref(vm, numbers::KVM_CLEAR_DIRTY_LOG(), &request) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// The event that is this descriptor.
pub(crate) fn event(descriptor: OwnedFd) -> EventFd {
    // SAFETY: the descriptor is open and nobody else's, and goes to the event alone.
    unsafe { EventFd::from_raw_fd(descriptor.into_raw_fd()) }
}

/// Borrows the descriptor of `event`, which does not offer it by itself.
pub(crate) fn borrow(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is open as long as `event` lives, and the result is bound to that.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}
