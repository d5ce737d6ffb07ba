//! The client against a server that nobody here wrote: that of the crate `vfio_user`.

#![expect(clippy::unwrap_used, reason = "a test panics when it fails")]

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use vfio_user::{
    DmaMapFlags, DmaUnmapFlags, IrqInfo, Server, ServerBackend, ServerRegion, SparseArea,
};
use vfio_user_client::{Client, ConnError, DmaAccess, DmaError, GuestDma, MappedArea, Options};

// From `linux/vfio.h`.
const READ_WRITE: u32 = 3;
const MMAP: u32 = 4;
const EVENTFD: u32 = 1;
const TRIGGER_BY_EVENT: u32 = 0x24;
const DISABLE: u32 = 0x21;

struct NoMemory;

impl GuestDma for NoMemory {
    fn read(&self, _: u64, _: &mut [u8]) -> Result<(), DmaError> {
        Err(DmaError)
    }

    fn write(&self, _: u64, _: &[u8]) -> Result<(), DmaError> {
        Err(DmaError)
    }
}

/// What the device was told.
#[derive(Debug, PartialEq, Eq)]
enum Told {
    Map(u32, u64, u64, u64, bool),
    Unmap(u64, u64),
    Irqs(u32, u32, u32, u32, usize),
    Reset,
}

/// A device whose one register region is memory.
struct Device {
    registers: Vec<u8>,
    told: Arc<Mutex<Vec<Told>>>,
}

impl ServerBackend for Device {
    fn region_read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> io::Result<()> {
        let offset = usize::try_from(offset).unwrap();
        let from = self.registers.get(offset..offset + data.len());
        match from {
            Some(from) if region == 0 => data.copy_from_slice(from),
            _ => return Err(io::ErrorKind::InvalidInput.into()),
        }
        Ok(())
    }

    fn region_write(&mut self, region: u32, offset: u64, data: &[u8]) -> io::Result<()> {
        let offset = usize::try_from(offset).unwrap();
        match self.registers.get_mut(offset..offset + data.len()) {
            Some(to) if region == 0 => to.copy_from_slice(data),
            _ => return Err(io::ErrorKind::InvalidInput.into()),
        }
        Ok(())
    }

    fn dma_map(
        &mut self,
        flags: DmaMapFlags,
        offset: u64,
        address: u64,
        size: u64,
        file: Option<File>,
    ) -> io::Result<()> {
        if let Some(file) = &file {
            file.write_at(b"mapped", offset)?;
        }
        let map = Told::Map(flags.bits(), offset, address, size, file.is_some());
        self.told.lock().unwrap().push(map);
        Ok(())
    }

    fn dma_unmap(&mut self, _: DmaUnmapFlags, address: u64, size: u64) -> io::Result<()> {
        self.told.lock().unwrap().push(Told::Unmap(address, size));
        Ok(())
    }

    fn reset(&mut self) -> io::Result<()> {
        self.told.lock().unwrap().push(Told::Reset);
        Ok(())
    }

    fn set_irqs(
        &mut self,
        index: u32,
        flags: u32,
        start: u32,
        count: u32,
        fds: Vec<File>,
    ) -> io::Result<()> {
        for mut fd in &fds {
            fd.write_all(&1u64.to_ne_bytes())?;
        }
        let irqs = Told::Irqs(index, flags, start, count, fds.len());
        self.told.lock().unwrap().push(irqs);
        Ok(())
    }
}

/// A server that runs, and a client of it.
struct Setup {
    client: Client,
    told: Arc<Mutex<Vec<Told>>>,
    file: File,
    thread: Option<JoinHandle<()>>,
    _directory: tempfile::TempDir,
}

impl Setup {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path: PathBuf = directory.path().join("socket");
        let file = tempfile::tempfile().unwrap();
        file.set_len(0x10000).unwrap();
        let told = Arc::new(Mutex::new(Vec::new()));
        let server = Server::new(&path, true, irqs(), regions(&file)).unwrap();
        let mut device = Device {
            registers: vec![0; 0x10000],
            told: Arc::clone(&told),
        };
        let thread = thread::spawn(move || server.run(&mut device).unwrap());
        let client = Client::connect(&path, Arc::new(NoMemory), &Options::default()).unwrap();
        Self {
            client,
            told,
            file,
            thread: Some(thread),
            _directory: directory,
        }
    }

    fn told(&self) -> Vec<Told> {
        std::mem::take(&mut *self.told.lock().unwrap())
    }

    /// Ends the connection and waits for the server's end.
    fn end(mut self) {
        drop(self.client);
        self.thread.take().unwrap().join().unwrap();
    }
}

fn irqs() -> Vec<IrqInfo> {
    [1, 0, 4, 0, 0]
        .into_iter()
        .zip(0..)
        .map(|(count, index)| IrqInfo {
            index,
            flags: EVENTFD,
            count,
        })
        .collect()
}

fn regions(file: &File) -> Vec<ServerRegion> {
    let region = |index, size, flags, areas: &[(u64, u64)]| {
        let mut sparse = Vec::new();
        for (offset, size) in areas {
            let mut area: SparseArea = SparseArea {
                area: Default::default(),
            };
            (area.area.offset, area.area.size) = (*offset, *size);
            sparse.push(area);
        }
        let mut info = ServerRegion {
            region_info: Default::default(),
            sparse_areas: sparse,
            mmap_fd: (!areas.is_empty()).then(|| file.as_raw_fd()),
        };
        info.region_info.argsz = 32;
        info.region_info.index = index;
        info.region_info.size = size;
        info.region_info.flags = flags;
        info
    };
    vec![
        region(0, 0x10000, READ_WRITE, &[]),
        region(
            1,
            0x8000,
            READ_WRITE | MMAP,
            &[(0x1000, 0x1000), (0x4000, 0x4000)],
        ),
        region(2, 0, 0, &[]),
    ]
}

#[test]
fn the_device_describes_itself() {
    let setup = Setup::new();
    let client = &setup.client;
    let info = client.device_info().unwrap();
    assert!(info.resettable && info.pci);
    assert_eq!((info.regions, info.irqs), (3, 5));

    let plain = client.region_info(0).unwrap();
    assert!(plain.readable && plain.writable && plain.file.is_none());
    assert_eq!((plain.size, plain.areas.len()), (0x10000, 0));
    let mapped = client.region_info(1).unwrap();
    let area = |offset, size| MappedArea {
        offset,
        size,
        file_offset: offset,
    };
    assert_eq!(mapped.areas, [area(0x1000, 0x1000), area(0x4000, 0x4000)]);
    assert!(mapped.file.is_some());
    assert_eq!(client.region_info(2).unwrap().size, 0);
    assert!(matches!(
        client.region_info(3),
        Err(ConnError::Refused { errno: 22, .. })
    ));

    let irq = client.irq_info(2).unwrap();
    assert!(irq.eventfd && !irq.maskable && irq.count == 4);
    setup.end();
}

#[test]
fn registers_keep_what_is_written() {
    let setup = Setup::new();
    let client = &setup.client;
    client.region_write(0, 0x10, &[1, 2, 3, 4]).unwrap();
    client.region_post(0, 0x14, &[5, 6]).unwrap();
    let mut data = [0; 8];
    client.region_read(0, 0x10, &mut data).unwrap();
    assert_eq!(data, [1, 2, 3, 4, 5, 6, 0, 0]);

    // More than one message's worth.
    let all: Vec<u8> = (0..=250).cycle().take(0x10000).collect();
    client.region_write(0, 0, &all).unwrap();
    let mut read = vec![0; all.len()];
    client.region_read(0, 0, &mut read).unwrap();
    assert!(read == all);

    let refused = client.region_read(1, 0, &mut data);
    assert!(matches!(refused, Err(ConnError::Refused { .. })));
    client.region_read(0, 0, &mut data).unwrap();
    assert_eq!(client.counters().refusals, 1);
    setup.end();
}

#[test]
fn memory_and_interrupts_are_wired() {
    let setup = Setup::new();
    let client = &setup.client;
    let file = Some((setup.file.as_fd(), 0x2000));
    client
        .dma_map(0x10_0000, 0x4000, file, DmaAccess::ReadWrite)
        .unwrap();
    client
        .dma_map(0x20_0000, 0x1000, None, DmaAccess::ReadOnly)
        .unwrap();
    client.dma_unmap(0x10_0000, 0x4000).unwrap();
    let mut mapped = [0; 6];
    setup.file.read_exact_at(&mut mapped, 0x2000).unwrap();
    assert_eq!(&mapped, b"mapped");
    let expected = [
        Told::Map(3, 0x2000, 0x10_0000, 0x4000, true),
        Told::Map(1, 0, 0x20_0000, 0x1000, false),
        Told::Unmap(0x10_0000, 0x4000),
    ];
    assert_eq!(setup.told(), expected);

    let events = [tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap()];
    let fds = [events[0].as_fd(), events[1].as_fd()];
    client.set_irq_events(2, 1, &fds).unwrap();
    client.disable_irqs(2).unwrap();
    client.reset().unwrap();
    // This server says that it takes one descriptor at a time.
    let expected = [
        Told::Irqs(2, TRIGGER_BY_EVENT, 1, 1, 1),
        Told::Irqs(2, TRIGGER_BY_EVENT, 2, 1, 1),
        Told::Irqs(2, DISABLE, 0, 0, 0),
        Told::Reset,
    ];
    assert_eq!(setup.told(), expected);
    for event in events {
        assert_eq!(event.metadata().unwrap().len(), 8);
    }
    setup.end();
}

#[test]
fn a_command_that_the_server_does_not_know_leaves_the_connection_alive() {
    let setup = Setup::new();
    let client = &setup.client;
    assert!(client.region_io_fds(0).unwrap().is_empty());
    client.region_write(0, 0, &[7]).unwrap();
    let mut data = [0];
    client.region_read(0, 0, &mut data).unwrap();
    assert_eq!(data, [7]);
    setup.end();
}

#[test]
fn threads_share_the_connection() {
    let setup = Setup::new();
    let client = &setup.client;
    thread::scope(|scope| {
        for thread in 0..8u8 {
            scope.spawn(move || {
                for round in 0..500u32 {
                    let written = round.to_ne_bytes().map(|byte| byte ^ thread);
                    let offset = u64::from(thread) * 4;
                    client.region_write(0, offset, &written).unwrap();
                    let mut read = [0; 4];
                    client.region_read(0, offset, &mut read).unwrap();
                    assert_eq!(read, written);
                }
            });
        }
    });
    assert_eq!(client.counters().timeouts, 0);
    setup.end();
}
