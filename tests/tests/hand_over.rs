//! A VM goes to another process of its host as it is: nothing is copied, and the servers of its devices do not notice.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::OwnedFd;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde_json::json;
use tempfile::TempDir;
use tests::api::{Answer, DONE, Vmm, request};
use tests::lab::{Process, SOON};
use tests::outrigger::{has_kvm, serve_demo};
use tests::saved::expect_same;
use tests::tapped_socket::TappedSocket;
use tests::tiny::demo::WRONG;
use tests::tiny::disk::{END, FAILED};
use tests::travels::Luggage;

/// A VM with a disk and a demo device, both at work, and with memory.
struct Guest {
    vmm: Vmm,
    disk: DiskServer,
    demo: TappedSocket,
    /// What the guest says, wherever it is.
    console: PathBuf,
    folder: TempDir,
    luggage: Luggage,
    _server: Process,
}

impl Guest {
    fn start() -> Self {
        let luggage = Luggage::pack().unwrap();
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("demo");
        let server = serve_demo(&socket).unwrap();
        let demo = TappedSocket::before(&socket).unwrap();
        let console = folder.path().join("console");
        let mut arguments = luggage.arguments(demo.path());
        arguments.extend(["--serial".into(), format!("file={}", console.display())]);
        let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
        let vmm = Vmm::start(&arguments).unwrap();
        let guest = Self {
            disk: DiskServer::of(luggage.image()),
            vmm,
            demo,
            console,
            folder,
            luggage,
            _server: server,
        };
        guest.expect_work();
        guest
    }

    /// Hands it over to a new process.
    fn hand_over(&mut self) {
        let next = Vmm::start(&[]).unwrap();
        let (url, receiving) = self.receive(&next);
        assert_eq!(self.send(&url), DONE);
        assert_eq!(receiving.join().unwrap().unwrap(), DONE);
        let last = std::mem::replace(&mut self.vmm, next);
        assert!(ends(&last.process), "who has handed it over does not end");
        assert!(!self.disk.has_ended());
    }

    /// Has a VMM wait for it.
    fn receive(&self, next: &Vmm) -> (String, JoinHandle<anyhow::Result<Answer>>) {
        let url = format!("unix:{}", self.folder.path().join("there").display());
        let receiving = next.begin("vm.receive-migration", &json!({"receiver_url": url}));
        next.wait_phase("Listening").unwrap();
        (url, receiving)
    }

    fn send(&self, url: &str) -> Answer {
        let request = json!({"destination_url": url, "local": true});
        self.vmm
            .put("vm.send-migration", &request.to_string())
            .unwrap()
    }

    /// All that it has said, in the order in which it has to come.
    fn said(&self) -> String {
        let said = fs::read_to_string(&self.console).unwrap_or_default();
        let is_well = !said.bytes().any(|byte| [WRONG, FAILED].contains(&byte));
        let letters = said.chars().filter(char::is_ascii_lowercase);
        let is_in_order = ('a'..='z').cycle().zip(letters).all(|(a, b)| a == b);
        assert!(is_well && is_in_order, "{said}");
        said
    }

    /// Waits until it has used both devices once more.
    fn expect_work(&self) {
        let work = || {
            let said = self.said();
            let letters = said.bytes().filter(u8::is_ascii_lowercase).count();
            (letters, said.bytes().filter(|byte| *byte == END).count())
        };
        let before = work();
        let deadline = Instant::now() + SOON;
        loop {
            let now = work();
            if now.0 > before.0 && now.1 > before.1 {
                return;
            }
            assert!(Instant::now() < deadline, "it only says {}", self.said());
            thread::sleep(Duration::from_millis(1));
        }
    }
}

/// The process that serves the disk.
struct DiskServer(OwnedFd);

impl DiskServer {
    /// The one that has this image, which may be about to start.
    fn of(image: &Path) -> Self {
        let image = image.to_string_lossy();
        let is_it = |pid: &Pid| {
            let arguments = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            arguments.starts_with("outrigger\0serve\0disk\0") && arguments.contains(&*image)
        };
        let deadline = Instant::now() + SOON;
        loop {
            let processes = fs::read_dir("/proc").unwrap().flatten();
            let numbers = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
            if let Some(pid) = numbers.filter_map(Pid::from_raw).find(is_it) {
                return Self(pidfd_open(pid, PidfdFlags::empty()).unwrap());
            }
            assert!(Instant::now() < deadline, "nobody serves the disk");
            thread::yield_now();
        }
    }

    fn has_ended(&self) -> bool {
        ends_within(&self.0, Duration::ZERO)
    }
}

/// Whether a process ends soon. Others may still have its output.
fn ends(process: &Process) -> bool {
    match Pid::from_raw(process.id()).map(|pid| pidfd_open(pid, PidfdFlags::empty())) {
        Some(Ok(pidfd)) => ends_within(&pidfd, SOON),
        _ => true,
    }
}

fn ends_within(pidfd: &OwnedFd, limit: Duration) -> bool {
    let mut fds = [PollFd::new(pidfd, PollFlags::IN)];
    poll(&mut fds, Some(&Timespec::try_from(limit).unwrap())).unwrap() > 0
}

#[test]
fn vm_at_work_goes_there_and_on() {
    if !has_kvm() {
        return;
    }
    let mut guest = Guest::start();
    for _ in 0..3 {
        guest.hand_over();
        assert_eq!(guest.vmm.state().unwrap(), "Running");
        guest.expect_work();
    }
    guest.luggage.check_image().unwrap();
    // The server is the last one's now, as if that had started it.
    assert_eq!(guest.vmm.put("vmm.shutdown", "").unwrap(), DONE);
    assert!(ends(&guest.vmm.process));
    assert!(guest.disk.has_ended());
}

#[test]
fn servers_hear_nothing_and_memory_stays() {
    if !has_kvm() {
        return;
    }
    let mut guest = Guest::start();
    guest.vmm.pause().unwrap();
    let [before, after] = ["before", "after"].map(|name| guest.folder.path().join(name));
    assert_eq!(guest.vmm.snapshot(&before).unwrap(), DONE);
    let messages = guest.demo.bytes();
    guest.hand_over();
    guest.hand_over();
    assert_eq!(guest.vmm.state().unwrap(), "Paused");
    assert_eq!(guest.demo.bytes(), messages);
    assert_eq!(guest.vmm.snapshot(&after).unwrap(), DONE);
    expect_same(&before, &after, &["tsc"]);
    assert_eq!(guest.vmm.put("vm.resume", "").unwrap(), DONE);
    guest.expect_work();
    assert!(guest.demo.bytes() > messages);
}

#[test]
fn vm_goes_on_when_its_destination_does_not() {
    if !has_kvm() {
        return;
    }
    let mut guest = Guest::start();
    for stage in [Stage::Offered, Stage::Left] {
        let path = guest.folder.path().join(format!("{stage:?}"));
        let listener = UnixListener::bind(&path).unwrap();
        let destination = thread::spawn(move || end_at(&listener, stage));
        let answer = guest.send(&format!("unix:{}", path.display()));
        destination.join().unwrap();
        assert!(answer.is_error(&["does not move"]), "{answer:?}");
        guest.expect_work();
    }
    let answer = guest.send("tcp:127.0.0.1:9");
    assert!(answer.is_error(&["unix:PATH"]), "{answer:?}");
    assert!(!guest.disk.has_ended());
    // One that is there, and is not to have it after all.
    let next = Vmm::start(&[]).unwrap();
    let (_, receiving) = guest.receive(&next);
    let cancelled = request(&next.socket, "DELETE", "vm.migration", "");
    assert_eq!(cancelled.unwrap().status, 204);
    assert!(receiving.join().unwrap().unwrap().status >= 400);
    guest.expect_work();
    guest.hand_over();
    guest.expect_work();
}

/// How far a destination comes that ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// It has been told of the VM.
    Offered,
    /// It has been given everything.
    Left,
}

/// Takes part in a migration up to a stage, as a process that is killed then.
fn end_at(listener: &UnixListener, stage: Stage) {
    /// The kinds of frames.
    const READY: u32 = 2;
    const STATE: u32 = 6;
    let (mut stream, _) = listener.accept().unwrap();
    let mut hello = [0; 36];
    stream.read_exact(&mut hello).unwrap();
    frame(&mut stream);
    if stage == Stage::Offered {
        return;
    }
    let [ready, none] = [READY, 0].map(u32::to_le_bytes);
    stream.write_all(&[ready, none].concat()).unwrap();
    // Batches of descriptors are between the two, each with a byte that says how many they are.
    let mut head = [0; 8];
    stream.read_exact(&mut head).unwrap();
    while head[..4] != STATE.to_le_bytes() {
        head.rotate_left(1);
        stream.read_exact(&mut head[7..]).unwrap();
    }
    let length = u32::from_le_bytes([head[4], head[5], head[6], head[7]]);
    let mut state = vec![0; length as usize];
    stream.read_exact(&mut state).unwrap();
}

/// Reads a frame.
fn frame(stream: &mut UnixStream) {
    let mut head = [0; 8];
    stream.read_exact(&mut head).unwrap();
    let length = u32::from_le_bytes([head[4], head[5], head[6], head[7]]);
    let mut rest = vec![0; length as usize];
    stream.read_exact(&mut rest).unwrap();
}
