//! The backend that is the kernel's VFIO: a device of the host.
//!
//! A device is opened in an [`AddressSpace`], which all devices of a VM share: a container of groups ([`Type1`]) or an
//! address space of an iommufd ([`Iommufd`]). What was opened becomes a [`KernelDevice`].

mod device;
mod error;
mod file;
mod info;
mod interrupts;
mod ioctls;
mod iommufd;
mod migration;
mod reset;
mod type1;

use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

pub use self::device::{KernelDevice, Notices};
pub use self::error::KernelError;
pub use self::iommufd::Iommufd;
pub use self::type1::Type1;
use crate::dma::DmaTarget;
use crate::host::Ready;

/// What tells KVM which VFIO files its VM uses, so that devices' drivers know the VM: KVM's VFIO device
/// (`KVM_DEV_VFIO_FILE` in linux/kvm.h).
pub trait KvmFiles: Send + Sync + fmt::Debug {
    /// Tells of a file, before a device is opened through it.
    fn add(&self, file: BorrowedFd<'_>) -> io::Result<()>;

    /// Takes that back.
    fn remove(&self, file: BorrowedFd<'_>);
}

/// Where devices of the host find guest memory: what they all share.
pub trait AddressSpace: DmaTarget {
    /// Opens the device with this name, whose DMA then goes to this address space.
    fn open(&self, name: &str, how: &Ready) -> Result<Opened, KernelError>;
}

/// A device that has been opened.
#[derive(Debug)]
pub struct Opened {
    file: file::DeviceFile,
    /// What must stay open as long as the device is.
    hold: Hold,
}

/// What a device's place in an address space consists of.
#[derive(Debug, Clone)]
enum Hold {
    Group(Arc<type1::Group>),
    Iommufd(
        #[expect(
            dead_code,
            reason = "the kernel would not let it be destroyed while a device is in it"
        )]
        Arc<iommufd::Space>,
    ),
}
