//! The host's devices that a VM has: opened, and let at guest memory.
#![expect(
    unsafe_code,
    reason = "descriptors that the process was started with have only numbers"
)]

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::Instant;

use devices::host::{HostError, NotReady, Ready, Sysfs};
use devices::kernel::{AddressSpace, Iommufd, KernelDevice, KernelError, KvmFiles, Opened, Type1};
use devices::{BackendError, DmaTarget};
use kvm_ioctls::VmFd;

use crate::config::{HostDeviceConfig, HostDeviceSource, IommufdConfig};
use crate::kvm_vfio::KvmVfio;
use crate::memory::Memory;

/// Why a device of the host cannot be the VM's.
#[derive(Debug, thiserror::Error)]
pub enum HostDeviceError {
    /// There is no such device.
    #[error("--device path={path}")]
    Find {
        /// What was asked for.
        path: String,
        /// Why it is not found.
        #[source]
        source: HostError,
    },
    /// It cannot be passed through.
    #[error("--device path={path}")]
    NotReady {
        /// What was asked for.
        path: String,
        /// What stands in the way.
        #[source]
        source: NotReady,
    },
    /// It is given twice.
    #[error("--device: {0} is given twice")]
    Twice(String),
    /// It cannot be opened.
    #[error("--device: cannot open {id}")]
    Open {
        /// The device.
        id: String,
        /// Why not.
        #[source]
        source: KernelError,
    },
    /// Devices cannot be opened at all.
    #[error("--device: cannot pass devices through")]
    AddressSpace(#[source] KernelError),
    /// Guest RAM cannot be given to the devices.
    #[error("--device: cannot let devices at the {size} bytes of guest RAM")]
    Map {
        /// How many there are.
        size: u64,
        /// Why not.
        #[source]
        source: BackendError,
    },
    /// KVM does not know VFIO.
    #[error("--device: KVM has no VFIO device (is the module vfio loaded?)")]
    Kvm(#[source] io::Error),
}

/// A device of the host that is open.
#[derive(Debug)]
pub(crate) struct HostDevice {
    pub(crate) id: String,
    pub(crate) device: Arc<KernelDevice>,
    /// Whether the guest is to see its expansion ROM.
    pub(crate) rom: bool,
}

/// Opens devices, and lets them at guest memory.
pub(crate) fn open(
    devices: &[HostDeviceConfig],
    iommufd: IommufdConfig,
    vm: &VmFd,
    memory: &Memory,
) -> Result<Vec<HostDevice>, HostDeviceError> {
    if devices.is_empty() {
        return Ok(Vec::new());
    }
    // What can be told without opening anything is told first.
    let found = devices.iter().map(find).collect::<Result<Vec<_>, _>>()?;
    let mut names = BTreeSet::new();
    let is_known = |found: &&Found| !names.insert(found.name.clone());
    if let Some(twice) = found.iter().flatten().find(is_known) {
        return Err(HostDeviceError::Twice(twice.name.clone()));
    }
    let kvm = Arc::new(KvmVfio::new(vm).map_err(HostDeviceError::Kvm)?);
    let space = Space::new(iommufd, &found, kvm).map_err(HostDeviceError::AddressSpace)?;
    let mut open = Vec::with_capacity(devices.len());
    for (config, found) in devices.iter().zip(found) {
        let id = &config.id;
        let started = Instant::now();
        let failed = |source| HostDeviceError::Open {
            id: id.clone(),
            source,
        };
        let device = space.open(config, &found).map_err(failed)?;
        let ids = found.as_ref().and_then(|found| found.ids);
        let device = KernelDevice::new(id, device, ids).map_err(failed)?;
        log::info!("{id}: opened in {:?}", started.elapsed());
        if open.is_empty() {
            // There is an IOMMU to map memory in only now.
            let started = Instant::now();
            memory
                .attach(space.dma())
                .map_err(|source| HostDeviceError::Map {
                    size: memory.size(),
                    source,
                })?;
            log::info!(
                "guest RAM pinned for the devices in {:?}",
                started.elapsed()
            );
        }
        open.push(HostDevice {
            id: id.clone(),
            device: Arc::new(device),
            rom: config.rom,
        });
    }
    Ok(open)
}

/// A device as sysfs shows it.
struct Found {
    name: String,
    ready: Ready,
    ids: Option<(u16, u16)>,
}

/// Finds a device in sysfs, unless it comes as a descriptor.
fn find(config: &HostDeviceConfig) -> Result<Option<Found>, HostDeviceError> {
    let HostDeviceSource::Path(path) = &config.source else {
        return Ok(None);
    };
    let sysfs = Sysfs::default();
    let device = sysfs.find(path).map_err(|source| HostDeviceError::Find {
        path: path.clone(),
        source,
    })?;
    let ready = device
        .check(&sysfs)
        .map_err(|source| HostDeviceError::NotReady {
            path: path.clone(),
            source,
        })?;
    Ok(Some(Found {
        name: device.name().to_owned(),
        ready,
        ids: device.ids(),
    }))
}

/// Where the devices find guest memory.
enum Space {
    Type1(Type1),
    Iommufd(Iommufd),
}

impl Space {
    fn new(
        config: IommufdConfig,
        devices: &[Option<Found>],
        kvm: Arc<dyn KvmFiles>,
    ) -> Result<Self, KernelError> {
        let has_node = |found: &Found| found.ready.device.is_some();
        let wanted = match config {
            IommufdConfig::Descriptor(fd) => {
                return Iommufd::with(inherited(fd), kvm).map(Self::Iommufd);
            }
            IommufdConfig::On => true,
            IommufdConfig::Off => false,
            IommufdConfig::Auto => devices.iter().flatten().all(has_node),
        };
        if wanted {
            Iommufd::new(kvm).map(Self::Iommufd)
        } else {
            Type1::new(kvm).map(Self::Type1)
        }
    }

    fn open(
        &self,
        config: &HostDeviceConfig,
        found: &Option<Found>,
    ) -> Result<Opened, KernelError> {
        match (self, found, &config.source) {
            (Self::Type1(space), Some(found), _) => space.open(&found.name, &found.ready),
            (Self::Iommufd(space), Some(found), _) => space.open(&found.name, &found.ready),
            (Self::Iommufd(space), None, HostDeviceSource::Descriptor(fd)) => {
                space.adopt(inherited(*fd))
            }
            // The configuration has been checked for this.
            _ => Err(KernelError::NoDeviceNode),
        }
    }

    fn dma(&self) -> &dyn DmaTarget {
        match self {
            Self::Type1(space) => space,
            Self::Iommufd(space) => space,
        }
    }
}

/// A descriptor that this process was started with.
fn inherited(fd: RawFd) -> OwnedFd {
    // SAFETY: the configuration names each descriptor once, and none but those that were open before this process opened
    // any itself; so nobody else has it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}
