//! An endpoint between a device and a machine that are made up, so that a test is either of them.

#![allow(dead_code, reason = "not every test needs all of it")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, OnceLock};
use std::time::Duration;

use devices::{
    Backend, BackendError, Doorbell, EventVectors, Handover, InterruptLine, InterruptSource, Irq,
    IrqInfo, LineEvents, MessageControl, Migration, Passthrough, Probe, Region, RegionInfo,
};
use pci::{BarIndex, BarMapper, Cause, Endpoint as _, InterruptPin, MsiMessage, TreePath, Vectors};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

/// A BAR of memory with doorbells and the MSI-X table, and one of I/O ports.
pub(crate) const MEMORY: BarIndex = BarIndex::ALL[0];
pub(crate) const PORTS: BarIndex = BarIndex::ALL[1];
/// Where its capabilities are.
pub(crate) const MSIX: u16 = 0x40;
pub(crate) const MSI: u16 = 0x50;
pub(crate) const POWER: u16 = 0x70;
/// Where the MSI-X table is in its BAR, and how many vectors there are.
pub(crate) const TABLE: u64 = 0x800;
pub(crate) const VECTORS: u16 = 70;
/// Where the doorbells are.
pub(crate) const DOORBELLS: [u64; 2] = [0x100, 0x104];

/// Long enough never to pass in a test that succeeds.
const DEADLINE: Duration = Duration::from_secs(20);

/// An endpoint, its device and its machine.
#[derive(Debug)]
pub(crate) struct Rig {
    pub(crate) endpoint: Passthrough,
    pub(crate) device: Arc<Device>,
    pub(crate) machine: Machine,
}

impl Rig {
    /// A device that is on the bus, at 01.0, and that nobody has used.
    pub(crate) fn new() -> Self {
        Self::of(Device::new())
    }

    pub(crate) fn of(device: Device) -> Self {
        let device = Arc::new(device);
        let machine = Machine::default();
        let mut probe = Probe::new(device.clone(), false).unwrap();
        let mut bars = probe.bars().clone();
        bars.set_address(MEMORY, 0xc000_0000);
        bars.set_address(PORTS, 0x1000);
        probe.set_bars(bars);
        let path = TreePath::new(vec![(1, 0)]).unwrap();
        let mapper = Box::new(machine.clone());
        let endpoint = Passthrough::new("it", path, probe, mapper, Box::new(machine.clone()));
        endpoint.reset().unwrap();
        device.take_writes();
        Self {
            endpoint,
            device,
            machine,
        }
    }

    pub(crate) fn config(&self, offset: u16) -> u32 {
        let mut data = [0; 4];
        self.endpoint.config_read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    /// Decodes the BARs, enables MSI-X, and has these vectors send their number plus 0x40.
    pub(crate) fn enable_msix(&self, vectors: &[u16]) {
        self.endpoint.config_write(0x04, &[7, 0]);
        for &vector in vectors {
            self.set_entry(vector, false);
        }
        self.endpoint.config_write(MSIX + 2, &[0, 0x80]);
    }

    /// Has a vector send its number plus 0x40, or masks it.
    pub(crate) fn set_entry(&self, vector: u16, masked: bool) {
        let entry = TABLE + 16 * u64::from(vector);
        let words = [0xfee0_0000, 0, 0x40 + u32::from(vector), masked.into()];
        for (offset, word) in (entry..).step_by(4).zip(words) {
            self.endpoint.bar_write(MEMORY, offset, &word.to_le_bytes());
        }
    }
}

/// A device that keeps what it is asked to, and whose vectors the test signals.
#[derive(Debug)]
pub(crate) struct Device {
    pub(crate) config: Vec<u8>,
    pub(crate) irqs: [IrqInfo; 3],
    pub(crate) message_control: MessageControl,
    pub(crate) doorbells: Vec<Arc<OwnedFd>>,
    /// Whether it refuses to have MSI-X set up.
    pub(crate) refuses: bool,
    /// Whether INTx can be unmasked by an event.
    pub(crate) unmasks_on_event: bool,
    armed: Mutex<[Vec<Option<OwnedFd>>; 3]>,
    writes: Mutex<Vec<(u64, Vec<u8>)>>,
    unmasked: Mutex<usize>,
    /// Tells of each time.
    has_unmasked: Condvar,
}

impl Device {
    pub(crate) fn new() -> Self {
        let mut config = vec![0; 256];
        let mut set = |offset: u16, bytes: &[u8]| {
            let offset = usize::from(offset);
            config[offset..offset + bytes.len()].copy_from_slice(bytes);
        };
        set(0x00, &[0x52, 0x4f, 0x34, 0x12]);
        set(0x06, &[0x10]);
        set(0x14, &[1]);
        set(0x34, &[0x40]);
        set(0x3d, &[1]);
        let [low, high] = (VECTORS - 1).to_le_bytes();
        set(MSIX, &[0x11, 0x50, low, high, 0, 8, 0, 0, 0, 0x10, 0, 0]);
        // Four vectors with a 64-bit address and mask bits.
        set(MSI, &[5, 0x70, 0x84, 1]);
        set(POWER, &[1, 0, 3, 0]);
        let irq = |count| IrqInfo {
            count,
            automasked: true,
        };
        let vectors = |count| (0..count).map(|_| None).collect();
        Self {
            config,
            irqs: [irq(1), irq(4), irq(VECTORS.into())],
            message_control: MessageControl::Forwarded,
            doorbells: DOORBELLS.iter().map(|_| Arc::new(event())).collect(),
            refuses: false,
            unmasks_on_event: true,
            armed: Mutex::new([vectors(1), vectors(4), vectors(VECTORS)]),
            writes: Mutex::default(),
            unmasked: Mutex::default(),
            has_unmasked: Condvar::new(),
        }
    }

    /// Signals a vector, which must be armed.
    pub(crate) fn signal(&self, irq: Irq, vector: u16) {
        let armed = self.armed.lock().unwrap();
        let event = &armed[kind(irq)][usize::from(vector)];
        signal(event.as_ref().unwrap());
    }

    /// Signals a vector, if it is armed.
    pub(crate) fn signal_if_armed(&self, irq: Irq, vector: u16) {
        let armed = self.armed.lock().unwrap();
        if let Some(event) = &armed[kind(irq)][usize::from(vector)] {
            signal(event);
        }
    }

    /// The writes to configuration space since the last time.
    pub(crate) fn take_writes(&self) -> Vec<(u64, Vec<u8>)> {
        std::mem::take(&mut self.writes.lock().unwrap())
    }

    /// How often INTx has been unmasked since the last time.
    pub(crate) fn take_unmasked(&self) -> usize {
        std::mem::take(&mut self.unmasked.lock().unwrap())
    }

    /// Waits until it has been, since then.
    pub(crate) fn await_unmasked(&self) {
        let unmasked = self.unmasked.lock().unwrap();
        let wait = self
            .has_unmasked
            .wait_timeout_while(unmasked, DEADLINE, |times| *times == 0);
        assert!(!wait.unwrap().1.timed_out());
    }

    /// Hears the doorbells, as a device that runs does: how often each has rung.
    pub(crate) fn hear(&self) -> Vec<u64> {
        self.doorbells.iter().map(|event| drain(event)).collect()
    }
}

impl Backend for Device {
    fn region(&self, region: Region) -> Result<RegionInfo, BackendError> {
        let size = match region {
            Region::Bar(MEMORY) => 0x4000,
            Region::Bar(PORTS) => 0x20,
            Region::Config => self.config.len() as u64,
            Region::Bar(_) => 0,
        };
        Ok(RegionInfo {
            size,
            writable: true,
            areas: Vec::new(),
        })
    }

    fn read(&self, region: Region, offset: u64, data: &mut [u8]) -> Result<(), BackendError> {
        data.fill(0);
        if region == Region::Config {
            let offset = usize::try_from(offset).unwrap();
            data.copy_from_slice(&self.config[offset..offset + data.len()]);
        }
        Ok(())
    }

    fn write(&self, region: Region, offset: u64, data: &[u8]) -> Result<(), BackendError> {
        if region == Region::Config {
            self.writes.lock().unwrap().push((offset, data.to_vec()));
        }
        Ok(())
    }

    fn post(&self, region: Region, offset: u64, data: &[u8]) -> Result<(), BackendError> {
        self.write(region, offset, data)
    }

    fn irq(&self, irq: Irq) -> Result<IrqInfo, BackendError> {
        Ok(self.irqs[kind(irq)])
    }

    fn arm(&self, irq: Irq, first: u16, events: &[BorrowedFd<'_>]) -> Result<(), BackendError> {
        if self.refuses && irq == Irq::Msix {
            return Err(BackendError::NotPci);
        }
        let mut armed = self.armed.lock().unwrap();
        let slots = armed[kind(irq)].iter_mut().skip(first.into());
        for (slot, event) in slots.zip(events) {
            *slot = Some(event.try_clone_to_owned().unwrap());
        }
        Ok(())
    }

    fn disarm(&self, irq: Irq) -> Result<(), BackendError> {
        self.armed.lock().unwrap()[kind(irq)].fill_with(|| None);
        Ok(())
    }

    fn unmask(&self, _: Irq) -> Result<(), BackendError> {
        *self.unmasked.lock().unwrap() += 1;
        self.has_unmasked.notify_all();
        Ok(())
    }

    fn unmask_on(&self, _: Irq, _: BorrowedFd<'_>) -> Result<(), BackendError> {
        if self.unmasks_on_event {
            Ok(())
        } else {
            Err(BackendError::NotPci)
        }
    }

    fn doorbells(&self, region: Region) -> Result<Vec<Doorbell>, BackendError> {
        let is_there = region == Region::Bar(MEMORY);
        let places = DOORBELLS.into_iter().zip(&self.doorbells);
        let doorbell = |(offset, event): (u64, &Arc<OwnedFd>)| Doorbell {
            offset,
            width: 4,
            value: None,
            event: event.clone(),
        };
        Ok(places.filter(|_| is_there).map(doorbell).collect())
    }

    fn reset(&self) -> Result<(), BackendError> {
        Ok(())
    }

    fn message_control(&self) -> MessageControl {
        self.message_control
    }

    fn handover(&self) -> Option<&dyn Handover> {
        None
    }

    fn migration(&self) -> Option<&dyn Migration> {
        None
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }

    fn is_lost(&self) -> bool {
        false
    }

    fn close(&self) {}
}

fn kind(irq: Irq) -> usize {
    irq.index().try_into().unwrap()
}

/// A machine that does with events what KVM does, when it is asked what has been delivered.
#[derive(Debug, Clone, Default)]
pub(crate) struct Machine(Arc<Mutex<Board>>);

#[derive(Debug, Default)]
struct Board {
    mapped: BTreeMap<BarIndex, u64>,
    /// How often a BAR has been mapped.
    maps: usize,
    /// Where a BAR cannot be mapped.
    taken: Option<u64>,
    group: Option<Arc<Group>>,
    line: Option<Arc<Pin>>,
}

impl Machine {
    /// What is mapped where.
    pub(crate) fn mapped(&self) -> BTreeMap<BarIndex, u64> {
        self.0.lock().unwrap().mapped.clone()
    }

    /// How often a BAR has been mapped since the last time.
    pub(crate) fn take_maps(&self) -> usize {
        std::mem::take(&mut self.0.lock().unwrap().maps)
    }

    /// Lets nothing be mapped at this address.
    pub(crate) fn take_address(&self, address: u64) {
        self.0.lock().unwrap().taken = Some(address);
    }

    /// The messages that reached the guest since the last time, as their data.
    pub(crate) fn delivered(&self) -> Vec<u32> {
        let board = self.0.lock().unwrap();
        board.group.as_ref().map_or(Vec::new(), |group| {
            std::mem::take(&mut group.deliver().delivered)
        })
    }

    /// Whether the interrupt line was asserted since the last time.
    pub(crate) fn is_asserted(&self) -> bool {
        let board = self.0.lock().unwrap();
        let line = board.line.as_ref();
        line.is_some_and(|line| *line.connected.lock().unwrap() && drain(&line.trigger) > 0)
    }

    /// Waits until it is.
    pub(crate) fn await_asserted(&self) {
        let line = self.line();
        let mut fds = [PollFd::new(&line.trigger, PollFlags::IN)];
        let deadline = Timespec::try_from(DEADLINE).unwrap();
        assert_eq!(poll(&mut fds, Some(&deadline)).unwrap(), 1);
        assert!(self.is_asserted());
    }

    /// Has the guest come to the end of serving an interrupt of the line, which is not asserted any more then.
    pub(crate) fn serve(&self) {
        let line = self.line();
        drain(&line.trigger);
        signal(&line.resample);
    }

    fn line(&self) -> Arc<Pin> {
        self.0.lock().unwrap().line.clone().unwrap()
    }
}

impl BarMapper for Machine {
    fn map(&self, bar: BarIndex, address: u64) -> Result<(), Cause> {
        let mut board = self.0.lock().unwrap();
        if board.taken == Some(address) {
            return Err("something else is there".into());
        }
        board.mapped.insert(bar, address);
        board.maps += 1;
        Ok(())
    }

    fn unmap(&self, bar: BarIndex) {
        self.0.lock().unwrap().mapped.remove(&bar);
    }
}

impl InterruptSource for Machine {
    fn vectors(&self, count: u16) -> Result<Box<dyn EventVectors>, Cause> {
        let group = Arc::new(Group {
            events: (0..count).map(|_| OnceLock::new()).collect(),
            routes: Mutex::new(Routes {
                messages: vec![None; count.into()],
                connected: true,
                delivered: Vec::new(),
            }),
        });
        self.0.lock().unwrap().group = Some(group.clone());
        Ok(Box::new(GroupHandle(group)))
    }

    fn line(&self, _: InterruptPin, events: LineEvents) -> Result<Box<dyn InterruptLine>, Cause> {
        let line = Arc::new(Pin {
            connected: Mutex::new(events.is_empty()),
            trigger: events.trigger.unwrap_or_else(event),
            resample: events.resample.unwrap_or_else(event),
        });
        self.0.lock().unwrap().line = Some(line.clone());
        Ok(Box::new(PinHandle(line)))
    }
}

#[derive(Debug)]
struct Group {
    events: Vec<OnceLock<OwnedFd>>,
    routes: Mutex<Routes>,
}

#[derive(Debug)]
struct Routes {
    messages: Vec<Option<MsiMessage>>,
    connected: bool,
    delivered: Vec<u32>,
}

impl Group {
    /// Delivers what has been signalled and can be sent.
    fn deliver(&self) -> std::sync::MutexGuard<'_, Routes> {
        let mut routes = self.routes.lock().unwrap();
        if routes.connected {
            for (event, message) in self.events.iter().zip(routes.messages.clone()) {
                if let Some(message) = message
                    && drain(event.get_or_init(self::event)) > 0
                {
                    routes.delivered.push(message.data);
                }
            }
        }
        routes
    }
}

#[derive(Debug)]
struct GroupHandle(Arc<Group>);

impl Vectors for GroupHandle {
    fn program(&self, changes: &[(u16, Option<MsiMessage>)]) -> Result<(), Cause> {
        let mut routes = self.0.deliver();
        for (vector, message) in changes {
            routes.messages[usize::from(*vector)] = *message;
        }
        Ok(())
    }

    fn pending(&self, vector: u16) -> bool {
        drop(self.0.deliver());
        let event = self.0.events[usize::from(vector)].get_or_init(event);
        let mut fds = [PollFd::new(event, PollFlags::IN)];
        poll(&mut fds, Some(&Timespec::default())).unwrap() > 0
    }
}

impl EventVectors for GroupHandle {
    fn event(&self, vector: u16) -> Result<BorrowedFd<'_>, Cause> {
        let event = self.0.events.get(usize::from(vector));
        let event = event.ok_or("there is no such vector")?;
        Ok(event.get_or_init(self::event).as_fd())
    }

    fn adopt(&self, vector: u16, event: OwnedFd) -> Result<(), Cause> {
        let known = self.0.events.get(usize::from(vector));
        let known = known.ok_or("there is no such vector")?;
        Ok(known.set(event).map_err(|_| "it has one")?)
    }

    fn set_connected(&self, connected: bool) -> Result<(), Cause> {
        self.0.deliver().connected = connected;
        Ok(())
    }
}

#[derive(Debug)]
struct Pin {
    trigger: OwnedFd,
    resample: OwnedFd,
    connected: Mutex<bool>,
}

#[derive(Debug)]
struct PinHandle(Arc<Pin>);

impl InterruptLine for PinHandle {
    fn trigger(&self) -> BorrowedFd<'_> {
        self.0.trigger.as_fd()
    }

    fn resample(&self) -> BorrowedFd<'_> {
        self.0.resample.as_fd()
    }

    fn set_connected(&self, connected: bool) -> Result<(), Cause> {
        *self.0.connected.lock().unwrap() = connected;
        Ok(())
    }
}

pub(crate) fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap()
}

pub(crate) fn signal(event: &OwnedFd) {
    rustix::io::write(event, &1_u64.to_ne_bytes()).unwrap();
}

/// How often an event has been signalled since the last time.
pub(crate) fn drain(event: &OwnedFd) -> u64 {
    let mut count = [0; 8];
    let read = rustix::io::read(event, &mut count);
    read.map_or(0, |_| u64::from_ne_bytes(count))
}
