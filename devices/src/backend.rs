//! What stands behind a passthrough endpoint: the kernel's VFIO, or a vfio-user server.
//!
//! The two are one protocol on two transports, so the trait has its verbs; where they differ, a value says how.

use std::fmt;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

use pci::BarIndex;
use vfio_user_client::{ConnError, DeviceState};

use crate::handover::Handover;
use crate::kernel::KernelError;
use crate::migration::Migration;

/// Why a backend did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// The vfio-user connection says why.
    #[error(transparent)]
    Remote(#[from] ConnError),
    /// The kernel's VFIO says why.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// It is some other kind of device.
    #[error("it is not a PCI device")]
    NotPci,
    /// It has no state that could be taken out.
    #[error("it has no migration interface")]
    Unmigratable,
    /// It cannot be another process' instead.
    #[error("it is tied to the process that has it")]
    Tied,
    /// It does not come back from where somebody else's migration left it.
    #[error("it is in the state {state:?} and does not run: {remedy}")]
    NotRunning {
        /// The state that it is in.
        state: DeviceState,
        /// What to do about it.
        remedy: &'static str,
    },
}

/// A PCI device somewhere else.
///
/// All methods may be called by many threads at once and return by a deadline.
pub trait Backend: Send + Sync + fmt::Debug {
    /// Describes a region.
    fn region(&self, region: Region) -> Result<RegionInfo, BackendError>;

    /// Reads from a region; `data` is within it.
    fn read(&self, region: Region, offset: u64, data: &mut [u8]) -> Result<(), BackendError>;

    /// Writes to a region; `data` is within it.
    fn write(&self, region: Region, offset: u64, data: &[u8]) -> Result<(), BackendError>;

    /// Writes to a region, and may return before the device has the write. It has it before whatever comes through
    /// this trait later; but what comes by another way, a mapped area or a doorbell, may overtake it.
    fn post(&self, region: Region, offset: u64, data: &[u8]) -> Result<(), BackendError>;

    /// Describes one kind of interrupt.
    fn irq(&self, irq: Irq) -> Result<IrqInfo, BackendError>;

    /// Has the device signal `events`, if there are any, for its vectors from `first` on. A kind that was disabled is
    /// thereby enabled; vectors that were armed before and are not among these stay as they are.
    fn arm(&self, irq: Irq, first: u16, events: &[BorrowedFd<'_>]) -> Result<(), BackendError>;

    /// Disables all vectors of this kind.
    fn disarm(&self, irq: Irq) -> Result<(), BackendError>;

    /// Lets a level-triggered interrupt that masked itself when it was signalled come again.
    fn unmask(&self, irq: Irq) -> Result<(), BackendError>;

    /// Has the device itself unmask the interrupt whenever `event` is signalled. An error means that it cannot, and
    /// [`Backend::unmask`] is to be called each time.
    fn unmask_on(&self, irq: Irq, event: BorrowedFd<'_>) -> Result<(), BackendError>;

    /// The places in a region where a write only rings a bell.
    fn doorbells(&self, region: Region) -> Result<Vec<Doorbell>, BackendError>;

    /// Puts the device into its state after power-on.
    fn reset(&self) -> Result<(), BackendError>;

    /// Who enables MSI and MSI-X in the device.
    fn message_control(&self) -> MessageControl;

    /// How the device's state is taken out and put back, if it can be.
    fn migration(&self) -> Option<&dyn Migration>;

    /// How another process gets the device, if it can.
    fn handover(&self) -> Option<&dyn Handover>;

    /// What has been counted so far of the calls of the device. It takes a moment and calls no device.
    fn counters(&self) -> Vec<(&'static str, u64)>;

    /// Whether the device is gone for good, so that every call fails.
    fn is_lost(&self) -> bool;

    /// Has nothing more to do with the device: from now on it [is lost](Self::is_lost), and whoever waits in a call
    /// returns.
    fn close(&self);
}

/// A part of a device's address space, as VFIO numbers them (`VFIO_PCI_*_REGION_INDEX` in linux/vfio.h).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Region {
    /// What a BAR decodes.
    Bar(BarIndex),
    /// Configuration space.
    Config,
}

impl Region {
    /// Its number.
    pub fn index(self) -> u32 {
        match self {
            Self::Bar(bar) => u32::from(bar.number()),
            Self::Config => 7,
        }
    }
}

/// What a backend says of a region.
#[derive(Debug, Clone, Default)]
pub struct RegionInfo {
    /// Its length in bytes; 0 if the device has no such region.
    pub size: u64,
    /// Whether writes do anything.
    pub writable: bool,
    /// The parts that may be mapped: page aligned, within the region, apart from each other.
    pub areas: Vec<MappableArea>,
}

/// A part of a region that can be mapped, so that the guest reaches it without an exit.
#[derive(Debug, Clone)]
pub struct MappableArea {
    /// Its offset in the region in bytes.
    pub offset: u64,
    /// Its length in bytes.
    pub size: u64,
    /// What to map.
    pub file: Arc<OwnedFd>,
    /// Where in the file the area starts, in bytes.
    pub file_offset: u64,
}

/// A kind of interrupt, as VFIO numbers them (`VFIO_PCI_*_IRQ_INDEX` in linux/vfio.h).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Irq {
    /// The interrupt pin.
    Intx,
    /// Message signalled interrupts.
    Msi,
    /// Message signalled interrupts with a table.
    Msix,
}

impl Irq {
    /// Its number.
    pub fn index(self) -> u32 {
        match self {
            Self::Intx => 0,
            Self::Msi => 1,
            Self::Msix => 2,
        }
    }
}

/// What a backend says of a kind of interrupt.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct IrqInfo {
    /// How many vectors there are.
    pub count: u32,
    /// Whether the device masks the interrupt by itself when it signals it, and waits to be unmasked.
    pub automasked: bool,
}

/// A place in a region where a write only rings a bell: KVM signals the event and the VMM does not hear of it.
#[derive(Debug, Clone)]
pub struct Doorbell {
    /// Its offset in the region in bytes.
    pub offset: u64,
    /// The width of the writes that ring it, in bytes: 1, 2, 4, 8, or 0 for any.
    pub width: u64,
    /// The value that must be written, if not just any.
    pub value: Option<u64>,
    /// The event that is signalled.
    pub event: Arc<OwnedFd>,
}

/// Who enables MSI and MSI-X in the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MessageControl {
    /// Arming its vectors does; the guest's writes to the control registers stay with the VMM.
    Arming,
    /// The device also wants to see the guest's writes to the control registers.
    Forwarded,
}
