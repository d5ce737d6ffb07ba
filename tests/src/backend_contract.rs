//! What every backend of the passthrough endpoint has to do, whatever is behind it.

use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use devices::{Backend, Irq, MessageControl, Region};
use pci::BarIndex;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

/// A device that can be put to the test, by its registers.
#[derive(Debug)]
pub struct Subject {
    /// The vendor's id and the device's.
    pub ids: [u8; 4],
    /// How many bytes each BAR has.
    pub sizes: [u64; 6],
    /// A register of four bytes, as BAR and offset.
    pub register: (BarIndex, u64),
    /// What to write to the register, and as what it reads then.
    pub value: (u32, u32),
    /// As what it reads after a reset, if that changes it.
    pub initial: Option<u32>,
    /// A write after which the first vector of this kind is signalled.
    pub raise: (Irq, BarIndex, u64, u32),
    /// A write after which the device is content, if it is not by itself.
    pub calm: Option<(BarIndex, u64, u32)>,
    /// Where the control register of that kind is in configuration space, and its value that enables it.
    pub control: (u64, u16),
    /// How many vectors there are of each kind.
    pub vectors: [u32; 3],
}

/// A write of Command that lets the device signal: memory, and bus master.
const COMMAND: [u8; 2] = [6, 0];

/// Puts a backend to the test. Afterwards its device is closed.
///
/// # Errors
/// When it does not do what it has to.
pub fn check(backend: &dyn Backend, subject: &Subject) -> Result<()> {
    regions(backend, subject).context("regions")?;
    registers(backend, subject).context("registers")?;
    mapping(backend).context("mappable areas")?;
    interrupts(backend, subject).context("interrupts")?;
    closed(backend).context("a closed device")
}

fn regions(backend: &dyn Backend, subject: &Subject) -> Result<()> {
    let mut ids = [0; 4];
    backend.read(Region::Config, 0, &mut ids)?;
    ensure!(ids == subject.ids, "the ids are {ids:x?}");
    let size = backend.region(Region::Config)?.size;
    ensure!((64..=4096).contains(&size), "config space has {size} bytes");
    for (bar, size) in BarIndex::ALL.into_iter().zip(subject.sizes) {
        let info = backend.region(Region::Bar(bar))?;
        ensure!(info.size == size, "{bar} has {:#x} bytes", info.size);
        for offset in [size, u64::MAX - 1] {
            let beyond = backend.read(Region::Bar(bar), offset, &mut [0; 4]);
            ensure!(beyond.is_err(), "{bar} has something at {offset:#x}");
            let beyond = backend.write(Region::Bar(bar), offset, &[0; 4]);
            ensure!(beyond.is_err(), "{bar} takes something at {offset:#x}");
        }
        for doorbell in backend.doorbells(Region::Bar(bar))? {
            let end = doorbell.offset + doorbell.width;
            ensure!(end <= size, "{bar} has a doorbell beyond its end");
        }
    }
    let beyond = backend.read(Region::Config, size - 1, &mut [0; 4]);
    ensure!(beyond.is_err(), "config space goes on beyond its end");
    Ok(())
}

fn registers(backend: &dyn Backend, subject: &Subject) -> Result<()> {
    let (bar, offset) = subject.register;
    let (written, expected) = subject.value;
    let read = || -> Result<u32> {
        let mut data = [0; 4];
        backend.read(Region::Bar(bar), offset, &mut data)?;
        Ok(u32::from_le_bytes(data))
    };
    backend.write(Region::Config, 4, &COMMAND)?;
    let data = written.to_le_bytes();
    for posted in [false, true] {
        if posted {
            // A read comes after all that was posted.
            backend.post(Region::Bar(bar), offset, &data)?;
        } else {
            backend.write(Region::Bar(bar), offset, &data)?;
        }
        let value = read()?;
        ensure!(value == expected, "the register is {value:#x}");
        backend.reset()?;
        backend.write(Region::Config, 4, &COMMAND)?;
        let value = read()?;
        ensure!(
            subject.initial.is_none_or(|initial| value == initial),
            "after a reset the register is {value:#x}"
        );
    }
    Ok(())
}

fn mapping(backend: &dyn Backend) -> Result<()> {
    for bar in BarIndex::ALL {
        let info = backend.region(Region::Bar(bar))?;
        let mut end = 0;
        for area in info.areas {
            let aligned = (area.offset | area.size | area.file_offset).is_multiple_of(4096);
            ensure!(aligned && area.size > 0, "{bar} has {area:x?}");
            ensure!(area.offset >= end, "{bar} has areas that overlap");
            end = area.offset + area.size;
        }
        ensure!(end <= info.size, "{bar} has an area beyond its end");
    }
    Ok(())
}

fn interrupts(backend: &dyn Backend, subject: &Subject) -> Result<()> {
    for (irq, count) in [Irq::Intx, Irq::Msi, Irq::Msix]
        .into_iter()
        .zip(subject.vectors)
    {
        let info = backend.irq(irq)?;
        ensure!(info.count == count, "{irq:?} has {} vectors", info.count);
        if count == 0 {
            continue;
        }
        let events = (0..count).map(|_| event()).collect::<Result<Vec<_>>>()?;
        let events: Vec<_> = events.iter().map(AsFd::as_fd).collect();
        // All at once, and again after they were taken away.
        for _ in 0..2 {
            backend.arm(irq, 0, &events)?;
            backend.disarm(irq)?;
        }
        let too_many = [events.as_slice(), events.get(..1).unwrap_or(&[])].concat();
        ensure!(
            backend.arm(irq, 0, &too_many).is_err(),
            "{irq:?} has one vector too many"
        );
        // It may be that nothing was armed.
        let _ = backend.disarm(irq);
        if irq == Irq::Msix {
            backend.arm(irq, 0, &[])?;
            for (vector, event) in (0..).zip(&events) {
                backend.arm(irq, vector, &[*event])?;
            }
            backend.disarm(irq)?;
        }
    }
    let (irq, bar, offset, value) = subject.raise;
    let event = event()?;
    backend.reset()?;
    backend.arm(irq, 0, &[event.as_fd()])?;
    backend.write(Region::Config, 4, &COMMAND)?;
    if backend.message_control() == MessageControl::Forwarded {
        let (offset, enabled) = subject.control;
        backend.write(Region::Config, offset, &enabled.to_le_bytes())?;
    }
    backend.write(Region::Bar(bar), offset, &value.to_le_bytes())?;
    ensure!(comes(&event, LONG)?, "{irq:?} is not signalled");
    backend.disarm(irq)?;
    backend.write(Region::Bar(bar), offset, &value.to_le_bytes())?;
    ensure!(
        !comes(&event, Duration::ZERO)?,
        "{irq:?} is signalled although nobody wants it"
    );
    if let Some((bar, offset, value)) = subject.calm {
        backend.write(Region::Bar(bar), offset, &value.to_le_bytes())?;
    }
    backend.reset()?;
    Ok(())
}

fn closed(backend: &dyn Backend) -> Result<()> {
    ensure!(!backend.is_lost(), "the device is lost");
    backend.close();
    backend.close();
    ensure!(backend.is_lost(), "the device is not lost");
    let read = backend.read(Region::Config, 0, &mut [0; 4]);
    ensure!(read.is_err(), "it can be read");
    ensure!(backend.reset().is_err(), "it can be reset");
    ensure!(backend.arm(Irq::Msi, 0, &[]).is_err() || backend.irq(Irq::Msi).is_err());
    Ok(())
}

/// Long enough never to pass if all is well.
const LONG: Duration = Duration::from_secs(20);

fn event() -> Result<OwnedFd> {
    Ok(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)
}

/// Whether an event is signalled within a time. It is not any more then.
fn comes(event: &OwnedFd, limit: Duration) -> Result<bool> {
    let limit = Timespec::try_from(limit)?;
    poll(&mut [PollFd::new(event, PollFlags::IN)], Some(&limit))?;
    Ok(rustix::io::read(event, &mut [0; 8]).is_ok())
}
