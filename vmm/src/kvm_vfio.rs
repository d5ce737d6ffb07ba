//! KVM's VFIO device: by it KVM and the host's device drivers know of each other.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::ptr;

use devices::kernel::KvmFiles;
use kvm_bindings::{
    KVM_DEV_VFIO_FILE, KVM_DEV_VFIO_FILE_ADD, KVM_DEV_VFIO_FILE_DEL, kvm_create_device,
    kvm_device_attr, kvm_device_type_KVM_DEV_TYPE_VFIO,
};
use kvm_ioctls::{DeviceFd, VmFd};

/// The device.
#[derive(Debug)]
pub(crate) struct KvmVfio(DeviceFd);

impl KvmVfio {
    /// Makes the device, of which a VM can have one.
    pub(crate) fn new(vm: &VmFd) -> io::Result<Self> {
        let mut device = kvm_create_device {
            type_: kvm_device_type_KVM_DEV_TYPE_VFIO,
            ..Default::default()
        };
        Ok(Self(vm.create_device(&mut device)?))
    }

    fn set(&self, attribute: u32, file: BorrowedFd<'_>) -> io::Result<()> {
        let file: RawFd = file.as_raw_fd();
        let attribute = kvm_device_attr {
            flags: 0,
            group: KVM_DEV_VFIO_FILE,
            attr: attribute.into(),
            addr: ptr::from_ref(&file) as u64,
        };
        Ok(self.0.set_device_attr(&attribute)?)
    }
}

impl KvmFiles for KvmVfio {
    fn add(&self, file: BorrowedFd<'_>) -> io::Result<()> {
        self.set(KVM_DEV_VFIO_FILE_ADD, file)
    }

    fn remove(&self, file: BorrowedFd<'_>) {
        if let Err(error) = self.set(KVM_DEV_VFIO_FILE_DEL, file) {
            log::debug!("KVM does not let go of a VFIO file: {error}");
        }
    }
}
