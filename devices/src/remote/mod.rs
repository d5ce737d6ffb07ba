//! The backend that is a vfio-user server.

mod handover;
mod migration;

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;

use vfio_user_client::{
    Client, ConnError, Counters, DeviceState, DmaAccess, GuestDma, IoEvent, Loss, Options, State,
};

use self::migration::RemoteMigration;
use crate::backend::{
    Backend, BackendError, Doorbell, Irq, IrqInfo, MappableArea, MessageControl, Region, RegionInfo,
};
use crate::dma::{DmaTarget, Mapping};
use crate::handover::Handover;
use crate::migration::Migration;

/// A device in another process, at the other end of a vfio-user connection.
pub struct Remote {
    client: Arc<Client>,
    resettable: bool,
    migration: Option<RemoteMigration>,
}

/// The numbers of regions and interrupts that every PCI device has (`VFIO_PCI_NUM_REGIONS` and those up to
/// `VFIO_PCI_MSIX_IRQ_INDEX` in linux/vfio.h, and what QEMU's client asks for).
const REGIONS: u32 = 8;
const IRQS: u32 = 3;

impl Remote {
    /// Connects to the server that listens on `socket`. `memory` is what it may reach by messages.
    pub fn connect(socket: &Path, memory: Arc<dyn GuestDma>) -> Result<Self, BackendError> {
        Self::new(Client::connect(socket, memory, &Options::default())?)
    }

    /// Connects to the server at the other end of `stream`.
    pub fn handshake(stream: UnixStream, memory: Arc<dyn GuestDma>) -> Result<Self, BackendError> {
        Self::new(Client::handshake(stream, memory, &Options::default())?)
    }

    fn new(client: Client) -> Result<Self, BackendError> {
        start(&client)?;
        let info = client.device_info()?;
        if !info.pci || info.regions < REGIONS || info.irqs < IRQS {
            return Err(BackendError::NotPci);
        }
        let client = Arc::new(client);
        let migration = RemoteMigration::ask(&client)?;
        Ok(Self {
            client,
            resettable: info.resettable,
            migration,
        })
    }

    /// What has happened on the connection so far.
    pub fn counters(&self) -> Counters {
        self.client.counters()
    }

    /// Serves what the server has sent while nobody waited for it. To be called when the descriptor is readable; an
    /// error says that the connection is lost.
    pub fn serve(&self) -> Result<(), Loss> {
        match self.client.serve() {
            State::Lost(loss) => Err(loss),
            _ => Ok(()),
        }
    }
}

/// Has the device run. It may have been left in the middle of a migration, and then refuses even to be asked what it is.
fn start(client: &Client) -> Result<(), BackendError> {
    let state = match client.device_state() {
        Ok(DeviceState::Running) => return Ok(()),
        Ok(state) => state,
        // Not every device can migrate, and one that cannot runs.
        Err(ConnError::Refused { .. }) => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    log::debug!("the device is in the state {state:?}, and is started");
    let started = match state {
        // What it has been given may be half of a state, and an error is left by a reset only.
        DeviceState::Resuming | DeviceState::Error => client.reset(),
        _ => Ok(()),
    };
    let started = started.and_then(|()| match client.device_state()? {
        DeviceState::Running => Ok(()),
        _ => client.set_device_state(DeviceState::Running),
    });
    match started {
        Err(ConnError::Refused { .. }) => Err(BackendError::NotRunning {
            state,
            remedy: "restart its server",
        }),
        started => Ok(started?),
    }
}

impl AsFd for Remote {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.client.as_fd()
    }
}

impl Backend for Remote {
    fn region(&self, region: Region) -> Result<RegionInfo, BackendError> {
        let info = self.client.region_info(region.index())?;
        let areas = match &info.file {
            Some(file) => info
                .areas
                .iter()
                .map(|area| MappableArea {
                    offset: area.offset,
                    size: area.size,
                    file: file.clone(),
                    file_offset: area.file_offset,
                })
                .collect(),
            None => Vec::new(),
        };
        Ok(RegionInfo {
            size: info.size,
            writable: info.writable,
            areas,
        })
    }

    fn read(&self, region: Region, offset: u64, data: &mut [u8]) -> Result<(), BackendError> {
        Ok(self.client.region_read(region.index(), offset, data)?)
    }

    fn write(&self, region: Region, offset: u64, data: &[u8]) -> Result<(), BackendError> {
        Ok(self.client.region_write(region.index(), offset, data)?)
    }

    fn post(&self, region: Region, offset: u64, data: &[u8]) -> Result<(), BackendError> {
        Ok(self.client.region_post(region.index(), offset, data)?)
    }

    fn irq(&self, irq: Irq) -> Result<IrqInfo, BackendError> {
        let info = self.client.irq_info(irq.index())?;
        Ok(IrqInfo {
            count: info.count,
            automasked: info.automasked,
        })
    }

    fn arm(&self, irq: Irq, first: u16, events: &[BorrowedFd<'_>]) -> Result<(), BackendError> {
        Ok(self
            .client
            .set_irq_events(irq.index(), first.into(), events)?)
    }

    fn disarm(&self, irq: Irq) -> Result<(), BackendError> {
        Ok(self.client.disable_irqs(irq.index())?)
    }

    fn unmask(&self, irq: Irq) -> Result<(), BackendError> {
        Ok(self.client.unmask_irq(irq.index(), 0, 1)?)
    }

    fn unmask_on(&self, irq: Irq, event: BorrowedFd<'_>) -> Result<(), BackendError> {
        Ok(self.client.unmask_irq_by_event(irq.index(), event)?)
    }

    fn doorbells(&self, region: Region) -> Result<Vec<Doorbell>, BackendError> {
        let events = self.client.region_io_fds(region.index())?;
        let doorbell = |IoEvent {
                            offset,
                            size,
                            fd,
                            datamatch,
                            ..
                        }| Doorbell {
            offset,
            width: size,
            value: datamatch,
            event: fd,
        };
        Ok(events.into_iter().map(doorbell).collect())
    }

    fn reset(&self) -> Result<(), BackendError> {
        if self.resettable {
            Ok(self.client.reset()?)
        } else {
            Ok(())
        }
    }

    /// SPDK's and libvfio-user's devices look at the control registers in their own configuration space.
    fn message_control(&self) -> MessageControl {
        MessageControl::Forwarded
    }

    fn migration(&self) -> Option<&dyn Migration> {
        self.migration
            .as_ref()
            .map(|migration| migration as &dyn Migration)
    }

    fn handover(&self) -> Option<&dyn Handover> {
        Some(self)
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let counters = self.client.counters();
        vec![
            ("calls", counters.calls),
            ("answers", counters.latency.count()),
            ("posts", counters.posts),
            ("served", counters.served),
            ("bytes_sent", counters.bytes_sent),
            ("bytes_received", counters.bytes_received),
            ("timeouts", counters.timeouts),
            ("refusals", counters.refusals),
            ("bad_answers", counters.bad_answers),
            ("strays", counters.strays),
            ("latency_p50_ns", counters.latency.percentile(50)),
            ("latency_p99_ns", counters.latency.percentile(99)),
            ("latency_max_ns", counters.latency.percentile(100)),
        ]
    }

    fn is_lost(&self) -> bool {
        matches!(self.client.state(), State::Lost(_))
    }

    fn close(&self) {
        self.client.close();
    }
}

impl DmaTarget for Remote {
    fn map(&self, mapping: &Mapping<'_>) -> Result<(), BackendError> {
        let Mapping {
            iova, size, file, ..
        } = *mapping;
        Ok(self
            .client
            .dma_map(iova, size, Some(file), DmaAccess::ReadWrite)?)
    }

    fn unmap(&self, iova: u64, size: u64) -> Result<(), BackendError> {
        Ok(self.client.dma_unmap(iova, size)?)
    }
}

impl fmt::Debug for Remote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Remote").finish_non_exhaustive()
    }
}
