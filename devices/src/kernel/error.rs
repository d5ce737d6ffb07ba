//! What goes wrong with the host's devices, and what to do about it.

use std::io;
use std::path::PathBuf;

/// Why a device of the host cannot be had, or did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// A file of VFIO's or iommufd's cannot be opened.
    #[error("cannot open {}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// What the kernel says.
        #[source]
        source: io::Error,
    },
    /// The kernel has no iommufd.
    #[error(
        "there is no {}: `modprobe iommufd` makes it if this kernel has one; leave --platform iommufd=on out to go without",
        .0.display()
    )]
    NoIommufd(PathBuf),
    /// The device's file is another device's.
    #[error("{} is not the device's file any more; is udev running?", .0.display())]
    StaleNode(PathBuf),
    /// The kernel's VFIO is not one that this program knows.
    #[error(
        "this kernel's VFIO has no IOMMU of type 1, version 2 (is the module vfio_iommu_type1 loaded?)"
    )]
    NoType1,
    /// Not all devices of the group are VFIO's.
    #[error(
        "its IOMMU group {0} is not viable: another device in it is still bound to a driver of the host's; see `outrigger vfio list`"
    )]
    NotViable(u32),
    /// The IOMMU does not keep devices from forging interrupts.
    #[error(
        "the host's IOMMU does not remap interrupts, so the device could forge them; enable interrupt remapping in the \
         firmware, or, for a guest that you trust, load vfio_iommu_type1 with allow_unsafe_interrupts=1"
    )]
    NoInterruptRemapping,
    /// The device's group is somebody else's, or nobody may have it.
    #[error(
        "the kernel does not let this process have the device's IOMMU group: another device of it is in use, or the host's \
         IOMMU does not remap interrupts; if so, enable interrupt remapping in the firmware, or, for a guest that you \
         trust, load iommufd with allow_unsafe_interrupts=1"
    )]
    NotOurs,
    /// Somebody else has the device open.
    #[error(
        "{device} is in use: by another VM (`fuser -v` on its file in /dev/vfio shows which), or given twice"
    )]
    InUse {
        /// Its name, or its file.
        device: String,
    },
    /// Guest RAM lies where the IOMMU cannot put anything.
    #[error(
        "the host's IOMMU cannot translate guest RAM at {start:#x} to {end:#x}, only {usable}; give the VM less memory"
    )]
    Untranslatable {
        /// The first address.
        start: u64,
        /// The last address.
        end: u64,
        /// What it can translate.
        usable: String,
    },
    /// More mappings than the kernel allows.
    #[error(
        "the kernel takes no more DMA mappings (see dma_entry_limit of the module vfio_iommu_type1)"
    )]
    TooManyMappings,
    /// Guest RAM cannot be locked in memory.
    #[error(
        "devices may reach guest RAM at any time, so all of it has to be locked in memory; this process may lock {limit} \
         bytes, too few for the {size} at {iova:#x}: raise RLIMIT_MEMLOCK (`ulimit -l`, or LimitMEMLOCK= of systemd) to \
         the size of guest RAM and some more"
    )]
    Memlock {
        /// The address for the devices.
        iova: u64,
        /// The length in bytes.
        size: u64,
        /// How many bytes may be locked.
        limit: String,
    },
    /// The kernel refused a step.
    #[error("the kernel does not {step}")]
    Step {
        /// What was tried.
        step: &'static str,
        /// What the kernel says.
        #[source]
        source: io::Error,
    },
    /// There is no VFIO character device for it.
    #[error(
        "it has no VFIO character device, which iommufd needs: leave --platform iommufd=on out"
    )]
    NoDeviceNode,
    /// There is no group for it.
    #[error("it has no VFIO group's file: use --platform iommufd=on")]
    NoGroup,
    /// The device is not PCI.
    #[error("it is not a PCI device")]
    NotPci,
    /// An access beyond the end of a region, or to one that is not there.
    #[error("it has nothing there")]
    Outside,
    /// The device has no migration data in the state that it is in.
    #[error("it is in a state in which its migration data is neither read nor written")]
    NoData,
    /// Its migration data has been refused, and what it has of it is not a state.
    #[error("it has refused some of its migration data, and has to be reset")]
    HalfRestored,
    /// A migration state that nobody knows.
    #[error("the kernel says that it is in the migration state {0}, which there is not")]
    UnknownState(u32),
    /// The device has been given back.
    #[error("it was given back to the host")]
    Closed,
}

impl KernelError {
    /// An error for a step that failed, to be given what the kernel says.
    pub(super) fn step(step: &'static str) -> impl Fn(io::Error) -> Self {
        move |source| Self::Step { step, source }
    }
}
