//! The PCI host bridge: configuration space on both buses, and the devices behind it.

mod save;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Weak};
use std::{fmt, io, thread};

use devices::{Attachment, Backend, BusDevice, Descriptors, Passthrough, Probe, Remote};
use pci::{BarAllocator, Bdf, Cause, ConfigPorts, Ecam, Endpoint, HostBridge, Segment, TreePath};

pub(crate) use self::save::{BusMismatch, PciState, PciStateError};
use crate::bars::{Bars, Space};
use crate::config::UserDeviceConfig;
use crate::event_loop::{HostNotices, Server};
use crate::events::Events;
use crate::host_devices::HostDevice;
use crate::interrupts::Interrupts;
use crate::layout;
use crate::memory::Memory;
use crate::servers::Device;

/// Why a device is not on the bus.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The bus itself cannot be set up.
    #[error("cannot set up the PCI bus")]
    Bus(#[source] Cause),
    /// A device cannot be attached.
    #[error("--user-device socket={}: cannot attach {id} (start its server first, and use it for one VM only)", socket.display())]
    Attach {
        /// The device.
        id: String,
        /// Its server's socket.
        socket: PathBuf,
        /// What went wrong.
        #[source]
        source: Cause,
    },
    /// A built-in device cannot be attached.
    #[error("{flag}: cannot attach {id}")]
    AttachBuiltIn {
        /// The flag that asks for the device.
        flag: String,
        /// The device.
        id: String,
        /// What went wrong.
        #[source]
        source: Cause,
    },
    /// A device that another process has handed over cannot be used.
    #[error("cannot take over {id}")]
    Inherit {
        /// The device.
        id: String,
        /// What went wrong.
        #[source]
        source: Cause,
    },
    /// A device of the host cannot be attached.
    #[error("--device: cannot attach {id}")]
    AttachHostDevice {
        /// The device.
        id: String,
        /// What went wrong.
        #[source]
        source: Cause,
    },
}

/// The PCI bus and what is on it.
#[derive(Debug)]
pub(crate) struct PciHost {
    segment: Arc<Segment>,
    bridge: Arc<HostBridge>,
    ports: Arc<ConfigPorts>,
    space: Arc<Space>,
    interrupts: Interrupts,
    allocator: BarAllocator,
    devices: Vec<Arc<Passthrough>>,
    /// Where they are, by their ids.
    places: BTreeMap<String, Bdf>,
    events: Events,
}

impl PciHost {
    /// A bus with nothing on it but the host bridge.
    pub(crate) fn new(
        space: Space,
        interrupts: Interrupts,
        events: Events,
    ) -> Result<Self, DeviceError> {
        Self::try_new(space, interrupts, events).map_err(DeviceError::Bus)
    }

    fn try_new(space: Space, interrupts: Interrupts, events: Events) -> Result<Self, Cause> {
        let segment = Arc::new(Segment::new());
        let bridge = Arc::new(HostBridge::new());
        segment.insert(Bdf::from_bits(0), bridge.clone())?;
        let ecam = EcamDevice(Ecam::new(segment.clone(), layout::LAST_BUS));
        space.memory.insert(layout::ECAM, Arc::new(ecam))?;
        let ports = Arc::new(ConfigPorts::new(segment.clone()));
        let device = ConfigPortsDevice(ports.clone());
        space
            .ports
            .insert(layout::PCI_CONFIG_PORTS, Arc::new(device))?;
        let allocator = BarAllocator::new(&space.windows)?;
        Ok(Self {
            segment,
            bridge,
            ports,
            space: Arc::new(space),
            interrupts,
            allocator,
            devices: Vec::new(),
            places: BTreeMap::new(),
            events,
        })
    }

    /// Connects to a vfio-user server, and puts its device in the next free place. The event loop has to watch the
    /// server.
    pub(crate) fn attach(
        &mut self,
        config: &UserDeviceConfig,
        memory: &Memory,
    ) -> Result<Server, DeviceError> {
        self.try_attach(config, memory)
            .map_err(|source| DeviceError::Attach {
                id: config.id.clone(),
                socket: config.socket.clone(),
                source,
            })
    }

    fn try_attach(&mut self, config: &UserDeviceConfig, memory: &Memory) -> Result<Server, Cause> {
        let remote = Remote::connect(&config.socket, memory.for_messages())?;
        let server = self.insert_remote(&config.id, remote, memory)?;
        log::info!("{} is served on {}", config.id, config.socket.display());
        Ok(server)
    }

    /// As [`attach`](Self::attach), for a server that this process has started.
    pub(crate) fn attach_built_in(
        &mut self,
        Device {
            id,
            flag,
            connection,
        }: Device,
        memory: &Memory,
    ) -> Result<Server, DeviceError> {
        Remote::handshake(connection, memory.for_messages())
            .map_err(Cause::from)
            .and_then(|remote| self.insert_remote(&id, remote, memory))
            .map_err(|source| DeviceError::AttachBuiltIn { flag, id, source })
    }

    fn insert_remote(
        &mut self,
        id: &str,
        remote: Remote,
        memory: &Memory,
    ) -> Result<Server, Cause> {
        let remote = Arc::new(remote);
        memory.attach(remote.as_ref())?;
        let endpoint = self.insert(id, remote.clone(), false)?;
        Ok(Server { remote, endpoint })
    }

    /// Puts a device that another process has in the next free place. Neither is the device told of that, nor is it used
    /// until it is taken over. The event loop has to watch its server.
    pub(crate) fn inherit(
        &mut self,
        attachment: &Attachment,
        descriptors: &Descriptors,
        memory: &Memory,
    ) -> Result<Server, DeviceError> {
        self.try_inherit(attachment, descriptors, memory)
            .map_err(|source| DeviceError::Inherit {
                id: attachment.id.clone(),
                source,
            })
    }

    fn try_inherit(
        &mut self,
        attachment: &Attachment,
        descriptors: &Descriptors,
        memory: &Memory,
    ) -> Result<Server, Cause> {
        let memory = memory.for_messages();
        let remote = Arc::new(Remote::inherit(&attachment.remote, descriptors, memory)?);
        let probe = Probe::inherit(remote.clone(), attachment, descriptors)?;
        let (bdf, endpoint) = self.endpoint(&attachment.id, probe)?;
        self.add(&attachment.id, bdf, &endpoint)?;
        Ok(Server { remote, endpoint })
    }

    /// Puts a device of the host in the next free place. The event loop has to watch for what the host has to say of
    /// it.
    pub(crate) fn attach_host_device(
        &mut self,
        HostDevice { id, device, rom }: HostDevice,
    ) -> Result<HostNotices, DeviceError> {
        let endpoint = self
            .insert(&id, device.clone(), rom)
            .map_err(|source| DeviceError::AttachHostDevice { id, source })?;
        Ok(HostNotices { device, endpoint })
    }

    /// Puts a device in the next free place, with its expansion ROM or without. It can reach guest memory already.
    fn insert(
        &mut self,
        id: &str,
        backend: Arc<dyn Backend>,
        rom: bool,
    ) -> Result<Arc<Passthrough>, Cause> {
        let (bdf, endpoint) = self.endpoint(id, Probe::new(backend, rom)?)?;
        // The device may have served another VM before; and this connects its interrupt pin.
        endpoint.reset()?;
        self.add(id, bdf, &endpoint)?;
        Ok(endpoint)
    }

    /// The endpoint of a device that is to be in the next free place, which is returned, too.
    fn endpoint(&mut self, id: &str, mut probe: Probe) -> Result<(Bdf, Arc<Passthrough>), Cause> {
        let device = self.segment.free_device(0).ok_or("the bus is full")?;
        let bdf = Bdf::new(0, device, 0).ok_or("the bus is full")?;
        let path = TreePath::on_root_bus(bdf)?;
        let mut registers = probe.bars().clone();
        self.allocator.assign(&mut registers)?;
        probe.set_bars(registers);
        let bars = Bars::new(self.space.clone(), probe.layouts())?;
        let interrupts = Box::new(self.interrupts.of_device(device));
        let report = {
            let (id, events) = (id.to_owned(), self.events.clone());
            move |reason: &dyn fmt::Display| {
                events.tell("device", "lost", &[("id", &id), ("reason", reason)]);
            }
        };
        let endpoint = Arc::new_cyclic(|endpoint: &Weak<Passthrough>| {
            let mapper = Box::new(bars.serve_by(endpoint.clone()));
            Passthrough::new(id, path, probe, mapper, interrupts).on_loss(report)
        });
        Ok((bdf, endpoint))
    }

    /// Puts an endpoint on the bus.
    fn add(&mut self, id: &str, bdf: Bdf, endpoint: &Arc<Passthrough>) -> Result<(), Cause> {
        self.segment.insert(bdf, endpoint.clone())?;
        self.devices.push(endpoint.clone());
        self.places.insert(id.to_owned(), bdf);
        log::info!("{id} is {bdf}");
        Ok(())
    }

    /// Where each device is, by its id.
    pub(crate) fn places(&self) -> &BTreeMap<String, Bdf> {
        &self.places
    }

    /// What has been counted of each device, by its id.
    pub(crate) fn counters(&self) -> BTreeMap<String, BTreeMap<String, u64>> {
        let counters = |device: &Arc<Passthrough>| {
            let counters = device.counters().into_iter();
            let counters = counters.map(|(name, count)| (name.to_owned(), count));
            (device.id().to_owned(), counters.collect())
        };
        self.devices.iter().map(counters).collect()
    }

    /// Resets every device, all at once since each may take its time, and then calls `then`. No vCPU runs. A device
    /// that does not reset is given up: it might go on using what the next guest has other plans for.
    pub(crate) fn reset(&self, then: impl FnOnce() + Send + 'static) -> io::Result<()> {
        let devices = self.devices.clone();
        let reset_all = move || {
            thread::scope(|scope| {
                for device in &devices {
                    let spawned = thread::Builder::new().spawn_scoped(scope, || reset(device));
                    if spawned.is_err() {
                        reset(device);
                    }
                }
            });
            then();
        };
        let thread = thread::Builder::new().name("reset".into());
        thread.spawn(reset_all).map(drop)
    }
}

fn reset(device: &Passthrough) {
    if let Err(error) = device.reset() {
        device.give_up(&format_args!("it does not reset: {error}"));
    }
}

impl Drop for PciHost {
    /// The endpoints hold the buses, which hold configuration space, which holds the endpoints.
    fn drop(&mut self) {
        for (bdf, _) in self.segment.endpoints() {
            self.segment.remove(bdf);
        }
    }
}

#[derive(Debug)]
struct EcamDevice(Ecam);

impl BusDevice for EcamDevice {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.0.read(offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.0.write(offset, data);
    }
}

#[derive(Debug)]
struct ConfigPortsDevice(Arc<ConfigPorts>);

impl BusDevice for ConfigPortsDevice {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match u8::try_from(offset) {
            Ok(offset) => self.0.read(offset, data),
            Err(_) => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Ok(offset) = u8::try_from(offset) {
            self.0.write(offset, data);
        }
    }
}
