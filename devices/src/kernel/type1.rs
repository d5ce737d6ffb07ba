//! Groups of devices in a container, behind an IOMMU of type 1: what every kernel with VFIO has.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::File;
use std::ops::RangeInclusive;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::{fmt, io};

use rustix::process::{Resource, getrlimit};
use vfio_bindings::bindings::vfio::{
    VFIO_API_VERSION, VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_WRITE, VFIO_GROUP_FLAGS_VIABLE,
    VFIO_TYPE1v2_IOMMU,
};

use super::file::DeviceFile;
use super::info::Type1Info;
use super::{AddressSpace, Hold, KernelError, KvmFiles, Opened, ioctls};
use crate::backend::BackendError;
use crate::dma::{DmaTarget, Mapping};
use crate::host::{GroupNode, Ready};

/// A container with the groups of all devices that a VM has.
#[derive(Debug)]
pub struct Type1 {
    container: Arc<Container>,
}

#[derive(Debug)]
struct Container {
    fd: OwnedFd,
    kvm: Arc<dyn KvmFiles>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// The groups in it, as long as a device of theirs is open.
    groups: BTreeMap<u32, Weak<Group>>,
    /// Whether the container has its IOMMU, which it gets with its first group.
    has_iommu: bool,
}

/// A group in a container. Dropped, it leaves.
pub(super) struct Group {
    fd: OwnedFd,
    pub(super) number: u32,
    container: Arc<Container>,
}

impl Type1 {
    /// An empty container.
    pub fn new(kvm: Arc<dyn KvmFiles>) -> Result<Self, KernelError> {
        let fd = open(Path::new("/dev/vfio/vfio"))?;
        let known = ioctls::api_version(fd.as_fd())
            .is_ok_and(|version| version.cast_unsigned() == VFIO_API_VERSION)
            && ioctls::has_extension(fd.as_fd(), VFIO_TYPE1v2_IOMMU).unwrap_or(false);
        if !known {
            return Err(KernelError::NoType1);
        }
        Ok(Self {
            container: Arc::new(Container {
                fd,
                kvm,
                state: Mutex::default(),
            }),
        })
    }
}

impl AddressSpace for Type1 {
    fn open(&self, name: &str, how: &Ready) -> Result<Opened, KernelError> {
        let node = how.group.as_ref().ok_or(KernelError::NoGroup)?;
        let group = self.container.join(node)?;
        let in_use = || KernelError::InUse {
            device: name.to_owned(),
        };
        let name = CString::new(name).map_err(|_| KernelError::NotPci)?;
        let file = match ioctls::device(group.fd.as_fd(), &name) {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => return Err(in_use()),
            file => file.map_err(KernelError::step("open the device in its group"))?,
        };
        Ok(Opened {
            file: DeviceFile::new(file),
            hold: Hold::Group(group),
        })
    }
}

impl DmaTarget for Type1 {
    fn map(&self, mapping: &Mapping<'_>) -> Result<(), BackendError> {
        let Mapping {
            iova,
            size,
            address,
            ..
        } = *mapping;
        let container = self.container.fd.as_fd();
        let info = ioctls::iommu_info(container)
            .map_err(KernelError::step("describe the host's IOMMU"))?;
        let info = Type1Info::parse(&info);
        check_range(iova, size, &info.ranges)?;
        if info.available == Some(0) {
            return Err(KernelError::TooManyMappings.into());
        }
        let flags = VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE;
        ioctls::map_dma(container, flags, address, iova, size)
            .map_err(|source| map_error(iova, size, source))?;
        Ok(())
    }

    fn unmap(&self, iova: u64, size: u64) -> Result<(), BackendError> {
        ioctls::unmap_dma(self.container.fd.as_fd(), iova, size)
            .map_err(KernelError::step("take guest RAM from the host's IOMMU"))?;
        Ok(())
    }
}

impl Container {
    /// A group, which is in the container from now on if it was not before.
    fn join(self: &Arc<Self>, node: &GroupNode) -> Result<Arc<Group>, KernelError> {
        let number = node.number;
        let mut state = self.state();
        if let Some(group) = state.groups.get(&number).and_then(Weak::upgrade) {
            return Ok(group);
        }
        state.groups.retain(|_, group| group.strong_count() > 0);
        // The IOMMU went with the last group, and all that was mapped in it.
        state.has_iommu &= !state.groups.is_empty();
        let fd = open(&node.path)?;
        let flags = ioctls::group_flags(fd.as_fd())
            .map_err(KernelError::step("tell the state of the device's group"))?;
        if flags & VFIO_GROUP_FLAGS_VIABLE == 0 {
            return Err(KernelError::NotViable(number));
        }
        ioctls::set_container(fd.as_fd(), self.fd.as_fd()).map_err(KernelError::step(
            "put the device's group behind the IOMMU of the VM's other devices",
        ))?;
        // From here on, dropping the group undoes everything.
        let group = Arc::new(Group {
            fd,
            number,
            container: Arc::clone(self),
        });
        if !state.has_iommu {
            ioctls::set_iommu(self.fd.as_fd(), VFIO_TYPE1v2_IOMMU).map_err(no_iommu)?;
            state.has_iommu = true;
        }
        self.kvm
            .add(group.fd.as_fd())
            .map_err(KernelError::step("tell KVM of the device's group"))?;
        state.groups.insert(number, Arc::downgrade(&group));
        Ok(group)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Group {
    /// All groups of its container, with a device open.
    pub(super) fn all(&self) -> Vec<Arc<Self>> {
        let state = self.container.state();
        state.groups.values().filter_map(Weak::upgrade).collect()
    }
}

impl AsFd for Group {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.container.kvm.remove(self.fd.as_fd());
        match ioctls::unset_container(self.fd.as_fd()) {
            // It has left by itself: its last device was taken out of the host.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
            Err(error) => log::debug!(
                "group {} does not leave its container: {error}",
                self.number
            ),
            Ok(()) => {}
        }
    }
}

impl fmt::Debug for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Group")
            .field("number", &self.number)
            .finish_non_exhaustive()
    }
}

/// Opens one of VFIO's files.
pub(super) fn open(path: &Path) -> Result<OwnedFd, KernelError> {
    let file = File::options().read(true).write(true).open(path);
    file.map(OwnedFd::from)
        .map_err(|source| match source.raw_os_error() {
            Some(libc::EBUSY) => KernelError::InUse {
                device: path.display().to_string(),
            },
            _ => KernelError::Open {
                path: path.to_owned(),
                source,
            },
        })
}

/// Whether the IOMMU can translate all of a range. (One that does not say what it can may fail later.)
pub(super) fn check_range(
    iova: u64,
    size: u64,
    usable: &[RangeInclusive<u64>],
) -> Result<(), KernelError> {
    let end = iova.saturating_add(size - 1);
    let inside = |range: &RangeInclusive<u64>| range.contains(&iova) && range.contains(&end);
    if usable.is_empty() || usable.iter().any(inside) {
        return Ok(());
    }
    let ranges = usable
        .iter()
        .map(|range| format!("{:#x} to {:#x}", range.start(), range.end()));
    Err(KernelError::Untranslatable {
        start: iova,
        end,
        usable: ranges.collect::<Vec<_>>().join(", "),
    })
}

/// What it means that memory could not be mapped.
pub(super) fn map_error(iova: u64, size: u64, source: io::Error) -> KernelError {
    match source.raw_os_error() {
        Some(libc::ENOMEM) => {
            let limit = getrlimit(Resource::Memlock).current;
            let limit = limit.map_or_else(|| "any number".into(), |limit| limit.to_string());
            KernelError::Memlock { iova, size, limit }
        }
        Some(libc::ENOSPC) => KernelError::TooManyMappings,
        _ => KernelError::step("give guest RAM to the host's IOMMU")(source),
    }
}

fn no_iommu(source: io::Error) -> KernelError {
    match source.raw_os_error() {
        Some(libc::EPERM) => KernelError::NoInterruptRemapping,
        _ => KernelError::step("give the devices an IOMMU")(source),
    }
}
