//! The life of a server: clients that come and go, memory that is in use when it is taken away, threads of the device.

#![expect(clippy::unwrap_used, reason = "a test panics when it fails")]

mod support;

use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use support::{BASE, Everything, Guest, LONG, Pair, client_options, errno, memfd, register};
use vfio_user_client::{Client, ConnError, DmaAccess, GuestDma};
use vfio_user_server::{Listener, MemoryError, Options, ServerError};
use vm_memory::{Bytes, GuestAddress};

const EBUSY: u32 = 16;

#[test]
fn a_second_client_waits_for_its_turn() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let listener = Listener::bind(&path).unwrap();
    let mut server = Everything::server(Options::default());
    let stopper = server.stopper();
    let thread = thread::spawn(move || server.run(&listener).unwrap());
    let connect = |limit| {
        let mut options = client_options(true);
        options.deadlines.handshake = limit;
        Client::connect(&path, Guest::new(0), &options)
    };
    let first = connect(LONG).unwrap();
    let second = connect(Duration::from_millis(50));
    assert!(matches!(second, Err(ConnError::TimedOut { .. })));
    first.region_write(0, register::SCRATCH, &[1; 8]).unwrap();
    thread::scope(|scope| {
        let third = scope.spawn(|| connect(LONG).unwrap());
        thread::sleep(Duration::from_millis(20));
        first.region_write(0, register::SCRATCH, &[2; 8]).unwrap();
        drop(first);
        let third = third.join().unwrap();
        let mut data = [0; 8];
        third.region_read(0, register::SCRATCH, &mut data).unwrap();
        assert_eq!(data, [2; 8]);
        // The one that it serves is dropped too.
        stopper.stop();
        thread.join().unwrap();
        let lost = third.region_read(0, register::SCRATCH, &mut data);
        assert!(matches!(lost, Err(ConnError::Lost(_))));
    });
    assert!(!path.exists());
}

#[test]
fn a_server_that_is_stopped_early_serves_nobody() {
    let folder = tempfile::tempdir().unwrap();
    let listener = Listener::bind(&folder.path().join("socket")).unwrap();
    let mut server = Everything::server(Options::default());
    server.stopper().stop();
    server.run(&listener).unwrap();
    let (_ours, theirs) = UnixStream::pair().unwrap();
    server.serve(theirs).unwrap();
}

#[test]
fn only_what_a_dead_server_left_is_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    let alive = Listener::bind(&path).unwrap();
    assert!(matches!(
        Listener::bind(&path),
        Err(ServerError::Listen { .. })
    ));
    // Somebody else's socket, which is there by now, is not removed.
    fs::remove_file(&path).unwrap();
    let other = UnixListener::bind(&path).unwrap();
    drop(alive);
    assert!(path.exists());
    drop(other);

    let file = folder.path().join("file");
    fs::write(&file, "precious").unwrap();
    assert!(Listener::bind(&file).is_err());
    assert_eq!(fs::read(&file).unwrap(), b"precious");
    let nowhere = folder.path().join("nowhere/socket");
    let error = Listener::bind(&nowhere).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("cannot listen on {}", nowhere.display())
    );
}

#[test]
fn memory_in_use_is_not_unmapped() {
    let mut server = Everything::server(Options {
        unmap_deadline: Duration::from_millis(100),
        ..Options::default()
    });
    let host = server.device().host();
    let pair = Pair::with(server, true);
    let memory = memfd(0x2000);
    let map = |at: u64| {
        let file = Some((memory.as_fd(), at));
        pair.client
            .dma_map(BASE + at, 0x1000, file, DmaAccess::ReadWrite)
    };
    map(0).unwrap();
    pair.enable();
    let view = host.memory.view();
    // An old view holds what is unmapped, also if something else was mapped since.
    map(0x1000).unwrap();
    assert_eq!(errno(pair.client.dma_unmap(BASE, 0x1000)), EBUSY);
    view.write_obj(0x55_u8, GuestAddress(BASE)).unwrap();
    pair.fill(BASE + 1, 1, 0x66).unwrap();
    pair.client.dma_unmap(BASE + 0x1000, 0x1000).unwrap();
    drop(view);
    pair.client.dma_unmap(BASE, 0x1000).unwrap();
    let mut data = [0; 2];
    memory.read_exact_at(&mut data, 0).unwrap();
    assert_eq!(data, [0x55, 0x66]);
    let expected = MemoryError::NotMapped {
        address: BASE,
        length: 2,
    };
    assert_eq!(host.memory.read(BASE, &mut data), Err(expected));
    assert_eq!(host.memory.write(BASE, &data), Err(expected));
}

#[test]
fn a_view_that_goes_in_time_lets_its_memory_be_unmapped() {
    let mut server = Everything::server(Options::default());
    let host = server.device().host();
    let pair = Pair::with(server, true);
    let memory = memfd(0x1000);
    let file = Some((memory.as_fd(), 0));
    pair.client
        .dma_map(BASE, 0x1000, file, DmaAccess::ReadWrite)
        .unwrap();
    pair.enable();
    let view = host.memory.view();
    let start = Instant::now();
    thread::scope(|scope| {
        scope.spawn(move || {
            thread::sleep(Duration::from_millis(50));
            drop(view);
        });
        pair.client.dma_unmap(BASE, 0x1000).unwrap();
    });
    assert!(start.elapsed() >= Duration::from_millis(50));
}

#[test]
fn views_have_only_what_is_mapped_for_both() {
    let mut server = Everything::server(Options::default());
    let host = server.device().host();
    let pair = Pair::with(server, true);
    let memory = memfd(0x1000);
    let file = Some((memory.as_fd(), 0));
    pair.client
        .dma_map(BASE, 0x1000, file, DmaAccess::ReadOnly)
        .unwrap();
    pair.client
        .dma_map(BASE + 0x1000, 0x1000, None, DmaAccess::ReadWrite)
        .unwrap();
    let write = |address| host.memory.view().write_obj(1_u8, GuestAddress(address));
    pair.client
        .dma_map(BASE + 0x2000, 0x1000, file, DmaAccess::ReadWrite)
        .unwrap();
    assert!(write(BASE + 0x2000).is_err(), "not bus master");
    pair.enable();
    assert!(write(BASE).is_err());
    assert!(write(BASE + 0x1000).is_err());
    write(BASE + 0x2000).unwrap();
    let denied = MemoryError::Denied { address: BASE };
    assert_eq!(host.memory.write(BASE, &[1]), Err(denied));
    host.memory.read(BASE, &mut [0]).unwrap();
}

#[test]
fn a_client_that_goes_takes_its_memory_and_its_answers_with_it() {
    let mut server = Everything::server(Options::default());
    let host = server.device().host();
    let pair = Pair::with(server, true);
    pair.client
        .dma_map(BASE, 0x1000, None, DmaAccess::ReadWrite)
        .unwrap();
    pair.enable();
    host.memory.write(BASE, &[1]).unwrap();
    let _server = pair.end();
    assert!(matches!(
        host.memory.write(BASE, &[1]),
        Err(MemoryError::NotMapped { .. })
    ));
}

/// Guest memory of a client that does not answer until it may.
struct Slow(mpsc::SyncSender<()>, std::sync::Mutex<mpsc::Receiver<()>>);

impl GuestDma for Slow {
    fn read(&self, _: u64, data: &mut [u8]) -> Result<(), vfio_user_client::DmaError> {
        self.0.send(()).unwrap();
        self.1.lock().unwrap().recv().unwrap();
        data.fill(3);
        Ok(())
    }

    fn write(&self, _: u64, _: &[u8]) -> Result<(), vfio_user_client::DmaError> {
        Ok(())
    }
}

#[test]
fn the_device_is_served_while_a_thread_of_it_waits_for_memory() {
    let mut server = Everything::server(Options::default());
    let host = server.device().host();
    let (stream, _thread) = support::serve(server);
    let (asked, is_asked) = mpsc::sync_channel(1);
    let (answer, is_answered) = mpsc::channel();
    let slow = Arc::new(Slow(asked, is_answered.into()));
    let client = Client::handshake(stream, slow, &client_options(true)).unwrap();
    client
        .dma_map(BASE, 0x1000, None, DmaAccess::ReadWrite)
        .unwrap();
    client.region_write(7, 4, &[6, 0]).unwrap();
    thread::scope(|scope| {
        let read = scope.spawn(move || {
            let mut data = [0; 4];
            host.memory.read(BASE, &mut data).unwrap();
            data
        });
        is_asked.recv().unwrap();
        client.region_write(0, register::SCRATCH, &[1; 8]).unwrap();
        let mut data = [0; 8];
        client.region_read(0, register::SCRATCH, &mut data).unwrap();
        assert_eq!(data, [1; 8]);
        answer.send(()).unwrap();
        assert_eq!(read.join().unwrap(), [3; 4]);
    });
}

#[test]
fn threads_of_the_device_and_its_own_accesses_share_one_socket() {
    for twin in [true, false] {
        let mut server = Everything::server(Options::default());
        let host = server.device().host();
        let pair = Pair::with(server, twin);
        pair.client
            .dma_map(BASE, 0x10_0000, None, DmaAccess::ReadWrite)
            .unwrap();
        pair.enable();
        let is_over = AtomicBool::new(false);
        thread::scope(|scope| {
            let mut threads = Vec::new();
            for thread in 1..4_u64 {
                let (host, is_over) = (host.clone(), &is_over);
                threads.push(scope.spawn(move || {
                    let address = BASE + thread * 0x1_0000;
                    let mut round = 0_u8;
                    while !is_over.load(Ordering::Relaxed) {
                        round = round.wrapping_add(1);
                        host.memory.write(address, &[round; 1000]).unwrap();
                        let mut data = [0; 1000];
                        host.memory.read(address, &mut data).unwrap();
                        assert_eq!(data, [round; 1000]);
                    }
                }));
            }
            for round in 0..200_u64 {
                pair.fill(BASE, 100, round.to_le_bytes()[0]).unwrap();
                assert_eq!(pair.sum(BASE, 100), 100 * (round & 0xff));
            }
            is_over.store(true, Ordering::Relaxed);
            // Without a call, nobody but an event loop answers the device.
            while !threads.iter().all(|thread| thread.is_finished()) {
                pair.client.serve();
            }
        });
    }
}
