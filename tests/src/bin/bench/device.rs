//! The device whose accesses, doorbell and interrupt are measured: all that it does is to answer.
//!
//! It is served by the bench itself, to whatever VMM is measured.

use std::io;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;
use std::time::{Duration, Instant};

use tests::device_thread::{DeviceThread, IDS};
use tests::tiny::SCRATCH;
use vfio_user_server::{Bar, Description, Device, Doorbell, Host, Ids, MsixTable};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use crate::placement;

/// Vendor and device id, as configuration space has them.
pub(crate) const DEVICE: u32 = (IDS.device as u32) << 16 | IDS.vendor as u32;
/// A register in configuration space that belongs to nothing, so that no VMM knows what it is without asking.
pub(crate) const CONFIG: u16 = 0xf0;
/// Where BAR 0 has the doorbell.
pub(crate) const DOORBELL: u64 = 0x800;
/// Where BAR 0 has the register that takes a number: so many interrupts are sent.
pub(crate) const START: u64 = 0x10;
/// Where BAR 0 has the register that a device which hangs hangs at.
pub(crate) const HANGS: u64 = 0x20;
/// The MSI-X capability, and the table in BAR 1.
pub(crate) const MSIX: u16 = 0x40;
/// The interrupt, as the guest sees it.
pub(crate) const VECTOR: u8 = 0x50;
/// Guest memory, in bytes.
pub(crate) const MEMORY: u64 = 64 << 20;
/// Where in guest memory the device counts how often the doorbell has rung.
pub(crate) const RUNG: u32 = SCRATCH + 0x100;
/// Where in guest memory the guest counts how often it went to sleep.
pub(crate) const SLEPT: u32 = SCRATCH + 0x140;

/// Serves the device, where accesses are measured.
///
/// # Errors
/// When there is no place for the socket, or the server does not start.
pub(crate) fn serve() -> anyhow::Result<DeviceThread> {
    placement::on_one_cpu(|| DeviceThread::custom(description(0), |host| Measured::new(host, None)))
}

/// Serves several, wherever there is a CPU: their device ids follow each other.
///
/// # Errors
/// As of [`serve`].
pub(crate) fn serve_many(count: u16) -> anyhow::Result<Vec<DeviceThread>> {
    let one = |number| DeviceThread::custom(description(number), |host| Measured::new(host, None));
    (0..count).map(one).collect()
}

/// The device that hangs when it is asked for [`HANGS`], until this goes.
pub(crate) struct Hanging {
    // Goes first: it is what the device waits for.
    _patience: Sender<()>,
    server: DeviceThread,
}

impl Hanging {
    /// # Errors
    /// As of [`serve`].
    pub(crate) fn serve() -> anyhow::Result<Self> {
        let (patience, end) = mpsc::channel();
        let server = DeviceThread::custom(description(0), |host| Measured::new(host, Some(end)))?;
        Ok(Self {
            _patience: patience,
            server,
        })
    }

    /// The socket that it listens on.
    pub(crate) fn socket(&self) -> &Path {
        self.server.socket()
    }
}

fn description(number: u16) -> Description {
    let ids = Ids {
        device: IDS.device + number,
        ..IDS
    };
    Description::new(ids)
        .bar(0, Bar::memory32(0x1000))
        .bar(1, Bar::memory32(0x1000))
        .msix(MsixTable {
            vectors: 1,
            table_bar: 1,
            table_offset: 0,
            pending_bar: 1,
            pending_offset: 0x800,
        })
        .doorbell(Doorbell {
            bar: 0,
            offset: DOORBELL,
            size: 4,
            value: None,
        })
}

struct Measured {
    host: Host,
    /// What it waits for in vain when it hangs, if it can.
    end: Option<Receiver<()>>,
}

impl Measured {
    fn new(host: &Host, end: Option<Receiver<()>>) -> Self {
        Self {
            host: host.clone(),
            end,
        }
    }
}

impl Device for Measured {
    fn read(&mut self, _: usize, offset: u64, data: &mut [u8]) -> io::Result<()> {
        data.fill(0);
        if let (HANGS, Some(end)) = (offset, &self.end) {
            // Fails in the end, when nobody sends anything any more.
            let _ = end.recv();
        }
        Ok(())
    }

    fn write(&mut self, bar: usize, offset: u64, data: &[u8]) -> io::Result<()> {
        if let (0, START, Ok(count)) = (bar, offset, data.try_into()) {
            let (host, count) = (self.host.clone(), u32::from_le_bytes(count));
            thread::spawn(move || {
                let memory = host.memory.view();
                interrupt_often(&*memory, count, || host.interrupts.trigger(0));
            });
        }
        Ok(())
    }

    fn reset(&mut self) {}

    fn doorbell(&mut self, _: usize) {
        answer(&*self.host.memory.view());
    }
}

/// Lets the guest see that the doorbell has rung.
pub(crate) fn answer(memory: &impl GuestMemoryBackend) {
    let place = GuestAddress(RUNG.into());
    // A guest that has no such memory waits in vain.
    if let Ok(count) = memory.load::<u32>(place, Ordering::Relaxed) {
        let _ = memory.store(count.wrapping_add(1), place, Ordering::Release);
    }
}

/// Interrupts the guest so many times, each time when it sleeps.
pub(crate) fn interrupt_often(memory: &impl GuestMemoryBackend, count: u32, interrupt: impl Fn()) {
    /// A guest that does not wake for so long has gone.
    const PATIENCE: Duration = Duration::from_secs(5);
    let place = GuestAddress(SLEPT.into());
    for slept in 1..=count {
        let since = Instant::now();
        while memory
            .load::<u32>(place, Ordering::Acquire)
            .is_ok_and(|now| now < slept)
        {
            if since.elapsed() > PATIENCE {
                return;
            }
            // The guest may want this CPU.
            thread::yield_now();
        }
        interrupt();
    }
}
