//! Devices by their own files, in an address space of an iommufd: what newer kernels have.

use std::fs::{self, File};
use std::io;
use std::ops::RangeInclusive;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use iommufd_bindings::iommufd::{
    iommu_ioas_map, iommufd_ioas_map_flags_IOMMU_IOAS_MAP_FIXED_IOVA,
    iommufd_ioas_map_flags_IOMMU_IOAS_MAP_READABLE,
    iommufd_ioas_map_flags_IOMMU_IOAS_MAP_WRITEABLE,
};
use iommufd_ioctls::{IommuFd, IommufdError, IommufdIoas};
use rustix::fs::{fstat, major, minor};

use super::file::DeviceFile;
use super::type1::{check_range, map_error, open};
use super::{AddressSpace, Hold, KernelError, KvmFiles, Opened, ioctls};
use crate::backend::BackendError;
use crate::dma::{DmaTarget, Mapping};
use crate::host::Ready;

/// An address space of an iommufd.
#[derive(Debug)]
pub struct Iommufd {
    space: Arc<Space>,
    kvm: Arc<dyn KvmFiles>,
}

pub(super) struct Space {
    ioas: IommufdIoas,
    iommufd: Arc<IommuFd>,
}

impl Iommufd {
    /// A new address space of an iommufd of our own.
    pub fn new(kvm: Arc<dyn KvmFiles>) -> Result<Self, KernelError> {
        let path = Path::new("/dev/iommu");
        let iommufd = open(path).map_err(|error| match error {
            KernelError::Open { source, .. } if source.kind() == io::ErrorKind::NotFound => {
                KernelError::NoIommufd(path.to_owned())
            }
            error => error,
        })?;
        Self::with(iommufd, kvm)
    }

    /// A new address space of an iommufd that somebody else has opened.
    pub fn with(iommufd: OwnedFd, kvm: Arc<dyn KvmFiles>) -> Result<Self, KernelError> {
        let iommufd = Arc::new(IommuFd::new_from_fd(File::from(iommufd)));
        let ioas = IommufdIoas::new(Arc::clone(&iommufd))
            .map_err(failed("make an address space for the devices"))?;
        Ok(Self {
            space: Arc::new(Space { ioas, iommufd }),
            kvm,
        })
    }

    /// Takes a device whose file somebody else has opened.
    pub fn adopt(&self, file: OwnedFd) -> Result<Opened, KernelError> {
        // From here on, closing it undoes everything.
        let file = DeviceFile::known_to(&self.kvm, file)
            .map_err(KernelError::step("tell KVM of the device"))?;
        ioctls::bind_iommufd(file.as_fd(), self.space.iommufd.as_ref())
            .map_err(|source| no_bind(&file, source))?;
        ioctls::attach_iommufd(file.as_fd(), self.space.ioas.id()).map_err(KernelError::step(
            "put the device behind the IOMMU of the VM's other devices",
        ))?;
        Ok(Opened {
            file,
            hold: Hold::Iommufd(Arc::clone(&self.space)),
        })
    }

    fn ranges(&self) -> io::Result<Vec<RangeInclusive<u64>>> {
        ioctls::iova_ranges(self.space.iommufd.as_ref(), self.space.ioas.id())
    }
}

impl AddressSpace for Iommufd {
    fn open(&self, _: &str, how: &Ready) -> Result<Opened, KernelError> {
        let node = how.device.as_ref().ok_or(KernelError::NoDeviceNode)?;
        let file = open(&node.path)?;
        let opened = fstat(&file).map(|stat| (major(stat.st_rdev), minor(stat.st_rdev)));
        if opened != Ok(node.number) {
            return Err(KernelError::StaleNode(node.path.clone()));
        }
        self.adopt(file)
    }
}

impl DmaTarget for Iommufd {
    fn map(&self, mapping: &Mapping<'_>) -> Result<(), BackendError> {
        let Mapping {
            iova,
            size,
            address,
            file: (file, offset),
        } = *mapping;
        let ranges = self
            .ranges()
            .map_err(KernelError::step("tell what its IOMMU translates"))?;
        check_range(iova, size, &ranges)?;
        let ioas = &self.space.ioas;
        let mapped = ioas.map_file(file.as_raw_fd(), offset, size, iova, true);
        // Linux before 6.13 maps only what this process has mapped.
        let mapped = match mapped.map_err(cause) {
            Err(error) if error.raw_os_error() == Some(libc::ENOTTY) => {
                let map = iommu_ioas_map {
                    size: u32::try_from(size_of::<iommu_ioas_map>()).unwrap_or(0),
                    flags: iommufd_ioas_map_flags_IOMMU_IOAS_MAP_FIXED_IOVA
                        | iommufd_ioas_map_flags_IOMMU_IOAS_MAP_READABLE
                        | iommufd_ioas_map_flags_IOMMU_IOAS_MAP_WRITEABLE,
                    ioas_id: ioas.id(),
                    user_va: address as u64,
                    length: size,
                    iova,
                    ..Default::default()
                };
                self.space.iommufd.map_iommu_ioas(&map).map_err(cause)
            }
            mapped => mapped,
        };
        mapped.map_err(|source| map_error(iova, size, source))?;
        Ok(())
    }

    fn unmap(&self, iova: u64, size: u64) -> Result<(), BackendError> {
        let unmapped = self.space.ioas.unmap(iova, size);
        unmapped.map_err(failed("take guest RAM from the host's IOMMU"))?;
        Ok(())
    }
}

impl std::fmt::Debug for Space {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Space")
            .field("ioas", &self.ioas.id())
            .finish_non_exhaustive()
    }
}

fn no_bind(file: &File, source: io::Error) -> KernelError {
    match source.raw_os_error() {
        Some(libc::EPERM) => KernelError::NotOurs,
        // By its group, or by this file.
        Some(libc::EBUSY | libc::EINVAL) => KernelError::InUse { device: path(file) },
        _ => KernelError::step("bind the device to the iommufd")(source),
    }
}

/// Where a file is.
fn path(file: &File) -> String {
    let link = format!("/proc/self/fd/{}", file.as_raw_fd());
    fs::read_link(&link).map_or(link, |path| path.display().to_string())
}

fn failed(step: &'static str) -> impl Fn(IommufdError) -> KernelError {
    move |error| KernelError::step(step)(cause(error))
}

/// What the kernel says.
fn cause(error: IommufdError) -> io::Error {
    match error {
        IommufdError::IommuIoasAlloc(errno)
        | IommufdError::IommuIoasMap(errno)
        | IommufdError::IommuIoasMapFile(errno)
        | IommufdError::IommuIoasUnmap(errno) => errno.into(),
        error => io::Error::other(error),
    }
}
