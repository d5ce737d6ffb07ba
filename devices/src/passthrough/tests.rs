//! The endpoint over a backend that notes what it is asked.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use pci::{BarIndex, BarMapper, Cause, Endpoint, InterruptPin, MsiMessage, TreePath, Vectors};

use super::{Passthrough, Probe};
use crate::backend::{
    Backend, BackendError, Doorbell, Irq, IrqInfo, MappableArea, MessageControl, Region, RegionInfo,
};
use crate::handover::Handover;
use crate::interrupts::{EventVectors, InterruptLine, InterruptSource, LineEvents};
use crate::migration::Migration;

/// What is noted, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Call {
    Read(Region, u64, usize),
    Write(Region, u64, Vec<u8>),
    Post(Region, u64, Vec<u8>),
    Reset,
    Map(BarIndex),
    Unmap(BarIndex),
}

use Call::{Map, Post, Read, Reset, Unmap, Write};

#[derive(Debug, Clone, Default)]
struct Notes(Arc<Mutex<Vec<Call>>>);

impl Notes {
    fn add(&self, call: Call) {
        self.0.lock().unwrap().push(call);
    }

    fn take(&self) -> Vec<Call> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

/// A device with a BAR of memory, one of I/O ports, MSI-X, and a register of its own in configuration space.
#[derive(Debug)]
struct Device {
    notes: Notes,
    config: Vec<u8>,
    /// What of BAR 0 can be mapped.
    area: Option<MappableArea>,
    doorbell: Option<Doorbell>,
    lost: AtomicBool,
}

const MEMORY: BarIndex = BarIndex::ALL[0];
const PORTS: BarIndex = BarIndex::ALL[1];
const MSIX: u16 = 0x40;
const OWN: u16 = 0x50;
const FEATURES: u16 = 0x58;
const ROM: [u8; 5] = [0x55, 0xaa, 1, 2, 3];

fn device(notes: &Notes) -> Device {
    let mut config = vec![0; 256];
    let mut set = |offset: u16, bytes: &[u8]| {
        let offset = usize::from(offset);
        config[offset..offset + bytes.len()].copy_from_slice(bytes);
    };
    set(0x00, &[0x52, 0x4f, 0x34, 0x12]);
    set(0x06, &[0x10]);
    set(0x14, &[1]);
    set(0x34, &[0x40]);
    // Two vectors, in BAR 0 from 0x800 on, the pending bits from 0xc00 on; and a vendor's capability.
    set(MSIX, &[0x11, 0x50, 1, 0, 0, 8, 0, 0, 0, 0xc, 0, 0]);
    set(OWN, &[9, FEATURES.to_le_bytes()[0], 8, 0, 1, 2, 3, 4]);
    // Advanced features, with a function-level reset.
    set(FEATURES, &[0x13, 0, 6, 2, 0, 0]);
    Device {
        notes: notes.clone(),
        config,
        area: None,
        doorbell: None,
        lost: AtomicBool::new(false),
    }
}

impl Device {
    fn try_call(&self, call: Call) -> Result<(), BackendError> {
        self.notes.add(call);
        if self.is_lost() {
            return Err(BackendError::NotPci);
        }
        Ok(())
    }
}

impl Backend for Device {
    fn region(&self, region: Region) -> Result<RegionInfo, BackendError> {
        let size = match region {
            Region::Bar(MEMORY) => 0x4000,
            Region::Bar(PORTS) => 0x20,
            Region::Config => self.config.len() as u64,
            Region::Bar(BarIndex::ROM) => ROM.len() as u64,
            Region::Bar(_) => 0,
        };
        let has_area = region == Region::Bar(MEMORY);
        Ok(RegionInfo {
            size,
            writable: true,
            areas: self.area.iter().filter(|_| has_area).cloned().collect(),
        })
    }

    fn read(&self, region: Region, offset: u64, data: &mut [u8]) -> Result<(), BackendError> {
        self.try_call(Read(region, offset, data.len()))?;
        let offset = usize::try_from(offset).unwrap();
        match region {
            Region::Config => data.copy_from_slice(&self.config[offset..offset + data.len()]),
            Region::Bar(BarIndex::ROM) => data.copy_from_slice(&ROM),
            Region::Bar(_) => data.fill(0x5a),
        }
        Ok(())
    }

    fn write(&self, region: Region, offset: u64, data: &[u8]) -> Result<(), BackendError> {
        self.try_call(Write(region, offset, data.to_vec()))
    }

    fn post(&self, region: Region, offset: u64, data: &[u8]) -> Result<(), BackendError> {
        self.try_call(Post(region, offset, data.to_vec()))
    }

    fn irq(&self, _: Irq) -> Result<IrqInfo, BackendError> {
        Ok(IrqInfo::default())
    }

    fn arm(&self, _: Irq, _: u16, _: &[BorrowedFd<'_>]) -> Result<(), BackendError> {
        Ok(())
    }

    fn disarm(&self, _: Irq) -> Result<(), BackendError> {
        Ok(())
    }

    fn unmask(&self, _: Irq) -> Result<(), BackendError> {
        Ok(())
    }

    fn unmask_on(&self, _: Irq, _: BorrowedFd<'_>) -> Result<(), BackendError> {
        Ok(())
    }

    fn doorbells(&self, region: Region) -> Result<Vec<Doorbell>, BackendError> {
        let has_doorbell = region == Region::Bar(MEMORY);
        Ok(self
            .doorbell
            .iter()
            .filter(|_| has_doorbell)
            .cloned()
            .collect())
    }

    fn reset(&self) -> Result<(), BackendError> {
        self.try_call(Reset)
    }

    fn message_control(&self) -> MessageControl {
        MessageControl::Arming
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
        self.lost.load(Ordering::Relaxed)
    }

    fn close(&self) {
        self.lost.store(true, Ordering::Relaxed);
    }
}

#[derive(Debug)]
struct Mapper(Notes);

impl BarMapper for Mapper {
    fn map(&self, bar: BarIndex, _: u64) -> Result<(), Cause> {
        self.0.add(Map(bar));
        Ok(())
    }

    fn unmap(&self, bar: BarIndex) {
        self.0.add(Unmap(bar));
    }
}

/// A machine whose interrupt controllers hear nothing.
#[derive(Debug)]
struct Deaf(OwnedFd);

impl InterruptSource for Deaf {
    fn vectors(&self, _: u16) -> Result<Box<dyn EventVectors>, Cause> {
        Ok(Box::new(Deaf(null())))
    }

    fn line(&self, _: InterruptPin, _: LineEvents) -> Result<Box<dyn InterruptLine>, Cause> {
        Err("the device has no pin".into())
    }
}

impl EventVectors for Deaf {
    fn event(&self, _: u16) -> Result<BorrowedFd<'_>, Cause> {
        Ok(self.0.as_fd())
    }

    fn adopt(&self, _: u16, _: OwnedFd) -> Result<(), Cause> {
        Ok(())
    }

    fn set_connected(&self, _: bool) -> Result<(), Cause> {
        Ok(())
    }
}

impl Vectors for Deaf {
    fn program(&self, _: &[(u16, Option<MsiMessage>)]) -> Result<(), Cause> {
        Ok(())
    }

    fn pending(&self, _: u16) -> bool {
        false
    }
}

fn place() -> TreePath {
    TreePath::new(vec![(1, 0)]).unwrap()
}

fn null() -> OwnedFd {
    File::open("/dev/null").unwrap().into()
}

/// The endpoint of a device, its BARs mapped, and nothing noted yet.
fn endpoint(device: Device) -> (Passthrough, Notes) {
    let notes = device.notes.clone();
    let mut probe = Probe::new(Arc::new(device), true).unwrap();
    let mut bars = probe.bars().clone();
    bars.set_address(MEMORY, 0xc000_0000);
    bars.set_address(PORTS, 0x1000);
    probe.set_bars(bars);
    let mapper = Box::new(Mapper(notes.clone()));
    let endpoint = Passthrough::new("it", place(), probe, mapper, Box::new(Deaf(null())));
    endpoint.config_write(0x04, &[3, 0]);
    notes.take();
    (endpoint, notes)
}

fn config(endpoint: &Passthrough, offset: u16) -> u32 {
    let mut data = [0; 4];
    endpoint.config_read(offset, &mut data);
    u32::from_le_bytes(data)
}

#[test]
fn what_the_vmm_owns_is_read_without_asking_the_device() {
    let (endpoint, notes) = endpoint(device(&Notes::default()));
    assert_eq!(config(&endpoint, 0x00), 0x1234_4f52);
    assert_eq!(config(&endpoint, 0x08), 0);
    assert_eq!(config(&endpoint, 0x10), 0xc000_0000);
    assert_eq!(config(&endpoint, 0x14), 0x1001);
    assert_eq!(config(&endpoint, 0x34), 0x40);
    assert_eq!(config(&endpoint, MSIX), 0x0001_5011);
    assert_eq!(config(&endpoint, MSIX + 4), 0x800);
    assert_eq!(config(&endpoint, 0x100), 0);
    let mut entry = [0; 4];
    endpoint.bar_read(MEMORY, 0x80c, &mut entry);
    assert_eq!(entry, [1, 0, 0, 0]);
    assert_eq!(notes.take(), []);
}

#[test]
fn what_the_device_owns_is_asked_for_once() {
    let (endpoint, notes) = endpoint(device(&Notes::default()));
    // The Status register is partly the device's.
    for offset in [0x04, OWN, OWN + 4] {
        config(&endpoint, offset);
        assert_eq!(notes.take(), [Read(Region::Config, offset.into(), 4)]);
    }
    assert_eq!(config(&endpoint, OWN + 4), 0x0403_0201);
    notes.take();
    endpoint.config_write(OWN + 4, &[7]);
    let offset = u64::from(OWN + 4);
    assert_eq!(notes.take(), [Write(Region::Config, offset, vec![7])]);
}

#[test]
fn a_configuration_space_may_end_in_the_middle() {
    let mut device = device(&Notes::default());
    device.config.truncate(0x56);
    let (endpoint, notes) = endpoint(device);
    assert_eq!(config(&endpoint, OWN + 4), 0x0201);
    let offset = u64::from(OWN + 4);
    assert_eq!(notes.take(), [Read(Region::Config, offset, 2)]);
    assert_eq!(config(&endpoint, OWN + 8), 0);
    endpoint.config_write(OWN + 8, &[1; 4]);
    assert_eq!(notes.take(), []);
}

#[test]
fn a_reset_by_a_register_takes_the_device_off_the_bus() {
    let (endpoint, notes) = endpoint(device(&Notes::default()));
    endpoint.config_write(FEATURES + 4, &[0]);
    notes.take();
    endpoint.config_write(FEATURES + 4, &[1]);
    assert_eq!(notes.take(), [Unmap(MEMORY), Unmap(PORTS), Reset]);
    assert_eq!(config(&endpoint, 0x10), 0);
}

#[test]
fn decoding_is_enabled_in_the_device_before_the_guest_reaches_it() {
    let (endpoint, notes) = endpoint(device(&Notes::default()));
    let command = |value: u8| Write(Region::Config, 4, vec![value, 0]);
    endpoint.config_write(0x04, &[1, 0]);
    assert_eq!(notes.take(), [Unmap(MEMORY), command(1)]);
    endpoint.config_write(0x04, &[3, 0]);
    assert_eq!(notes.take(), [command(3), Map(MEMORY)]);
}

#[test]
fn the_rom_answers_while_it_is_enabled() {
    let (endpoint, notes) = endpoint(device(&Notes::default()));
    endpoint.config_write(0x30, &[0xff; 4]);
    assert_eq!(config(&endpoint, 0x30), 0xffff_f801);
    endpoint.config_write(0x30, &0xc100_0000_u32.to_le_bytes());
    notes.take();
    endpoint.config_write(0x30, &[1]);
    assert_eq!(notes.take(), [Map(BarIndex::ROM)]);
    let read = |offset| {
        let mut data = [0; 4];
        endpoint.bar_read(BarIndex::ROM, offset, &mut data);
        data
    };
    endpoint.bar_write(BarIndex::ROM, 0, &[0; 4]);
    assert_eq!(read(0), [0x55, 0xaa, 1, 2]);
    assert_eq!(read(4), [3, 0xff, 0xff, 0xff]);
    assert_eq!(read(8), [0xff; 4]);
    assert_eq!(notes.take(), []);
    endpoint.config_write(0x04, &[1, 0]);
    let command = Write(Region::Config, 4, vec![1, 0]);
    assert_eq!(notes.take(), [Unmap(MEMORY), Unmap(BarIndex::ROM), command]);
}

/// A virtual function's memory decode reads as always on.
#[test]
fn decoding_is_what_the_guest_says_whatever_the_device_reads_as() {
    let mut device = device(&Notes::default());
    device.config[0x04] = 2;
    let (endpoint, notes) = endpoint(device);
    let command = || config(&endpoint, 0x04) & 0xffff;
    endpoint.config_write(0x04, &[0, 0]);
    assert_eq!(notes.take()[..2], [Unmap(MEMORY), Unmap(PORTS)]);
    assert_eq!(command(), 0);
    endpoint.config_write(0x04, &[2, 0]);
    assert_eq!(notes.take().last(), Some(&Map(MEMORY)));
    endpoint.reset().unwrap();
    assert_eq!(notes.take()[0], Unmap(MEMORY));
    assert_eq!(command(), 0);
}

#[test]
fn writes_to_memory_are_posted() {
    let (endpoint, notes) = endpoint(device(&Notes::default()));
    endpoint.bar_write(MEMORY, 8, &[1, 2, 3, 4]);
    endpoint.bar_write(PORTS, 8, &[5]);
    let bar = Region::Bar;
    assert_eq!(
        notes.take(),
        [
            Post(bar(MEMORY), 8, vec![1, 2, 3, 4]),
            Write(bar(PORTS), 8, vec![5])
        ]
    );
}

#[test]
fn writes_are_not_posted_that_the_guest_could_overtake() {
    let file = Arc::new(null());
    let area = MappableArea {
        offset: 0x2000,
        size: 0x1000,
        file: file.clone(),
        file_offset: 0,
    };
    let doorbell = Doorbell {
        offset: 0x100,
        width: 4,
        value: None,
        event: file,
    };
    let notes = Notes::default();
    let mapped = Device {
        area: Some(area.clone()),
        ..device(&notes)
    };
    let rung = Device {
        doorbell: Some(doorbell),
        ..device(&notes)
    };
    for device in [mapped, rung] {
        let (endpoint, notes) = endpoint(device);
        endpoint.bar_write(MEMORY, 8, &[1]);
        assert_eq!(notes.take(), [Write(Region::Bar(MEMORY), 8, vec![1])]);
    }
    // The MSI-X table has the only page that could be mapped, so nothing is.
    let table = MappableArea { offset: 0, ..area };
    let (endpoint, notes) = endpoint(Device {
        area: Some(table),
        ..device(&notes)
    });
    endpoint.bar_write(MEMORY, 8, &[1]);
    assert_eq!(notes.take(), [Post(Region::Bar(MEMORY), 8, vec![1])]);
}

#[test]
fn nothing_is_left_of_a_device_that_is_given_up() {
    let (endpoint, notes) = endpoint(device(&Notes::default()));
    endpoint.config_write(MSIX + 2, &[0, 0x80]);
    notes.take();
    endpoint.give_up(&"for a test");
    assert_eq!(notes.take(), [Unmap(MEMORY), Unmap(PORTS)]);
    endpoint.give_up(&"again");
    for offset in [0x00, 0x04, 0x10, MSIX, OWN] {
        assert_eq!(config(&endpoint, offset), u32::MAX);
    }
    let mut data = [0; 4];
    endpoint.bar_read(MEMORY, 0, &mut data);
    assert_eq!(data, [0xff; 4]);
    // A guest that does not know puts it back on the bus; and it comes through a reset.
    endpoint.config_write(0x04, &[0, 0]);
    endpoint.config_write(0x04, &[3, 0]);
    endpoint.bar_write(MEMORY, 0x800, &[0; 4]);
    endpoint.reset().unwrap();
    assert_eq!(config(&endpoint, 0x00), u32::MAX);
    assert_eq!(notes.take(), []);
}
