//! A device's file, of which KVM may have to know.

use std::fs::File;
use std::io;
use std::ops::Deref;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use super::KvmFiles;

/// The file of a device. KVM, if it was told of the file, is told of its end: it would keep the device open.
#[derive(Debug)]
pub(super) struct DeviceFile {
    file: File,
    kvm: Option<Arc<dyn KvmFiles>>,
}

impl DeviceFile {
    /// A file of which KVM need not know.
    pub(super) fn new(file: OwnedFd) -> Self {
        Self {
            file: file.into(),
            kvm: None,
        }
    }

    /// A file of which KVM is told.
    pub(super) fn known_to(kvm: &Arc<dyn KvmFiles>, file: OwnedFd) -> io::Result<Self> {
        kvm.add(file.as_fd())?;
        Ok(Self {
            file: file.into(),
            kvm: Some(Arc::clone(kvm)),
        })
    }
}

impl Deref for DeviceFile {
    type Target = File;

    fn deref(&self) -> &File {
        &self.file
    }
}

impl Drop for DeviceFile {
    fn drop(&mut self) {
        if let Some(kvm) = &self.kvm {
            kvm.remove(self.file.as_fd());
        }
    }
}
