//! The contract of backends, on one that is nothing but memory, and on a vfio-user server. (The lab has it on a device of
//! the host.)
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};

use devices::{
    Backend, BackendError, Doorbell, Handover, Irq, IrqInfo, MessageControl, Migration, Region,
    RegionInfo, Remote,
};
use pci::BarIndex;
use tests::backend_contract::{self, Subject};
use tests::device_thread::DeviceThread;
use tests::migration_contract;
use vfio_user_client::{ConnError, DmaError, GuestDma};

const BAR0: BarIndex = BarIndex::ALL[0];

#[test]
fn memory_keeps_the_contract() {
    let subject = Subject {
        ids: [0x52, 0x4f, 0, 0],
        sizes: [0x1000, 0, 0, 0, 0, 0],
        register: (BAR0, 8),
        value: (7, 7),
        initial: Some(0),
        raise: (Irq::Msi, BAR0, 0x10, 0),
        calm: None,
        control: (0, 0),
        vectors: [1, 4, 2],
    };
    backend_contract::check(&Memory::new(), &subject).unwrap();
}

#[test]
fn a_vfio_user_server_keeps_the_contract() {
    let server = DeviceThread::demo().unwrap();
    let remote = Remote::connect(server.socket(), Arc::new(Nobody)).unwrap();
    let subject = Subject {
        ids: [0x52, 0x4f, 1, 0],
        sizes: [0x1000, 0x1000, 0x1_0000, 0, 0x20, 0],
        register: (BAR0, 8),
        value: (7, 7),
        initial: Some(0),
        raise: (Irq::Msix, BAR0, 0x10, 0),
        calm: None,
        control: (0xb2, 1 << 15),
        vectors: [1, 4, 64],
    };
    backend_contract::check(&remote, &subject).unwrap();
}

#[test]
fn a_vfio_user_server_migrates() {
    let servers = [(); 2].map(|()| DeviceThread::demo().unwrap());
    let [from, to] = servers
        .each_ref()
        .map(|server| Remote::connect(server.socket(), Arc::new(Nobody)).unwrap());
    let subject = migration_contract::Subject {
        register: (BAR0, 8, 4),
        value: [7, 0, 0, 0],
        is_reset: true,
        notices_garbage: true,
    };
    migration_contract::check(&from, &to, &subject).unwrap();
    // And back.
    migration_contract::check(&to, &from, &subject).unwrap();
}

/// Guest memory that there is none of.
struct Nobody;

impl GuestDma for Nobody {
    fn read(&self, _: u64, _: &mut [u8]) -> Result<(), DmaError> {
        Err(DmaError)
    }

    fn write(&self, _: u64, _: &[u8]) -> Result<(), DmaError> {
        Err(DmaError)
    }
}

/// A device that is nothing but memory and events. A write to BAR 0 at 0x10 signals the first vector.
#[derive(Debug)]
struct Memory(Mutex<Option<State>>);

#[derive(Debug)]
struct State {
    config: Vec<u8>,
    bar: Vec<u8>,
    events: [Vec<Option<OwnedFd>>; 3],
}

impl Memory {
    fn new() -> Self {
        let mut config = vec![0; 256];
        config[..2].copy_from_slice(&[0x52, 0x4f]);
        let vectors = |count| (0..count).map(|_| None).collect();
        Self(Mutex::new(Some(State {
            config,
            bar: vec![0; 0x1000],
            events: [vectors(1), vectors(4), vectors(2)],
        })))
    }

    fn with<R>(&self, with: impl FnOnce(&mut State) -> Option<R>) -> Result<R, BackendError> {
        let mut state = self.0.lock().unwrap();
        let done = state.as_mut().and_then(with);
        let error = || ConnError::System(io::ErrorKind::InvalidInput.into());
        done.ok_or_else(|| error().into())
    }
}

impl State {
    fn bytes(&mut self, region: Region, offset: u64, length: usize) -> Option<&mut [u8]> {
        let start = usize::try_from(offset).ok()?;
        let range: Range<usize> = start..start.checked_add(length)?;
        match region {
            Region::Config => self.config.get_mut(range),
            Region::Bar(BAR0) => self.bar.get_mut(range),
            Region::Bar(_) => None,
        }
    }
}

fn kind(irq: Irq) -> usize {
    irq.index().try_into().unwrap()
}

impl Backend for Memory {
    fn region(&self, region: Region) -> Result<RegionInfo, BackendError> {
        let size = match region {
            Region::Config => 256,
            Region::Bar(BAR0) => 0x1000,
            Region::Bar(_) => 0,
        };
        Ok(RegionInfo {
            size,
            writable: true,
            areas: Vec::new(),
        })
    }

    fn read(&self, region: Region, offset: u64, data: &mut [u8]) -> Result<(), BackendError> {
        self.with(|state| {
            data.copy_from_slice(state.bytes(region, offset, data.len())?);
            Some(())
        })
    }

    fn write(&self, region: Region, offset: u64, data: &[u8]) -> Result<(), BackendError> {
        self.with(|state| {
            state
                .bytes(region, offset, data.len())?
                .copy_from_slice(data);
            if region == Region::Bar(BAR0) && offset == 0x10 {
                let first = state
                    .events
                    .iter()
                    .filter_map(|events| events.first()?.as_ref());
                for event in first {
                    rustix::io::write(event, &1_u64.to_ne_bytes()).unwrap();
                }
            }
            Some(())
        })
    }

    fn post(&self, region: Region, offset: u64, data: &[u8]) -> Result<(), BackendError> {
        self.write(region, offset, data)
    }

    fn irq(&self, irq: Irq) -> Result<IrqInfo, BackendError> {
        self.with(|state| {
            Some(IrqInfo {
                count: state.events[kind(irq)].len().try_into().ok()?,
                automasked: false,
            })
        })
    }

    fn arm(&self, irq: Irq, first: u16, events: &[BorrowedFd<'_>]) -> Result<(), BackendError> {
        self.with(|state| {
            let first = usize::from(first);
            let slots = state.events[kind(irq)].get_mut(first..first + events.len())?;
            for (slot, event) in slots.iter_mut().zip(events) {
                *slot = Some(event.as_fd().try_clone_to_owned().ok()?);
            }
            Some(())
        })
    }

    fn disarm(&self, irq: Irq) -> Result<(), BackendError> {
        self.with(|state| {
            state.events[kind(irq)].fill_with(|| None);
            Some(())
        })
    }

    fn unmask(&self, _: Irq) -> Result<(), BackendError> {
        Ok(())
    }

    fn unmask_on(&self, _: Irq, _: BorrowedFd<'_>) -> Result<(), BackendError> {
        Ok(())
    }

    fn doorbells(&self, _: Region) -> Result<Vec<Doorbell>, BackendError> {
        Ok(Vec::new())
    }

    fn reset(&self) -> Result<(), BackendError> {
        self.with(|state| {
            state.bar.fill(0);
            Some(())
        })
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
        self.0.lock().unwrap().is_none()
    }

    fn close(&self) {
        *self.0.lock().unwrap() = None;
    }
}
