//! Migrations with peers that say what makes no sense, too much, nothing, or what is not true: the VM stays where it was,
//! and the next peer is served as if they had never been.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::cell::Cell;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread;

use serde_json::{Value, json};
use tempfile::{NamedTempFile, TempDir};
use tests::api::{DONE, Vmm, request};
use tests::crossing::Kind;
use tests::lab::SOON;
use tests::outrigger::has_kvm;
use tests::tiny::counter::counter;

const CONTROL: u32 = 0;
const MEMORY: u32 = 1;
const QUESTION: u32 = 2;
/// The number of a frame with pages.
const PAGES: u32 = 3;

/// What a connection begins with: of a new migration, or of the last one.
fn hello(role: u32) -> Vec<u8> {
    thread_local! {
        static MIGRATIONS: Cell<u128> = const { Cell::new(0) };
    }
    if role == CONTROL {
        MIGRATIONS.set(MIGRATIONS.get() + 1);
    }
    let mut hello = b"outriggr".to_vec();
    for number in [1, 1, role] {
        hello.extend(u32::to_le_bytes(number));
    }
    hello.extend(MIGRATIONS.get().to_le_bytes());
    hello
}

fn frame(kind: u32, content: &[u8]) -> Vec<u8> {
    let length = u32::try_from(content.len()).unwrap();
    [&kind.to_le_bytes(), &length.to_le_bytes(), content].concat()
}

/// A frame's kind and content; nothing at the end of the connection.
fn read_frame(stream: &mut UnixStream) -> Option<(u32, Vec<u8>)> {
    let mut head = [[0; 4]; 2];
    stream.read_exact(head.as_flattened_mut()).ok()?;
    let [kind, length] = head.map(u32::from_le_bytes);
    let mut content = vec![0; length as usize];
    stream.read_exact(&mut content).ok()?;
    Some((kind, content))
}

/// A VM that runs, and a place for sockets.
struct Source {
    vmm: Vmm,
    folder: TempDir,
    _kernel: NamedTempFile,
}

impl Source {
    fn start() -> Self {
        let kernel = counter().unwrap();
        let path = kernel.path().to_str().unwrap();
        let mut vmm = Vmm::start(&["--kernel", path, "--memory", "size=64M"]).unwrap();
        vmm.process.wait_for("A", SOON).unwrap();
        Self {
            vmm,
            folder: tempfile::tempdir().unwrap(),
            _kernel: kernel,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Has the VM sent to somebody who answers like this, and returns what came of it.
    fn send_to(
        &self,
        destination: impl FnOnce(UnixStream, &UnixListener) + Send,
    ) -> tests::api::Answer {
        let path = self.path("liar");
        let listener = UnixListener::bind(&path).unwrap();
        let body = json!({"destination_url": format!("unix:{}", path.display())});
        let answer = thread::scope(|scope| {
            let sending = self.vmm.begin("vm.send-migration", &body);
            scope.spawn(|| {
                let (mut control, _) = listener.accept().unwrap();
                control.read_exact(&mut [0; 36]).unwrap();
                destination(control, &listener);
            });
            sending.join().unwrap().unwrap()
        });
        std::fs::remove_file(&path).unwrap();
        answer
    }

    /// What the VM is like, as a source says it first.
    fn offer(&self) -> Value {
        let mut offer = Vec::new();
        self.send_to(|mut control, _| {
            let (kind, content) = read_frame(&mut control).unwrap();
            assert_eq!(kind, Kind::Machine as u32);
            offer = content;
        });
        serde_json::from_slice(&offer).unwrap()
    }

    /// Expects the VM to go on.
    fn expect_running(&mut self) {
        assert_eq!(self.vmm.state().unwrap(), "Running");
        for letter in ["A", "B", "C"] {
            self.vmm.process.wait_for(letter, SOON).unwrap();
        }
    }
}

#[test]
fn source_keeps_a_vm_whose_destination_lies() {
    if !has_kvm() {
        return;
    }
    let mut source = Source::start();
    let say = |kind: Kind| frame(kind as u32, &[]);
    let no = frame(Kind::Refused as u32, b"no");
    let first: [(Vec<u8>, &str); 7] = [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec(), "has sent"),
        (say(Kind::Committed), "Committed, where Ready"),
        (say(Kind::Prepared), "Prepared, where Ready"),
        (frame(Kind::Ready as u32, b"x"), "Ready of 1 bytes"),
        (
            [7, 0, 0, 0, 255, 255, 255, 255].to_vec(),
            "Prepared of 4294967295 bytes",
        ),
        (no.clone(), "does not take it: no"),
        (Vec::new(), "lost"),
    ];
    for (words, expected) in first {
        let answer = source.send_to(|mut control, _| {
            let _ = read_frame(&mut control);
            let _ = control.write_all(&words);
        });
        assert!(
            answer.is_error(&["the VM does not move", expected]),
            "{answer:?}"
        );
        source.expect_running();
    }

    // One that says why it goes, and goes while the source is still sending.
    let answer = source.send_to(|mut control, listener| {
        let _ = read_frame(&mut control);
        control.write_all(&say(Kind::Ready)).unwrap();
        let _lane = listener.accept().unwrap();
        let _ = control.write_all(&no);
    });
    assert!(
        answer.is_error(&["the VM does not move", "does not take it: no"]),
        "{answer:?}"
    );
    source.expect_running();

    // One that says something else than that it has taken the first pages.
    let answer = source.send_to(|mut control, listener| {
        let _ = read_frame(&mut control);
        control.write_all(&say(Kind::Ready)).unwrap();
        take_rounds(listener.accept().unwrap().0, Kind::Prepared);
    });
    assert!(
        answer.is_error(&["the VM does not move", "Prepared, where RoundTaken"]),
        "{answer:?}"
    );
    source.expect_running();

    // One that takes everything, and then says something else than it should.
    let after_all = |answers: Vec<Vec<u8>>| {
        move |mut control: UnixStream, listener: &UnixListener| {
            let _ = read_frame(&mut control);
            control.write_all(&frame(Kind::Ready as u32, &[])).unwrap();
            let (lane, _) = listener.accept().unwrap();
            let drain = thread::spawn(move || take_rounds(lane, Kind::RoundTaken));
            while read_frame(&mut control).is_some_and(|(kind, _)| kind != Kind::State as u32) {}
            let mut answers = answers.into_iter();
            let _ = control.write_all(&answers.next().unwrap());
            for answer in answers {
                let _ = read_frame(&mut control);
                let _ = control.write_all(&answer);
            }
            // The source ends its side when it has heard the end of this one.
            drop(control);
            let _ = drain.join();
        }
    };
    let last: [(Vec<Vec<u8>>, &str); 4] = [
        (vec![say(Kind::Committed)], "Committed, where Prepared"),
        (vec![no.clone()], "does not take it: no"),
        (vec![Vec::new()], "fails"),
        // It runs again once, however often it hears that.
        (
            vec![say(Kind::Prepared), [no.clone(), no].concat()],
            "refuses all the same",
        ),
    ];
    for (answers, expected) in last {
        let answer = source.send_to(after_all(answers));
        assert!(
            answer.is_error(&["the VM does not move", expected]),
            "{answer:?}"
        );
        source.expect_running();
    }
}

/// Takes all that comes on a connection for memory, and gives this answer at the end of each round.
fn take_rounds(mut lane: UnixStream, answer: Kind) {
    let mut hello = [0; 36];
    lane.read_exact(&mut hello).unwrap();
    while let Some((kind, _)) = read_frame(&mut lane) {
        if kind == Kind::RoundEnd as u32 {
            let _ = lane.write_all(&frame(answer as u32, &[]));
        }
    }
}

/// A VMM that waits for a VM, and somebody who comes instead.
struct Destination {
    vmm: Vmm,
    door: PathBuf,
}

impl Destination {
    /// Has it wait, and expects that it waits no longer for what `peer` does, and why.
    fn expect_failure(&self, expected: &str, peer: impl FnOnce(&Path)) {
        let receiving = self.receive();
        peer(&self.door);
        let answer = receiving.join().unwrap().unwrap();
        assert!(answer.is_error(&[expected]), "{expected}: {answer:?}");
        assert_eq!(self.vmm.get("vm.info").unwrap().status, 404);
    }

    fn receive(&self) -> thread::JoinHandle<anyhow::Result<tests::api::Answer>> {
        let body = json!({"receiver_url": format!("unix:{}", self.door.display())});
        let receiving = self.vmm.begin("vm.receive-migration", &body);
        self.vmm.wait_phase("Listening").unwrap();
        receiving
    }

    fn call(door: &Path, words: &[u8]) -> UnixStream {
        let mut stream = UnixStream::connect(door).unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        // It may not hear all of it.
        let _ = stream.write_all(words);
        stream
    }
}

/// Keeps the connections until the other end has closed the first.
fn stay(mut control: UnixStream, lane: UnixStream) {
    thread::spawn(move || {
        let _ = std::io::copy(&mut control, &mut std::io::sink());
        drop(lane);
    });
}

#[test]
fn destination_survives_sources_that_lie() {
    if !has_kvm() {
        return;
    }
    let source = Source::start();
    let offer = source.offer();
    let destination = Destination {
        vmm: Vmm::start(&[]).unwrap(),
        door: source.path("door"),
    };
    let with = |connections: u32, version: u32| {
        let mut offer = offer.clone();
        offer["connections"] = connections.into();
        offer["machine"]["version"] = version.into();
        frame(Kind::Machine as u32, offer.to_string().as_bytes())
    };
    let version = u32::try_from(offer["machine"]["version"].as_u64().unwrap()).unwrap();
    let good = with(1, version);
    let firsts: [(Vec<u8>, &str); 9] = [
        (frame(Kind::State as u32, b"{}"), "State, where Machine"),
        (frame(99, b""), "of the kind 99"),
        (
            [1, 0, 0, 0, 255, 255, 255, 255].to_vec(),
            "Machine of 4294967295 bytes",
        ),
        (frame(Kind::Machine as u32, b"{]"), "makes no sense"),
        (frame(Kind::Machine as u32, b"{}"), "makes no sense"),
        (with(1, 99), "version 99"),
        (with(0, version), "0 connections"),
        (with(17, version), "17 connections"),
        (
            frame(Kind::Refused as u32, b"after all\x1b[2J"),
            "gives up: after all [2J",
        ),
    ];
    for (words, expected) in firsts {
        destination.expect_failure(expected, |door| {
            Destination::call(door, &[hello(CONTROL), words].concat());
        });
    }
    // Announced, and not sent: it is not waited for when the connection is lost, nor is there memory for it.
    destination.expect_failure("lost", |door| {
        Destination::call(
            door,
            &[
                hello(CONTROL),
                frame(1, &[])[..4].to_vec(),
                vec![0, 0, 0, 4],
            ]
            .concat(),
        );
    });

    let ready = |door: &Path| {
        let mut control = Destination::call(door, &[hello(CONTROL), good.clone()].concat());
        assert_eq!(
            read_frame(&mut control),
            Some((Kind::Ready as u32, Vec::new()))
        );
        control
    };
    let page = |address: u64, bits: u64, pages: usize| {
        let mut content = address.to_le_bytes().to_vec();
        content.extend(bits.to_le_bytes());
        content.extend([0; 8]);
        content.extend(vec![1; pages << 12]);
        frame(PAGES, &content)
    };
    let lanes: [(Vec<u8>, &str); 6] = [
        (page(64 << 20, 1, 1), "where there is no RAM"),
        (page(u64::MAX - 0xfff, 3, 2), "where there is no RAM"),
        (page(0, 3, 1), "than it announced"),
        (frame(PAGES, &[0; 8]), "without a header"),
        (frame(Kind::Commit as u32, &[]), "Commit among memory"),
        ([3, 0, 0, 0, 255, 255, 255, 127].to_vec(), "Pages of"),
    ];
    for (words, expected) in lanes {
        destination.expect_failure(expected, |door| {
            let control = ready(door);
            let lane = Destination::call(door, &[hello(MEMORY), words].concat());
            stay(control, lane);
        });
    }
    let states: [(Vec<u8>, &str); 5] = [
        (
            frame(Kind::DeviceData as u32, &[0; 5]),
            "a device that there is not",
        ),
        (
            frame(Kind::DeviceData as u32, &[0; 3]),
            "a device that there is not",
        ),
        (frame(Kind::State as u32, b"{}"), "makes no sense"),
        (frame(Kind::Commit as u32, &[]), "Commit among state"),
        (frame(Kind::Machine as u32, b"{}"), "Machine among state"),
    ];
    for (words, expected) in states {
        destination.expect_failure(expected, |door| {
            let mut control = ready(door);
            let lane = Destination::call(door, &hello(MEMORY));
            control.write_all(&words).unwrap();
            stay(control, lane);
        });
    }

    // One that says nothing is waited for until somebody cancels that. Everything else goes on.
    for say_hello in [false, true] {
        let receiving = destination.receive();
        let mut control =
            Destination::call(&destination.door, if say_hello { &good[..0] } else { &[] });
        if say_hello {
            control.write_all(&hello(CONTROL)).unwrap();
            destination.vmm.wait_phase("Preparing").unwrap();
        }
        for (endpoint, status) in [("vmm.ping", 200), ("vm.migration", 200), ("vm.info", 404)] {
            assert_eq!(destination.vmm.get(endpoint).unwrap().status, status);
        }
        let cancelled = request(&destination.vmm.socket, "DELETE", "vm.migration", "").unwrap();
        assert_eq!(cancelled, DONE);
        let answer = receiving.join().unwrap().unwrap();
        assert!(
            answer.is_error(&["vm.receive-migration was cancelled"]),
            "{answer:?}"
        );
    }
}

#[test]
fn destination_waits_on_whatever_strangers_say() {
    if !has_kvm() {
        return;
    }
    let source = Source::start();
    let door = source.path("door");
    let destination = Destination {
        vmm: Vmm::start(&[]).unwrap(),
        door: door.clone(),
    };
    let old = hello(CONTROL);
    destination.expect_failure("lost", |door| drop(Destination::call(door, &old)));
    let receiving = destination.receive();
    // A migration that has ended, said again, keeps nobody out.
    let mut replayed = Destination::call(&door, &old);
    let (kind, reason) = read_frame(&mut replayed).unwrap();
    assert_eq!(kind, Kind::Refused as u32);
    assert_eq!(reason, b"this migration has ended");
    for garbage in [
        &b"GET / HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n\r\n"[..],
        &[0xff; 4096],
        b"out",
    ] {
        drop(Destination::call(&door, garbage));
    }
    // Versions 7 to 9.
    let mut newer = hello(CONTROL);
    newer[8] = 9;
    newer[12] = 7;
    let mut stream = Destination::call(&door, &newer);
    let (kind, reason) = read_frame(&mut stream).unwrap();
    assert_eq!(kind, Kind::Refused as u32);
    let reason = String::from_utf8(reason).unwrap();
    assert!(reason.contains("speaks versions 7 to 9"), "{reason}");
    // Memory of a migration that there is not, and a question about one.
    drop(Destination::call(&door, &hello(MEMORY)));
    let mut asking = Destination::call(&door, &hello(QUESTION));
    assert_eq!(read_frame(&mut asking), Some((11, Vec::new())), "unknown");
    // More of them than are heard, who say nothing.
    let crowd: Vec<_> = (0..100).map(|_| Destination::call(&door, &[])).collect();
    assert_eq!(destination.vmm.get("vmm.ping").unwrap().status, 200);
    assert_eq!(
        destination.vmm.wait_phase("Listening").unwrap()["operation"],
        "Receive"
    );
    drop(crowd);

    // Whoever is among them is heard when they have gone.
    let body = json!({"destination_url": format!("unix:{}", door.display())});
    let deadline = std::time::Instant::now() + SOON;
    while source
        .vmm
        .put("vm.send-migration", &body.to_string())
        .unwrap()
        != DONE
    {
        assert!(std::time::Instant::now() < deadline);
    }
    assert_eq!(receiving.join().unwrap().unwrap(), DONE);
    assert_eq!(destination.vmm.state().unwrap(), "Running");
}
