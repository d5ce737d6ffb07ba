//! A device for tests, and guest memory for it.

#![allow(dead_code, reason = "not every test needs everything")]

pub(crate) mod raw;
pub(crate) mod served;

use std::borrow::Borrow;
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use vfio_user_client::{Client, ConnError, Deadlines, DmaError, GuestDma};
use vfio_user_server::{
    Bar, Description, Device, Doorbell, Ended, Host, Ids, Migration, MsixTable, Options, Server,
    StateStream,
};

/// Long enough never to pass in a test that succeeds.
pub(crate) const LONG: Duration = Duration::from_secs(20);

/// Offsets of the device's registers in BAR 0. Those without a meaning of their own keep what is written to them.
pub(crate) mod register {
    pub(crate) const SCRATCH: u64 = 0x00;
    /// Write: trigger this vector.
    pub(crate) const TRIGGER: u64 = 0x08;
    /// Write: set the level of INTx.
    pub(crate) const LEVEL: u64 = 0x10;
    pub(crate) const ADDRESS: u64 = 0x18;
    pub(crate) const LENGTH: u64 = 0x20;
    /// Write: fill memory with the byte. Errors are the client's to see.
    pub(crate) const FILL: u64 = 0x28;
    /// Write: add up the bytes of memory. Reads as the sum.
    pub(crate) const SUM: u64 = 0x30;
    /// How often the device was reset.
    pub(crate) const RESETS: u64 = 0x38;
    /// How often doorbells 0 and 1 rang.
    pub(crate) const BELLS: u64 = 0x40;
    /// Write: fail with this errno.
    pub(crate) const FAIL: u64 = 0x50;
    /// Where the doorbells are: one for any value, one for 7.
    pub(crate) const DOORBELLS: u64 = 0x800;
}

/// What BAR 2 has that can be mapped.
pub(crate) const AREAS: [std::ops::Range<u64>; 2] = [0..0x1000, 0x2000..0x4000];

/// A device with everything.
pub(crate) struct Everything {
    host: Host,
    registers: BTreeMap<u64, u64>,
    bells: [u64; 2],
    resets: u64,
    ram: Arc<File>,
    pub(crate) stopped: bool,
    pub(crate) early: u64,
}

/// Bytes of early state.
pub(crate) const EARLY: u64 = 200_000;

pub(crate) fn description(ram: &Arc<File>) -> Description {
    let doorbell = |offset, value| Doorbell {
        bar: 0,
        offset: register::DOORBELLS + offset,
        size: 4,
        value,
    };
    Description::new(Ids {
        vendor: 0x4f52,
        device: 0x1234,
        subsystem_vendor: 0x4f52,
        subsystem: 0x5678,
        revision: 1,
        class: 0xff_00_00,
    })
    .bar(0, Bar::memory32(0x1000))
    .bar(1, Bar::memory32(0x2000))
    .bar(
        2,
        Bar::memory64(0x4000)
            .prefetchable()
            .backed_by(Arc::clone(ram))
            .mappable(AREAS[0].clone())
            .mappable(AREAS[1].clone()),
    )
    .bar(4, Bar::io(0x20))
    .intx()
    .power_management()
    .msi(4)
    .express()
    .msix(MsixTable {
        vectors: 100,
        table_bar: 1,
        table_offset: 0,
        pending_bar: 1,
        pending_offset: 0x1000,
    })
    .serial_number(0x0123_4567_89ab_cdef)
    .vendor_specific(1, 1, &[0; 8], &[0xff; 8])
    .doorbell(doorbell(0, None))
    .doorbell(doorbell(4, Some(7)))
}

impl Everything {
    pub(crate) fn server(options: Options) -> Server<Self> {
        let ram = Arc::new(memfd(0x4000));
        Server::new(description(&ram), options, |host| Self {
            host: host.clone(),
            registers: BTreeMap::new(),
            bells: [0; 2],
            resets: 0,
            ram,
            stopped: false,
            early: 0,
        })
        .unwrap()
    }

    pub(crate) fn host(&self) -> Host {
        self.host.clone()
    }

    fn register(&self, offset: u64) -> u64 {
        match offset {
            register::RESETS => self.resets,
            register::BELLS => self.bells[0] | self.bells[1] << 32,
            offset => self.registers.get(&offset).copied().unwrap_or(0),
        }
    }

    fn set_register(&mut self, offset: u64, value: u64) -> io::Result<()> {
        let range = [register::ADDRESS, register::LENGTH].map(|at| self.register(at));
        let length = usize::try_from(range[1]).unwrap();
        match offset {
            register::TRIGGER => self.host.interrupts.trigger(value.try_into().unwrap()),
            register::LEVEL => self.host.interrupts.set_intx(value != 0),
            register::FILL => {
                let data = vec![value.to_le_bytes()[0]; length];
                self.host
                    .memory
                    .write(range[0], &data)
                    .map_err(io::Error::other)?;
            }
            register::SUM => {
                let mut data = vec![0; length];
                self.host
                    .memory
                    .read(range[0], &mut data)
                    .map_err(io::Error::other)?;
                let sum = data.into_iter().map(u64::from).sum();
                self.registers.insert(offset, sum);
            }
            register::FAIL => {
                return Err(io::Error::from_raw_os_error(value.try_into().unwrap()));
            }
            offset => {
                self.registers.insert(offset, value);
            }
        }
        Ok(())
    }
}

impl Device for Everything {
    fn read(&mut self, bar: usize, offset: u64, data: &mut [u8]) -> io::Result<()> {
        match bar {
            0 => {
                let value = self.register(offset & !7).to_le_bytes();
                let start = usize::try_from(offset & 7).unwrap();
                let bytes = value.get(start..start + data.len());
                data.copy_from_slice(bytes.ok_or(io::ErrorKind::InvalidInput)?);
                Ok(())
            }
            2 => self.ram.read_exact_at(data, offset),
            _ => {
                data.fill(0x5a);
                Ok(())
            }
        }
    }

    fn write(&mut self, bar: usize, offset: u64, data: &[u8]) -> io::Result<()> {
        match bar {
            0 => {
                let mut value = self.register(offset & !7).to_le_bytes();
                let start = usize::try_from(offset & 7).unwrap();
                let bytes = value.get_mut(start..start + data.len());
                bytes
                    .ok_or(io::ErrorKind::InvalidInput)?
                    .copy_from_slice(data);
                self.set_register(offset & !7, u64::from_le_bytes(value))
            }
            2 => self.ram.write_all_at(data, offset),
            _ => Ok(()),
        }
    }

    fn reset(&mut self) {
        self.registers.clear();
        self.resets += 1;
    }

    fn doorbell(&mut self, doorbell: usize) {
        self.bells[doorbell] += 1;
    }

    fn stop(&mut self) -> io::Result<()> {
        self.stopped = true;
        Ok(())
    }

    fn start(&mut self) -> io::Result<()> {
        self.stopped = false;
        Ok(())
    }

    fn migration(&mut self) -> Migration<'_> {
        Migration::Stream(self)
    }
}

/// The registers as the device's state: pairs of offset and value.
impl StateStream for Everything {
    fn read_state(&mut self, offset: u64, data: &mut [u8]) -> io::Result<usize> {
        assert!(self.stopped);
        let state: Vec<u8> = self
            .registers
            .iter()
            .flat_map(|(offset, value)| [offset.to_le_bytes(), value.to_le_bytes()].concat())
            .collect();
        let rest = &state[usize::try_from(offset).unwrap().min(state.len())..];
        let count = rest.len().min(data.len());
        data[..count].copy_from_slice(&rest[..count]);
        Ok(count)
    }

    fn write_state(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        assert!(self.stopped);
        if offset == 0 {
            self.registers.clear();
        }
        let (pairs, rest) = data.as_chunks::<16>();
        if !rest.is_empty() {
            return Err(io::ErrorKind::InvalidData.into());
        }
        for pair in pairs {
            let [offset, value] =
                [&pair[..8], &pair[8..]].map(|half| u64::from_le_bytes(half.try_into().unwrap()));
            self.registers.insert(offset, value);
        }
        Ok(())
    }

    fn state_written(&mut self, size: u64) -> io::Result<()> {
        if size != 16 * self.registers.len() as u64 {
            return Err(io::ErrorKind::InvalidData.into());
        }
        Ok(())
    }

    fn has_early_state(&self) -> bool {
        true
    }

    fn read_early_state(&mut self, offset: u64, data: &mut [u8]) -> io::Result<usize> {
        assert!(!self.stopped);
        let count = usize::try_from(EARLY - offset).unwrap().min(data.len());
        data[..count].fill(0xea);
        Ok(count)
    }

    fn write_early_state(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        assert_eq!(offset, self.early);
        self.early += data.len() as u64;
        if data.iter().any(|byte| *byte != 0xea) {
            return Err(io::ErrorKind::InvalidData.into());
        }
        Ok(())
    }
}

/// Serves one client in a thread of its own, and returns the server when the client has gone.
pub(crate) fn serve<D: Device + Send + 'static>(
    mut server: Server<D>,
) -> (UnixStream, JoinHandle<(Server<D>, Ended)>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let thread = thread::spawn(move || {
        let ended = server.serve(theirs).unwrap();
        (server, ended)
    });
    (ours, thread)
}

/// A sealed memfd.
pub(crate) fn memfd(size: u64) -> File {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = File::from(memfd_create("test", flags).unwrap());
    file.set_len(size).unwrap();
    fcntl_add_seals(&file, SealFlags::GROW | SealFlags::SHRINK).unwrap();
    file
}

pub(crate) fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap()
}

/// How often an event was signalled since the last time; waits for the first.
pub(crate) fn wait_for(event: &OwnedFd) -> u64 {
    let limit = Timespec::try_from(LONG).unwrap();
    poll(&mut [PollFd::new(event, PollFlags::IN)], Some(&limit)).unwrap();
    count(event)
}

/// How often an event was signalled since the last time.
pub(crate) fn count(event: impl AsFd) -> u64 {
    let mut count = [0; 8];
    match rustix::io::read(event, &mut count) {
        Ok(_) => u64::from_ne_bytes(count),
        Err(_) => 0,
    }
}

/// Guest memory as the client serves it by messages: `BASE..BASE + len`.
#[derive(Debug)]
pub(crate) struct Guest(pub(crate) Mutex<Vec<u8>>);

/// Where [`Guest`] begins.
pub(crate) const BASE: u64 = 0x10_0000;

impl Guest {
    pub(crate) fn new(size: usize) -> Arc<Self> {
        Arc::new(Self(Mutex::new(vec![0; size])))
    }

    fn range(address: u64, len: usize) -> std::ops::Range<usize> {
        let start = usize::try_from(address.wrapping_sub(BASE)).unwrap();
        start..start.saturating_add(len)
    }
}

impl GuestDma for Guest {
    fn read(&self, address: u64, data: &mut [u8]) -> Result<(), DmaError> {
        let bytes = self.0.lock().unwrap();
        let bytes = bytes.get(Self::range(address, data.len()));
        data.copy_from_slice(bytes.ok_or(DmaError)?);
        Ok(())
    }

    fn write(&self, address: u64, data: &[u8]) -> Result<(), DmaError> {
        let mut bytes = self.0.lock().unwrap();
        let bytes = bytes.get_mut(Self::range(address, data.len()));
        bytes.ok_or(DmaError)?.copy_from_slice(data);
        Ok(())
    }
}

pub(crate) fn client_options(twin_socket: bool) -> vfio_user_client::Options {
    vfio_user_client::Options {
        deadlines: Deadlines {
            handshake: LONG,
            region_io: LONG,
            control: LONG,
            reset: LONG,
            dma_map: LONG,
            migration: LONG,
        },
        twin_socket,
        ..vfio_user_client::Options::default()
    }
}

/// A client of a server of [`Everything`], and guest memory of a megabyte that it serves.
pub(crate) struct Pair {
    pub(crate) client: Client,
    pub(crate) guest: Arc<Guest>,
    pub(crate) thread: JoinHandle<(Server<Everything>, Ended)>,
}

impl Pair {
    pub(crate) fn new(twin_socket: bool) -> Self {
        Self::with(Everything::server(Options::default()), twin_socket)
    }

    pub(crate) fn with(server: Server<Everything>, twin_socket: bool) -> Self {
        let (stream, thread) = serve(server);
        let guest = Guest::new(1 << 20);
        let dma: Arc<dyn GuestDma> = Arc::clone(&guest) as _;
        let client = Client::handshake(stream, dma, &client_options(twin_socket)).unwrap();
        Self {
            client,
            guest,
            thread,
        }
    }

    /// Drops the client, and returns the server.
    pub(crate) fn end(self) -> Server<Everything> {
        drop(self.client);
        let (server, ended) = self.thread.join().unwrap();
        assert_eq!(ended, Ended::Closed);
        server
    }

    pub(crate) fn read(&self, offset: u64) -> u64 {
        let mut data = [0; 8];
        self.client.region_read(0, offset, &mut data).unwrap();
        u64::from_le_bytes(data)
    }

    pub(crate) fn write(&self, offset: u64, value: u64) {
        self.try_write(offset, value).unwrap();
    }

    pub(crate) fn try_write(&self, offset: u64, value: u64) -> Result<(), ConnError> {
        self.client.region_write(0, offset, &value.to_le_bytes())
    }

    pub(crate) fn config16(&self, offset: u64) -> u16 {
        let mut data = [0; 2];
        self.client.region_read(7, offset, &mut data).unwrap();
        u16::from_le_bytes(data)
    }

    pub(crate) fn set_config16(&self, offset: u64, value: u16) {
        self.client
            .region_write(7, offset, &value.to_le_bytes())
            .unwrap();
    }

    /// Makes the device bus master.
    pub(crate) fn enable(&self) {
        self.set_config16(4, 0x6);
    }

    /// Fills guest memory by the device.
    pub(crate) fn fill(&self, address: u64, length: u64, byte: u8) -> Result<(), ConnError> {
        self.write(register::ADDRESS, address);
        self.write(register::LENGTH, length);
        self.try_write(register::FILL, byte.into())
    }

    /// Adds guest memory up by the device.
    pub(crate) fn sum(&self, address: u64, length: u64) -> u64 {
        self.sum_or_not(address, length).unwrap();
        self.read(register::SUM)
    }

    pub(crate) fn sum_or_not(&self, address: u64, length: u64) -> Result<(), ConnError> {
        self.write(register::ADDRESS, address);
        self.write(register::LENGTH, length);
        self.try_write(register::SUM, 0)
    }
}

/// The errno with which a call was refused; 0 if it was not.
pub(crate) fn errno(result: impl Borrow<Result<(), ConnError>>) -> u32 {
    match result.borrow() {
        Err(ConnError::Refused { errno, .. }) => *errno,
        _ => 0,
    }
}
