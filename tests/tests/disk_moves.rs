//! A disk moves from one server's process to another's, with the endpoint that a guest has it by, while a request waits;
//! or it stays where it is, and another endpoint goes on with it.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

#[path = "../../devices/tests/support/mod.rs"]
mod support;

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::ptr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use devices::{
    Attachment, Backend, Descriptors, DeviceState, DmaTarget, Fallback, Fingerprint, Mapping, Next,
    Passthrough, Probe, Region, Remote, transition,
};
use pci::{BarIndex, Endpoint, TreePath};
use rustix::fs::{MemfdFlags, memfd_create};
use tests::lab::{Process, SOON};
use tests::outrigger;
use tests::tapped_socket::TappedSocket;
use vfio_user_client::{DmaError, GuestDma};

use support::{Machine, signal};

const BAR0: BarIndex = BarIndex::ALL[0];
/// Where BAR 0 is put, and where guest memory ends.
const BAR0_ADDRESS: u64 = 0xc000_0000;
const RAM: u64 = 1 << 20;

/// Where the driver has its queue, and its requests of a page each.
const DESCRIPTORS: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
const REQUESTS: u64 = 0x10000;
const QUEUE_SIZE: u16 = 8;

const SECTOR: usize = 512;
/// Types of requests (virtio 1.2, 5.2.6).
const READ: u32 = 0;
const WRITE: u32 = 1;

#[test]
fn a_request_that_waits_is_served_where_the_disk_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("image");
    let file = File::options()
        .create_new(true)
        .read(true)
        .write(true)
        .open(&image)
        .unwrap();
    file.set_len(1 << 20).unwrap();
    let ram = Arc::new(File::from(
        memfd_create("guest", MemfdFlags::CLOEXEC).unwrap(),
    ));
    ram.set_len(RAM).unwrap();

    let there = Disk::new(folder.path(), &image, "there", &[], &ram);
    let mut driver = Driver::new(&there, &ram);
    driver.request(WRITE, 5, &[0x55; SECTOR]);
    driver.ring(&there);
    there.expect_interrupt();
    assert_eq!(driver.completed(), 1);

    // The other one may be there already: it leaves the image alone.
    let here = Disk::new(folder.path(), &image, "here", &["--incoming"], &ram);
    let mismatches =
        Fingerprint::compare(there.endpoint.fingerprint(), here.endpoint.fingerprint());
    assert_eq!(mismatches, []);

    there.endpoint.disconnect_interrupts().unwrap();
    there.go_to(DeviceState::Stop);
    driver.request(WRITE, 6, &[0x66; SECTOR]);
    driver.request(READ, 5, &[0; SECTOR]);
    driver.ring(&there);
    there.go_to(DeviceState::StopCopy);
    let saved = there.endpoint.save().unwrap();
    assert_eq!(saved.rung.len(), 1);
    let data = there.data();

    here.go_to(DeviceState::Resuming);
    here.endpoint.restore(&saved).unwrap();
    for piece in data.chunks(1000) {
        here.endpoint.migration().unwrap().write(piece).unwrap();
    }
    here.go_to(DeviceState::Stop);
    // Nothing has happened yet.
    assert_eq!(driver.completed(), 1);
    assert_eq!(sector(&file, 6), [0; SECTOR]);
    here.go_to(DeviceState::Running);
    here.endpoint.resume().unwrap();
    here.expect_interrupt();
    driver.await_completed(3);
    assert_eq!(driver.data(2), [0x55; SECTOR]);
    assert_eq!(sector(&file, 6), [0x66; SECTOR]);

    // It works on, and without the one that it came from.
    drop(there);
    driver.request(READ, 6, &[0; SECTOR]);
    driver.ring(&here);
    driver.await_completed(4);
    assert_eq!(driver.data(3), [0x66; SECTOR]);
    here.expect_interrupt();
}

#[test]
fn a_server_does_not_notice_that_another_endpoint_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("image");
    File::create_new(&image).unwrap().set_len(1 << 20).unwrap();
    let ram = Arc::new(File::from(
        memfd_create("guest", MemfdFlags::CLOEXEC).unwrap(),
    ));
    ram.set_len(RAM).unwrap();
    let here = Disk::new(folder.path(), &image, "disk", &[], &ram);
    let mut driver = Driver::new(&here, &ram);
    driver.request(WRITE, 5, &[0x55; SECTOR]);
    driver.ring(&here);
    here.expect_interrupt();

    let (there, machine) = here.inherit();
    let mismatches = Fingerprint::compare(here.endpoint.fingerprint(), there.fingerprint());
    assert_eq!(mismatches, []);
    let messages = here.tap.bytes();

    // The other one does not get it in the end.
    here.endpoint.disconnect_interrupts().unwrap();
    driver.request(READ, 5, &[0; SECTOR]);
    driver.ring(&here);
    driver.await_completed(2);
    here.hand_over(&there);
    drop(there);
    assert!(here.endpoint.check_answers().is_err());
    assert!(here.machine.delivered().is_empty() && machine.delivered().is_empty());
    here.endpoint.resume().unwrap();
    here.expect_interrupt();
    assert_eq!(driver.data(1), [0x55; SECTOR]);

    // This one does. The disk works meanwhile, and it interrupts.
    let (there, machine) = here.inherit();
    here.endpoint.disconnect_interrupts().unwrap();
    driver.request(WRITE, 6, &[0x66; SECTOR]);
    driver.ring(&here);
    driver.await_completed(3);
    here.hand_over(&there);
    driver.request(READ, 6, &[0; SECTOR]);
    driver.ring(&here);
    driver.await_completed(4);
    assert_eq!(driver.data(3), [0x66; SECTOR]);
    assert!(here.machine.delivered().is_empty() && machine.delivered().is_empty());
    assert_eq!(machine.mapped(), here.machine.mapped());
    let there = here.replace(there, machine);
    there.endpoint.resume().unwrap();
    there.expect_interrupt();
    assert_eq!(there.tap.bytes(), messages);

    driver.request(WRITE, 7, &[0x77; SECTOR]);
    driver.ring(&there);
    driver.await_completed(5);
    there.expect_interrupt();
    let ids = there.config(0);
    there.endpoint.check_answers().unwrap();
    assert_eq!(ids & 0xffff, 0x1af4);
    assert!(there.tap.bytes() > messages);
}

fn sector(file: &File, number: u64) -> [u8; SECTOR] {
    let mut data = [0; SECTOR];
    file.read_exact_at(&mut data, number * SECTOR as u64)
        .unwrap();
    data
}

/// An endpoint with a disk behind it, whose server is a process of its own.
struct Disk {
    endpoint: Passthrough,
    doorbell: Arc<OwnedFd>,
    machine: Machine,
    tap: TappedSocket,
    // After its client.
    _server: Process,
}

impl Disk {
    fn new(folder: &Path, image: &Path, name: &str, flags: &[&str], ram: &Arc<File>) -> Self {
        let socket = folder.join(name);
        let mut command = Process::command(outrigger::binary());
        command.args(["serve", "disk", "--path"]).arg(image);
        command.arg("--socket").arg(&socket).args(flags);
        let mut server = Process::start(&mut command, &folder.join("log")).unwrap();
        server.wait_for("listening", SOON).unwrap();

        let tap = TappedSocket::before(&socket).unwrap();
        let remote = Arc::new(Remote::connect(tap.path(), Arc::new(Nobody)).unwrap());
        let mapping = Mapping {
            iova: 0,
            size: RAM,
            address: ptr::null(),
            file: (ram.as_fd(), 0),
        };
        remote.map(&mapping).unwrap();
        let machine = Machine::default();
        let probe = Probe::new(remote.clone(), false).unwrap();
        let endpoint = endpoint(probe, &machine);
        endpoint.reset().unwrap();
        let doorbells = remote.doorbells(Region::Bar(BAR0)).unwrap();
        Self {
            endpoint,
            doorbell: doorbells[0].event.clone(),
            machine,
            tap,
            _server: server,
        }
    }

    /// What another process makes of the disk while this one has it.
    fn inherit(&self) -> (Passthrough, Machine) {
        let mut descriptors = Descriptors::default();
        let attachment = self.endpoint.describe(&mut descriptors).unwrap();
        let written = serde_json::to_string(&attachment).unwrap();
        let attachment: Attachment = serde_json::from_str(&written).unwrap();
        let descriptors = sent(&descriptors);
        let remote = Remote::inherit(&attachment.remote, &descriptors, Arc::new(Nobody)).unwrap();
        let probe = Probe::inherit(Arc::new(remote), &attachment, &descriptors).unwrap();
        let machine = Machine::default();
        (endpoint(probe, &machine), machine)
    }

    /// Hands it over to that, whose interrupts are to wait.
    fn hand_over(&self, to: &Passthrough) {
        let mut descriptors = Descriptors::default();
        let standing = self.endpoint.leave(SOON, &mut descriptors).unwrap();
        let saved = self.endpoint.save().unwrap();
        assert_eq!((saved.rung.len(), saved.signalled.len()), (0, 1));
        to.take_over(&standing, &sent(&descriptors)).unwrap();
        to.restore(&saved).unwrap();
    }

    /// The disk with an endpoint that has taken over.
    fn replace(self, endpoint: Passthrough, machine: Machine) -> Self {
        Self {
            endpoint,
            machine,
            ..self
        }
    }

    fn go_to(&self, state: DeviceState) {
        let migration = self.endpoint.migration().unwrap();
        let reset = || self.endpoint.reset();
        transition(migration, state, Fallback::Reset, reset).unwrap();
    }

    fn data(&self) -> Vec<u8> {
        let migration = self.endpoint.migration().unwrap();
        let mut data = Vec::new();
        loop {
            let mut piece = [0; 777];
            let chunk = migration.read(&mut piece).unwrap();
            data.extend_from_slice(&piece[..chunk.length]);
            if chunk.next == Next::End {
                return data;
            }
        }
    }

    /// Waits for the interrupt of the queue, and none of another.
    fn expect_interrupt(&self) {
        let start = Instant::now();
        loop {
            let delivered = self.machine.delivered();
            assert!(delivered.iter().all(|data| *data == 0x41), "{delivered:x?}");
            if !delivered.is_empty() {
                return;
            }
            assert!(start.elapsed() < SOON, "no interrupt comes");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.endpoint.bar_write(BAR0, offset, data);
    }

    fn config(&self, offset: u16) -> u32 {
        let mut data = [0; 4];
        self.endpoint.config_read(offset, &mut data);
        u32::from_le_bytes(data)
    }
}

/// The endpoint of a disk that has been asked what it is.
fn endpoint(mut probe: Probe, machine: &Machine) -> Passthrough {
    let mut bars = probe.bars().clone();
    bars.set_address(BAR0, BAR0_ADDRESS);
    probe.set_bars(bars);
    let path = TreePath::new(vec![(1, 0)]).unwrap();
    let (mapper, source) = (Box::new(machine.clone()), Box::new(machine.clone()));
    Passthrough::new("disk", path, probe, mapper, source)
}

/// What another process gets of these.
fn sent(descriptors: &Descriptors) -> Descriptors {
    let sent = descriptors.iter();
    let sent: Vec<_> = sent.map(|fd| fd.try_clone_to_owned().unwrap()).collect();
    Descriptors::from(sent)
}

/// The driver of a disk with one queue, which stays when the disk moves.
struct Driver {
    ram: Arc<File>,
    requests: u16,
}

impl Driver {
    /// Sets the device up: virtio 1.2, 3.1.1 and 4.1.
    fn new(disk: &Disk, ram: &Arc<File>) -> Self {
        disk.endpoint.config_write(4, &[6, 4]);
        let (mut common, mut msix) = (0, 0);
        let mut at = disk.config(0x34).to_le_bytes()[0];
        while at != 0 {
            let place = u16::from(at);
            let [id, next, _, kind] = disk.config(place).to_le_bytes();
            match (id, kind) {
                (0x09, 1) => common = disk.config(place + 8).into(),
                (0x11, _) => msix = place,
                _ => {}
            }
            at = next;
        }
        let table = disk.config(msix + 4);
        let table_bar = BarIndex::new((table & 7).to_le_bytes()[0]).unwrap();
        for (word, value) in (0..).zip([0xfee0_0000_u32, 0, 0x41, 0]) {
            let offset = u64::from(table & !7) + 16 + 4 * word;
            disk.endpoint
                .bar_write(table_bar, offset, &value.to_le_bytes());
        }
        disk.endpoint.config_write(msix + 2, &[0, 0x80]);

        let write = |offset: u64, data: &[u8]| disk.write(common + offset, data);
        write(0x14, &[3]);
        // VIRTIO_F_VERSION_1, and nothing else.
        for (select, features) in [(0_u32, 0_u32), (1, 1)] {
            write(0x08, &select.to_le_bytes());
            write(0x0c, &features.to_le_bytes());
        }
        write(0x14, &[3 | 8]);
        write(0x16, &[0, 0]);
        write(0x18, &QUEUE_SIZE.to_le_bytes());
        write(0x1a, &1_u16.to_le_bytes());
        for (offset, address) in [(0x20, DESCRIPTORS), (0x28, AVAILABLE), (0x30, USED)] {
            let [low, high] = [address & 0xffff_ffff, address >> 32]
                .map(|half| u32::try_from(half).unwrap().to_le_bytes());
            write(offset, &low);
            write(offset + 4, &high);
        }
        write(0x1c, &[1, 0]);
        write(0x14, &[3 | 8 | 4]);
        Self {
            ram: ram.clone(),
            requests: 0,
        }
    }

    /// Makes a request of one sector available; up to two at a time, since it takes three descriptors.
    fn request(&mut self, kind: u32, sector: u64, data: &[u8; SECTOR]) {
        let number = self.requests;
        let page = REQUESTS + 0x1000 * u64::from(number);
        let head = number % 2 * 3;
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        self.write(page, &header);
        self.write(page + 0x100, data);
        self.write(page + 0x800, &[0xff]);
        // Flags: 1, there is a next one; 2, the device writes.
        let data_flags = if kind == READ { 3 } else { 1 };
        for (index, (address, length, flags)) in [
            (page, 16_u32, 1_u16),
            (page + 0x100, 512, data_flags),
            (page + 0x800, 1, 2),
        ]
        .into_iter()
        .enumerate()
        {
            let index = head + u16::try_from(index).unwrap();
            let place = DESCRIPTORS + 16 * u64::from(index);
            self.write(place, &address.to_le_bytes());
            self.write(place + 8, &length.to_le_bytes());
            self.write(place + 12, &flags.to_le_bytes());
            self.write(place + 14, &(index + 1).to_le_bytes());
        }
        let slot = u64::from(number % QUEUE_SIZE);
        self.write(AVAILABLE + 4 + 2 * slot, &head.to_le_bytes());
        self.requests += 1;
        self.write(AVAILABLE + 2, &self.requests.to_le_bytes());
    }

    /// Rings the doorbell of the queue, as KVM does it for a guest.
    fn ring(&self, disk: &Disk) {
        signal(&disk.doorbell);
    }

    fn completed(&self) -> u16 {
        let mut index = [0; 2];
        self.ram.read_exact_at(&mut index, USED + 2).unwrap();
        u16::from_le_bytes(index)
    }

    /// Waits until so many requests have been served, all of them well.
    fn await_completed(&self, count: u16) {
        let start = Instant::now();
        while self.completed() < count {
            assert!(start.elapsed() < SOON, "{} served", self.completed());
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(self.completed(), count);
        for number in 0..count {
            let mut status = [0xff];
            let place = REQUESTS + 0x1000 * u64::from(number) + 0x800;
            self.ram.read_exact_at(&mut status, place).unwrap();
            assert_eq!(status, [0], "request {number}");
        }
    }

    /// The data of a request.
    fn data(&self, number: u64) -> [u8; SECTOR] {
        let mut data = [0; SECTOR];
        let place = REQUESTS + 0x1000 * number + 0x100;
        self.ram.read_exact_at(&mut data, place).unwrap();
        data
    }

    fn write(&self, address: u64, data: &[u8]) {
        self.ram.write_all_at(data, address).unwrap();
    }
}

/// Guest memory by messages, which nobody needs.
struct Nobody;

impl GuestDma for Nobody {
    fn read(&self, _: u64, _: &mut [u8]) -> Result<(), DmaError> {
        Err(DmaError)
    }

    fn write(&self, _: u64, _: &[u8]) -> Result<(), DmaError> {
        Err(DmaError)
    }
}
