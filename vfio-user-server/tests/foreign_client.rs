//! The client of the crate `vfio_user`, which nobody here wrote. It knows ten commands, looks at no error, and takes
//! what can be reset for what cannot.

#![expect(clippy::unwrap_used, reason = "a test panics when it fails")]

mod support;

use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::{self, JoinHandle};

use rustix::event::{EventfdFlags, eventfd};
use support::{AREAS, Everything, count, memfd, register};
use tempfile::TempDir;
use vfio_user::Client;
use vfio_user_server::{Listener, Options, Stopper};

struct Served {
    folder: TempDir,
    stopper: Stopper,
    thread: Option<JoinHandle<()>>,
}

impl Served {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let listener = Listener::bind(&folder.path().join("socket")).unwrap();
        let mut server = Everything::server(Options::default());
        let stopper = server.stopper();
        let thread = thread::spawn(move || server.run(&listener).unwrap());
        Self {
            folder,
            stopper,
            thread: Some(thread),
        }
    }

    fn connect(&self) -> Client {
        Client::new(&self.folder.path().join("socket")).unwrap()
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.stopper.stop();
        self.thread.take().unwrap().join().unwrap();
    }
}

fn read(client: &mut Client, offset: u64) -> u64 {
    let mut data = [0; 8];
    client.region_read(0, offset, &mut data).unwrap();
    u64::from_le_bytes(data)
}

fn write(client: &mut Client, offset: u64, value: u64) {
    client
        .region_write(0, offset, &value.to_le_bytes())
        .unwrap();
}

#[test]
fn it_finds_the_device_as_it_is() {
    let served = Served::new();
    let mut client = served.connect();
    // It has the flag the wrong way round.
    assert!(!client.resettable());
    let sizes: Vec<_> = (0..9)
        .map(|index| client.region(index).unwrap().size)
        .collect();
    assert_eq!(sizes, [0x1000, 0x2000, 0x4000, 0, 0x20, 0, 0, 0x1000, 0]);
    let ram = client.region(2).unwrap();
    let areas: Vec<_> = ram
        .sparse_areas
        .iter()
        .map(|area| area.offset..area.offset + area.size)
        .collect();
    assert_eq!(areas, AREAS);
    let file = ram.file_offset.as_ref().unwrap();
    file.file()
        .write_all_at(&[7; 8], file.start() + 0x2000)
        .unwrap();
    let mut data = [0; 8];
    client.region_read(2, 0x2000, &mut data).unwrap();
    assert_eq!(data, [7; 8]);
    let irqs = [0, 1, 2].map(|index| client.get_irq_info(index).unwrap());
    assert_eq!(
        irqs.map(|irq| (irq.flags, irq.count)),
        [(7, 1), (3, 4), (3, 100)]
    );
}

#[test]
fn it_drives_the_device() {
    let served = Served::new();
    let mut client = served.connect();
    write(&mut client, register::SCRATCH, 5);
    assert_eq!(read(&mut client, register::SCRATCH), 5);

    let memory = memfd(0x4000);
    client
        .dma_map(0x1000, 0x10_0000, 0x2000, memory.as_fd().as_raw_fd())
        .unwrap();
    client.region_write(7, 4, &[6, 0]).unwrap();
    write(&mut client, register::ADDRESS, 0x10_0ffe);
    write(&mut client, register::LENGTH, 4);
    write(&mut client, register::FILL, 9);
    let mut data = [0; 6];
    memory.read_exact_at(&mut data, 0x1ffd).unwrap();
    assert_eq!(data, [0, 9, 9, 9, 9, 0]);
    client.dma_unmap(0x10_0000, 0x2000).unwrap();

    // A blocking eventfd, as it would have.
    let event = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    client
        .set_irqs(2, 0x24, 9, 1, &[event.as_raw_fd()])
        .unwrap();
    write(&mut client, register::TRIGGER, 9);
    assert_eq!(count(&event), 1);
    client.set_irqs(2, 0x21, 0, 0, &[]).unwrap();

    client.reset().unwrap();
    assert_eq!(read(&mut client, register::SCRATCH), 0);
    assert_eq!(read(&mut client, register::RESETS), 1);
}

#[test]
fn it_comes_back_to_the_device_as_it_left_it() {
    static VALUE: AtomicU32 = AtomicU32::new(0);
    let served = Served::new();
    for _ in 0..3 {
        let mut client = served.connect();
        let value = u64::from(VALUE.fetch_add(1, Ordering::Relaxed));
        assert_eq!(read(&mut client, register::SCRATCH), value);
        write(&mut client, register::SCRATCH, value + 1);
        client.shutdown().unwrap();
    }
}
