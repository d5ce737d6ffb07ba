//! A driver of virtio devices over PCI, by a client in place of a virtual machine.

#![allow(dead_code, reason = "not every test needs everything")]

pub(crate) mod queue;

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use vfio_user_client::{Client, ConnError, Deadlines, DeviceState, DmaAccess, DmaError, GuestDma};
use vfio_user_server::{Device, Server};

use self::queue::Queue;

/// Long enough never to pass in a test that succeeds.
pub(crate) const LONG: Duration = Duration::from_secs(20);

/// Where guest memory begins, and how much there is.
pub(crate) const BASE: u64 = 0x10_0000;
pub(crate) const SIZE: u64 = 64 << 20;

/// Where buffers may be: behind the queues.
pub(crate) const BUFFERS: u64 = BASE + (4 << 20);

pub(crate) const VERSION_1: u64 = 1 << 32;
pub(crate) const INDIRECT: u64 = 1 << 28;
pub(crate) const EVENT_IDX: u64 = 1 << 29;

pub(crate) const NEEDS_RESET: u8 = 0x40;

/// Guest memory.
#[derive(Clone)]
pub(crate) struct Ram(Arc<File>);

impl Ram {
    pub(crate) fn new() -> Self {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = File::from(memfd_create("guest", flags).unwrap());
        file.set_len(SIZE).unwrap();
        fcntl_add_seals(&file, SealFlags::GROW | SealFlags::SHRINK).unwrap();
        Self(Arc::new(file))
    }

    pub(crate) fn file(&self) -> &File {
        &self.0
    }

    pub(crate) fn write(&self, address: u64, data: &[u8]) {
        self.0.write_all_at(data, address - BASE).unwrap();
    }

    pub(crate) fn read(&self, address: u64, length: usize) -> Vec<u8> {
        let mut data = vec![0; length];
        self.0.read_exact_at(&mut data, address - BASE).unwrap();
        data
    }

    pub(crate) fn read16(&self, address: u64) -> u16 {
        u16::from_le_bytes(self.read(address, 2).try_into().unwrap())
    }

    fn read32(&self, address: u64) -> u32 {
        u32::from_le_bytes(self.read(address, 4).try_into().unwrap())
    }
}

/// The same memory, for messages.
impl GuestDma for Ram {
    fn read(&self, address: u64, data: &mut [u8]) -> Result<(), DmaError> {
        let offset = address.checked_sub(BASE).ok_or(DmaError)?;
        self.0.read_exact_at(data, offset).map_err(|_| DmaError)
    }

    fn write(&self, address: u64, data: &[u8]) -> Result<(), DmaError> {
        let offset = address.checked_sub(BASE).ok_or(DmaError)?;
        let end = offset.checked_add(data.len() as u64);
        if end.is_none_or(|end| end > SIZE) {
            return Err(DmaError);
        }
        self.0.write_all_at(data, offset).map_err(|_| DmaError)
    }
}

/// Where the parts of the device are, in BAR 0.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Places {
    pub(crate) common: u64,
    pub(crate) isr: u64,
    pub(crate) config: u64,
    pub(crate) notify: u64,
    multiplier: u64,
    msix: u64,
    /// In configuration space: the capability through which all the others can be accessed.
    pub(crate) window: u64,
}

/// A device with a driver.
pub(crate) struct Machine {
    pub(crate) client: Client,
    pub(crate) ram: Ram,
    pub(crate) places: Places,
    pub(crate) vectors: Vec<Arc<OwnedFd>>,
    doorbells: Mutex<Vec<Option<Arc<OwnedFd>>>>,
    server: Option<JoinHandle<()>>,
}

impl Machine {
    /// Serves a device in a thread, and connects to it, with new memory.
    pub(crate) fn new<D: Device + Send + 'static>(
        server: impl FnOnce() -> Server<D> + Send + 'static,
    ) -> Self {
        Self::with_ram(server, Ram::new())
    }

    pub(crate) fn with_ram<D: Device + Send + 'static>(
        server: impl FnOnce() -> Server<D> + Send + 'static,
        ram: Ram,
    ) -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let thread = thread::spawn(move || {
            server().serve(theirs).unwrap();
        });
        let mut machine = Self::connect(ours, ram);
        machine.server = Some(thread);
        machine
    }

    /// Uses a device whose server is somewhere else.
    pub(crate) fn connect(stream: UnixStream, ram: Ram) -> Self {
        let dma: Arc<dyn GuestDma> = Arc::new(ram.clone());
        let client = Client::handshake(stream, dma, &options()).unwrap();
        let mut machine = Self {
            client,
            ram,
            places: Places::default(),
            vectors: Vec::new(),
            doorbells: Mutex::default(),
            server: None,
        };
        machine.map();
        machine.enable();
        machine.find_places();
        machine
    }

    pub(crate) fn map(&self) {
        let file = Some((self.ram.file().as_fd(), 0));
        self.client
            .dma_map(BASE, SIZE, file, DmaAccess::ReadWrite)
            .unwrap();
    }

    /// Lets the device be accessed and access memory.
    pub(crate) fn enable(&self) {
        self.client.region_write(7, 4, &[6, 0]).unwrap();
    }

    /// Drops the client, and waits until the server has ended.
    pub(crate) fn end(mut self) {
        let server = self.server.take();
        drop(self);
        if let Some(server) = server {
            server.join().unwrap();
        }
    }

    fn find_places(&mut self) {
        let mut config = [0; 256];
        self.client.region_read(7, 0, &mut config).unwrap();
        let dword = |at: usize| u32::from_le_bytes(*config[at..].first_chunk().unwrap());
        let mut at = usize::from(config[0x34]);
        while at != 0 {
            let offset = u64::from(dword(at + 8));
            match (config[at], config[at + 3]) {
                (0x09, 1) => self.places.common = offset,
                (0x09, 2) => {
                    self.places.notify = offset;
                    self.places.multiplier = dword(at + 16).into();
                }
                (0x09, 3) => self.places.isr = offset,
                (0x09, 4) => self.places.config = offset,
                (0x09, 5) => self.places.window = at as u64,
                (0x11, _) => self.places.msix = at as u64,
                _ => {}
            }
            at = usize::from(config[at + 1]);
        }
    }

    /// Enables MSI-X, with an event for each vector.
    pub(crate) fn enable_msix(&mut self) {
        let count = self.client.irq_info(2).unwrap().count;
        let events: Vec<_> = (0..count).map(|_| Arc::new(event())).collect();
        let fds: Vec<_> = events.iter().map(|event| event.as_fd()).collect();
        self.client.set_irq_events(2, 0, &fds).unwrap();
        let control = self.places.msix + 2;
        self.client.region_write(7, control, &[0, 0x80]).unwrap();
        self.vectors = events;
    }

    pub(crate) fn read<const N: usize>(&self, offset: u64) -> [u8; N] {
        let mut data = [0; N];
        self.client.region_read(0, offset, &mut data).unwrap();
        data
    }

    pub(crate) fn write(&self, offset: u64, data: &[u8]) {
        self.client.region_write(0, offset, data).unwrap();
    }

    pub(crate) fn status(&self) -> u8 {
        let [status] = self.read(self.places.common + 0x14);
        status
    }

    pub(crate) fn set_status(&self, status: u8) {
        self.write(self.places.common + 0x14, &[status]);
    }

    pub(crate) fn offered(&self) -> u64 {
        let half = |select: u32| {
            self.write(self.places.common, &select.to_le_bytes());
            u64::from(u32::from_le_bytes(self.read(self.places.common + 4)))
        };
        half(0) | half(1) << 32
    }

    /// Resets the device and negotiates features; whether the device accepted them.
    pub(crate) fn negotiate(&self, features: u64) -> bool {
        self.set_status(0);
        assert_eq!(self.status(), 0);
        self.set_status(3);
        for select in [0_u32, 1] {
            let half = u32::try_from(features >> (32 * select) & 0xffff_ffff).unwrap();
            self.write(self.places.common + 8, &select.to_le_bytes());
            self.write(self.places.common + 12, &half.to_le_bytes());
        }
        self.set_status(3 | 8);
        self.status() & 8 != 0
    }

    /// Sets a queue up, with its own vector, and enables it.
    pub(crate) fn queue(&self, index: u16, size: u16, features: u64) -> Queue {
        let queue = Queue::new(self, index, size, features);
        self.set_up(&queue);
        queue
    }

    fn set_up(&self, queue: &Queue) {
        let common = self.places.common;
        self.ram.write(queue.area, &vec![0; 0x1_0000]);
        self.write(common + 0x16, &queue.index.to_le_bytes());
        self.write(common + 0x18, &queue.size.to_le_bytes());
        if !self.vectors.is_empty() {
            self.write(common + 0x1a, &(queue.index + 1).to_le_bytes());
        }
        for (offset, address) in [
            (0x20, queue.area),
            (0x28, queue.available()),
            (0x30, queue.used()),
        ] {
            let [low, high] = [address & 0xffff_ffff, address >> 32]
                .map(|half| u32::try_from(half).unwrap().to_le_bytes());
            self.write(common + offset, &low);
            self.write(common + offset + 4, &high);
        }
        self.write(common + 0x1c, &1_u16.to_le_bytes());
    }

    /// Negotiates, sets up so many queues of a size, and starts the device.
    pub(crate) fn start(&self, features: u64, queues: u16, size: u16) -> Vec<Queue> {
        assert!(self.negotiate(features | VERSION_1));
        let queues = (0..queues).map(|index| self.queue(index, size, features));
        let queues = queues.collect();
        self.set_status(3 | 8 | 4);
        queues
    }

    pub(crate) fn doorbell(&self, queue: u16) -> Arc<OwnedFd> {
        let mut bells = self.doorbells.lock().unwrap();
        if bells.is_empty() {
            let mut found = self.client.region_io_fds(0).unwrap();
            found.sort_by_key(|bell| bell.offset);
            let at = |(index, bell): (u64, vfio_user_client::IoEvent)| {
                assert_eq!(
                    bell.offset,
                    self.places.notify + index * self.places.multiplier
                );
                assert_eq!(bell.size, 2);
                Some(Arc::new(bell.fd.as_fd().try_clone_to_owned().unwrap()))
            };
            *bells = (0..).zip(found).map(at).collect();
        }
        bells[usize::from(queue)].clone().unwrap()
    }

    pub(crate) fn set_state(&self, state: DeviceState) -> Result<(), ConnError> {
        self.client.set_device_state(state)
    }

    /// All of the device's migration data.
    pub(crate) fn saved(&self) -> Vec<u8> {
        saved(&self.client)
    }

    /// The pages, counted from the beginning of memory, that have been written since the last time.
    pub(crate) fn dirty_pages(&self) -> Vec<u64> {
        let log = self.client.dma_log(BASE, SIZE, 4096).unwrap();
        let is_set = |page: &u64| {
            let word = log[usize::try_from(page / 64).unwrap()];
            word >> (page % 64) & 1 != 0
        };
        (0..SIZE / 4096).filter(is_set).collect()
    }

    /// Waits until the device says that it needs a reset.
    pub(crate) fn await_needs_reset(&self) {
        let start = Instant::now();
        while self.status() & NEEDS_RESET == 0 {
            assert!(start.elapsed() < LONG, "the device does not need a reset");
            thread::sleep(Duration::from_millis(1));
        }
    }
}

pub(crate) fn options() -> vfio_user_client::Options {
    vfio_user_client::Options {
        deadlines: Deadlines {
            handshake: LONG,
            region_io: LONG,
            control: LONG,
            reset: LONG,
            dma_map: LONG,
            migration: LONG,
        },
        ..vfio_user_client::Options::default()
    }
}

/// All of a device's migration data that there is now.
pub(crate) fn saved(client: &Client) -> Vec<u8> {
    let mut saved = Vec::new();
    loop {
        let mut piece = vec![0; 4096];
        let count = client.migration_read(&mut piece).unwrap();
        saved.extend(&piece[..count]);
        if count < piece.len() {
            return saved;
        }
    }
}

pub(crate) fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap()
}

/// How often an event was signalled since the last time; waits for the first.
pub(crate) fn wait_for(event: &OwnedFd) -> u64 {
    let limit = Timespec::try_from(LONG).unwrap();
    poll(&mut [PollFd::new(event, PollFlags::IN)], Some(&limit)).unwrap();
    let mut count = [0; 8];
    rustix::io::read(event, &mut count).map_or(0, |_| u64::from_ne_bytes(count))
}
