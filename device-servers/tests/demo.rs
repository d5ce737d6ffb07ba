//! The demo device, by the table of its registers.

#![expect(clippy::unwrap_used, reason = "a test panics when it fails")]

mod support;

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, mpsc};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use device_servers::demo::{self, Options, checksum, pattern};
use rustix::fs::{MemfdFlags, memfd_create};
use support::{LONG, event, options, wait_for};
use vfio_user_client::{Client, ConnError, DeviceState, DmaAccess, DmaError, GuestDma};

const RESETS: u64 = 0x04;
const SCRATCH: u64 = 0x08;
const RAISE: u64 = 0x10;
const INTX: u64 = 0x14;
const DMA_ADDRESS: u64 = 0x18;
const DMA_LENGTH: u64 = 0x20;
const DMA_SEED: u64 = 0x24;
const DMA_COMMAND: u64 = 0x28;
const DMA_STATUS: u64 = 0x2c;
const DMA_SUM: u64 = 0x30;
const RAM_OFFSET: u64 = 0x34;
const RAM_DATA: u64 = 0x38;
const RAM_TRAPS: u64 = 0x3c;
const FAULT: u64 = 0x48;
const FAULT_DATA: u64 = 0x4c;
const DELAY: u64 = 0x50;
const DELAY_DATA: u64 = 0x54;
const RESET_DELAY: u64 = 0x58;
const STATE_FAULT: u64 = 0x5c;
const STATE_SIZE: u64 = 0x60;
const EARLY_SIZE: u64 = 0x64;
const WRITER_PERIOD: u64 = 0x68;
const WRITER_COUNT: u64 = 0x6c;
const WRITER_ERRORS: u64 = 0x70;
const RUNG: u64 = 0x80;

/// Where guest memory begins, and its size.
const BASE: u64 = 0x10_0000;
const SIZE: u64 = 0x40_0000;

/// Guest memory for messages.
struct Guest(Mutex<Vec<u8>>);

impl Guest {
    fn range(address: u64, length: usize) -> Option<std::ops::Range<usize>> {
        let start = usize::try_from(address.checked_sub(BASE)?).ok()?;
        Some(start..start.checked_add(length)?)
    }
}

impl GuestDma for Guest {
    fn read(&self, address: u64, data: &mut [u8]) -> Result<(), DmaError> {
        let range = Self::range(address, data.len()).ok_or(DmaError)?;
        data.copy_from_slice(self.0.lock().unwrap().get(range).ok_or(DmaError)?);
        Ok(())
    }

    fn write(&self, address: u64, data: &[u8]) -> Result<(), DmaError> {
        let range = Self::range(address, data.len()).ok_or(DmaError)?;
        let mut bytes = self.0.lock().unwrap();
        bytes.get_mut(range).ok_or(DmaError)?.copy_from_slice(data);
        Ok(())
    }
}

/// A client of a demo device.
struct Demo {
    client: Client,
    guest: Arc<Guest>,
    _server: JoinHandle<()>,
}

impl Demo {
    fn new() -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let server = thread::spawn(move || {
            let mut server = demo::server(&Options::new("")).unwrap();
            server.serve(theirs).unwrap();
        });
        let guest = Arc::new(Guest(Mutex::new(vec![0; usize::try_from(SIZE).unwrap()])));
        let dma: Arc<dyn GuestDma> = Arc::clone(&guest) as _;
        Self {
            client: Client::handshake(ours, dma, &options()).unwrap(),
            guest,
            _server: server,
        }
    }

    /// A device that has this memory mapped, and is bus master.
    fn with_memory(memory: &File) -> Self {
        let demo = Self::new();
        let file = Some((memory.as_fd(), 0));
        demo.client
            .dma_map(BASE, SIZE, file, DmaAccess::ReadWrite)
            .unwrap();
        demo.be_master();
        demo
    }

    fn be_master(&self) {
        self.client.region_write(7, 4, &[6, 0]).unwrap();
    }

    fn read(&self, register: u64) -> u32 {
        let mut data = [0; 4];
        self.client.region_read(0, register, &mut data).unwrap();
        u32::from_le_bytes(data)
    }

    fn try_write(&self, register: u64, value: u32) -> Result<(), ConnError> {
        self.client.region_write(0, register, &value.to_le_bytes())
    }

    fn write(&self, register: u64, value: u32) {
        self.try_write(register, value).unwrap();
    }

    /// Orders a transfer.
    fn transfer(&self, command: u32, address: u64, length: u32, seed: u32) {
        self.client
            .region_write(0, DMA_ADDRESS, &address.to_le_bytes())
            .unwrap();
        self.write(DMA_LENGTH, length);
        self.write(DMA_SEED, seed);
        self.write(DMA_COMMAND, command);
    }

    fn set_state(&self, state: DeviceState) {
        self.client.set_device_state(state).unwrap();
    }

    /// All of the device's migration data that there is now.
    fn saved(&self) -> Vec<u8> {
        support::saved(&self.client)
    }
}

fn memory() -> File {
    let file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
    file.set_len(SIZE).unwrap();
    file
}

fn errno(result: &Result<(), ConnError>) -> u32 {
    match result {
        Err(ConnError::Refused { errno, .. }) => *errno,
        _ => 0,
    }
}

#[test]
fn the_device_says_what_it_is() {
    let demo = Demo::new();
    assert_eq!(demo.read(0), 0x6d61_676f);
    assert_eq!([demo.read(0x40), demo.read(0x44)], [64, 7]);
    assert_eq!(demo.client.irq_info(2).unwrap().count, 64);
    let mut config = [0; 0x120];
    demo.client.region_read(7, 0, &mut config).unwrap();
    let dword = |offset: usize| u32::from_le_bytes(*config[offset..].first_chunk().unwrap());
    for (offset, value) in [
        (0x00, 0x0001_4f52),
        (0x04, 0x0010_0000),
        (0x08, 0xff00_0003),
        (0x18, 0x0000_000c),
        (0x20, 0x0000_0001),
        (0x2c, 0x0002_4f52),
        (0x34, 0x0000_0040),
        (0x3c, 0x0000_0100),
        (0x40, 0x0003_5001),
        (0x50, 0x0184_7005),
        (0x70, 0x0002_b010),
        (0xb0, 0x003f_0011),
        (0xb4, 0x0000_0001),
        (0xb8, 0x0000_0801),
        (0x100, 0x1101_0003),
        (0x104, 0x6967_6765),
        (0x108, 0x4f75_7472),
        (0x110, 0x0001_000b),
        (0x114, 0x0101_0001),
        (0x11c, 0x1234_5678),
    ] {
        assert_eq!(dword(offset), value, "{offset:#x}");
    }
}

#[test]
fn registers_and_ports_keep_what_is_written_until_a_reset() {
    let demo = Demo::new();
    demo.client
        .region_write(0, SCRATCH, &[1, 2, 3, 4, 5, 6, 7, 8])
        .unwrap();
    demo.client.region_write(0, SCRATCH + 3, &[9, 9]).unwrap();
    let mut data = [0; 8];
    demo.client.region_read(0, SCRATCH, &mut data).unwrap();
    assert_eq!(data, [1, 2, 3, 9, 9, 6, 7, 8]);
    demo.client.region_write(4, 29, &[7, 8, 9]).unwrap();
    demo.client.region_read(4, 24, &mut data).unwrap();
    assert_eq!(data, [0, 0, 0, 0, 0, 7, 8, 9]);
    demo.client.reset().unwrap();
    demo.client.region_read(4, 24, &mut data).unwrap();
    assert_eq!(
        (data, demo.read(SCRATCH), demo.read(RESETS)),
        ([0; 8], 0, 1)
    );
}

#[test]
fn ram_is_the_same_mapped_and_trapped() {
    let demo = Demo::new();
    let info = demo.client.region_info(2).unwrap();
    assert_eq!(info.areas.len(), 1);
    let file = File::from(info.file.unwrap().as_fd().try_clone_to_owned().unwrap());
    file.write_all_at(&[1, 2, 3, 4], info.areas[0].file_offset)
        .unwrap();
    demo.write(RAM_OFFSET, 0x4000);
    assert_eq!(
        (demo.read(RAM_DATA), demo.read(RAM_TRAPS)),
        (0x0403_0201, 0)
    );
    demo.client.region_write(2, 0xfffc, &[5, 6, 7, 8]).unwrap();
    demo.write(RAM_OFFSET, 0xfffc);
    assert_eq!(
        (demo.read(RAM_DATA), demo.read(RAM_TRAPS)),
        (0x0807_0605, 1)
    );
}

#[test]
fn vectors_and_line_interrupt() {
    let demo = Demo::new();
    let (vector, line) = (event(), event());
    demo.client.set_irq_events(0, 0, &[line.as_fd()]).unwrap();
    demo.write(INTX, 1);
    assert_eq!((wait_for(&line), demo.read(INTX)), (1, 1));
    demo.write(INTX, 0);
    demo.client.disable_irqs(0).unwrap();
    demo.client
        .set_irq_events(2, 63, &[vector.as_fd()])
        .unwrap();
    demo.write(RAISE, 63);
    assert_eq!(wait_for(&vector), 1);
}

#[test]
fn transfers_go_by_mapping_and_by_message() {
    let memory = memory();
    let mapped = Demo::with_memory(&memory);
    let messages = Demo::new();
    messages
        .client
        .dma_map(BASE, SIZE, None, DmaAccess::ReadWrite)
        .unwrap();
    messages.be_master();
    for demo in [&mapped, &messages] {
        demo.transfer(1, BASE + 17, 100_001, 99);
        assert_eq!(demo.read(DMA_STATUS), 0);
        demo.transfer(2, BASE + 17, 100_001, 0);
        let expected: Vec<_> = (0..100_001).map(|index| pattern(99, index)).collect();
        assert_eq!(demo.read(DMA_SUM), checksum(&expected));
        for (address, length) in [(1 << 46, 4), (BASE + SIZE - 3, 4), (BASE, (1 << 20) + 1)] {
            demo.transfer(1, address, length, 0);
            assert_eq!(demo.read(DMA_STATUS), 1);
        }
    }
    let mut bytes = vec![0; 100_020];
    memory.read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(bytes, messages.guest.0.lock().unwrap()[..100_020]);
    mapped.client.region_write(7, 4, &[2, 0]).unwrap();
    mapped.transfer(1, BASE, 4, 0);
    assert_eq!(mapped.read(DMA_STATUS), 1);
}

#[test]
fn a_transfer_may_be_done_later() {
    let demo = Demo::new();
    demo.client
        .dma_map(BASE, SIZE, None, DmaAccess::ReadWrite)
        .unwrap();
    demo.be_master();
    let finished = event();
    demo.client
        .set_irq_events(2, 1, &[finished.as_fd()])
        .unwrap();
    demo.transfer(1 | 1 << 8, BASE, 1 << 20, 3);
    assert_eq!(wait_for(&finished), 1);
    assert_eq!(demo.read(DMA_STATUS), 0);
    assert_eq!(demo.guest.0.lock().unwrap()[0xf_ffff], pattern(3, 0xf_ffff));
}

#[test]
fn doorbells_are_counted() {
    let demo = Demo::new();
    let bells = demo.client.region_io_fds(0).unwrap();
    let ports = demo.client.region_io_fds(4).unwrap();
    assert_eq!((bells.len(), ports.len()), (6, 1));
    assert!(ports[0].pio);
    for bell in bells.iter().chain(&ports) {
        rustix::io::write(&bell.fd, &1_u64.to_ne_bytes()).unwrap();
    }
    let rung = || [0, 1, 2, 3, 4, 5, 6].map(|bell| demo.read(RUNG + 4 * bell));
    assert_eq!(rung(), [1; 7]);
    // The same by messages.
    for (bar, offset, data) in [
        (0, 0x800, &[1, 2, 3, 4][..]),
        (0, 0x804, &[1, 0, 0, 0]),
        (0, 0x804, &[2, 0, 0, 0]),
        (0, 0x804, &[3, 0, 0, 0]),
        (0, 0x808, &[0; 8]),
        (0, 0x808, &[0; 4]),
        (0, 0x810, &[0; 2]),
        (0, 0x812, &[0xa5]),
        (0, 0x812, &[0xa6]),
        (4, 0x10, &[0; 2]),
    ] {
        demo.client.region_write(bar, offset, data).unwrap();
    }
    assert_eq!(rung(), [2; 7]);
}

#[test]
fn faults_and_delays_come_on_request() {
    let demo = Demo::new();
    demo.write(FAULT, 28);
    assert_eq!(errno(&demo.try_write(FAULT_DATA, 1)), 28);
    assert_eq!(
        errno(&demo.client.region_read(0, FAULT_DATA, &mut [0; 4])),
        28
    );
    demo.write(FAULT, 0);
    demo.write(FAULT_DATA, 5);
    assert_eq!(demo.read(FAULT_DATA), 5);
    demo.write(DELAY, 50);
    let start = Instant::now();
    demo.read(DELAY_DATA);
    assert!(start.elapsed() >= Duration::from_millis(50));
    demo.write(RESET_DELAY, 60);
    let start = Instant::now();
    demo.client.reset().unwrap();
    assert!(start.elapsed() >= Duration::from_millis(60));
}

#[test]
fn the_device_migrates_with_all_its_state() {
    let memory = memory();
    let source = Demo::with_memory(&memory);
    source.write(SCRATCH, 0x1234_5678);
    source.write(STATE_SIZE, 700);
    source.write(EARLY_SIZE, 300);
    source.write(INTX, 1);
    source.client.region_write(2, 0x100, b"memory").unwrap();
    source.client.region_write(4, 3, b"ports").unwrap();
    source.set_state(DeviceState::PreCopy);
    let mut stream = source.saved();
    assert!(stream.len() > 300 << 10);
    source.write(SCRATCH, 0x8765_4321);
    source.set_state(DeviceState::StopCopy);
    stream.extend(source.saved());
    assert!(stream.len() > 1000 << 10);

    let target = Demo::with_memory(&memory);
    let line = event();
    target.client.set_irq_events(0, 0, &[line.as_fd()]).unwrap();
    target.set_state(DeviceState::Resuming);
    target.client.migration_write(&stream).unwrap();
    target.set_state(DeviceState::Running);
    assert_eq!(target.read(SCRATCH), 0x8765_4321);
    assert_eq!((target.read(INTX), wait_for(&line)), (1, 1));
    let mut bytes = [0; 6];
    target.client.region_read(2, 0x100, &mut bytes).unwrap();
    assert_eq!(&bytes, b"memory");
    target.client.region_read(4, 2, &mut bytes).unwrap();
    assert_eq!(&bytes, b"\0ports");
    // Bus master, as the source was.
    target.transfer(1, BASE, 4, 0);
    assert_eq!(target.read(DMA_STATUS), 0);
}

#[test]
fn damaged_state_is_refused() {
    let source = Demo::new();
    source.write(STATE_SIZE, 1);
    source.set_state(DeviceState::StopCopy);
    let stream = source.saved();
    let target = Demo::new();
    let load = |stream: &[u8]| {
        target.client.reset().unwrap();
        target.set_state(DeviceState::Resuming);
        let written = target.client.migration_write(stream);
        written.and_then(|()| target.client.set_device_state(DeviceState::Stop))
    };
    for cut in [1, 8, 100, 5000, stream.len() - 1] {
        assert_eq!(errno(&load(&stream[..cut])), 22, "{cut}");
    }
    // A byte of the filler, one of the end, one of the head.
    for at in [stream.len() - 100, stream.len() - 1, 9] {
        let mut stream = stream.clone();
        stream[at] ^= 1;
        assert_eq!(errno(&load(&stream)), 22, "{at}");
    }
    load(&stream).unwrap();
}

#[test]
fn the_writer_is_logged_exactly_and_goes_on_elsewhere() {
    let memory = memory();
    let source = Demo::with_memory(&memory);
    source.client.start_dma_logging(4096, &[]).unwrap();
    let pages = 16;
    source
        .client
        .region_write(0, DMA_ADDRESS, &(BASE + 0x4000).to_le_bytes())
        .unwrap();
    source.write(DMA_LENGTH, pages << 12);
    source.write(WRITER_PERIOD, 100);
    while source.read(WRITER_COUNT) < 3 * pages {
        thread::sleep(Duration::from_millis(1));
    }
    source.set_state(DeviceState::Stop);
    let written = source.read(WRITER_COUNT);
    let log = source.client.dma_log(BASE, SIZE, 4096).unwrap();
    assert_eq!(log[0], 0xffff << 4);
    assert!(log[1..].iter().all(|word| *word == 0));
    thread::sleep(Duration::from_millis(20));
    assert_eq!(source.read(WRITER_COUNT), written);
    assert_eq!(source.read(WRITER_ERRORS), 0);
    source.set_state(DeviceState::StopCopy);
    let stream = source.saved();

    let target = Demo::with_memory(&memory);
    target.set_state(DeviceState::Resuming);
    target.client.migration_write(&stream).unwrap();
    target.set_state(DeviceState::Running);
    while target.read(WRITER_COUNT) < written + pages {
        thread::sleep(Duration::from_millis(1));
    }
    target.write(WRITER_PERIOD, 0);
    target.set_state(DeviceState::Stop);
    // Each page has the number of the last write to it.
    let count = target.read(WRITER_COUNT);
    for page in 0..pages {
        let last = (count - 1 - page) / pages * pages + page;
        let mut bytes = [0; 8];
        memory
            .read_exact_at(&mut bytes, 0x4000 + (u64::from(page) << 12))
            .unwrap();
        assert_eq!(u64::from_le_bytes(bytes), u64::from(last), "{page}");
    }
}

#[test]
fn the_device_may_refuse_to_stop() {
    let demo = Demo::new();
    demo.write(STATE_FAULT, 16);
    let stop = demo.client.set_device_state(DeviceState::Stop);
    assert_eq!(errno(&stop), 16);
    assert_eq!(demo.client.device_state().unwrap(), DeviceState::Running);
}

#[test]
fn one_client_after_the_other_is_served_at_a_path() {
    let folder = tempfile::tempdir().unwrap();
    let options = Options::new(folder.path().join("demo.sock"));
    let socket = options.socket.clone();
    let (ready, is_ready) = mpsc::channel();
    thread::spawn(move || demo::serve(&options, || ready.send(()).unwrap()));
    is_ready.recv_timeout(LONG).unwrap();
    for round in 0..3_u8 {
        let guest = Arc::new(Guest(Mutex::default()));
        let client = Client::connect(&socket, guest, &self::options()).unwrap();
        let mut data = [0];
        client.region_read(0, SCRATCH, &mut data).unwrap();
        assert_eq!(data, [round]);
        client.region_write(0, SCRATCH, &[round + 1]).unwrap();
    }
}
