//! A VM goes to another process of its host as it is: nothing is copied, and the servers of its devices do not notice.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use guest::INTX;
use iced_x86::code_asm::{dword_ptr, ebp, ebx, esi};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::OwnedFd;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde_json::{Value, json};
use tempfile::TempDir;
use tests::api::{Answer, DONE, Vmm, request};
use tests::lab::{Process, SOON};
use tests::outrigger::{has_kvm, serve_demo};
use tests::saved::expect_same;
use tests::tapped_socket::TappedSocket;
use tests::tiny::demo::WRONG;
use tests::tiny::disk::{END, FAILED};
use tests::tiny::{self, FIRST_DEVICE, SCRATCH};
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
        hand_over(&mut self.vmm, self.folder.path());
        assert!(!self.disk.has_ended());
    }

    /// Takes a snapshot, when the devices have done what they had to do for a guest that stands still.
    fn snapshot_of_rest(&self) -> PathBuf {
        let state = |path: &Path| {
            let machine = fs::read(path.join("machine.json")).unwrap();
            let machine: Value = serde_json::from_slice(&machine).unwrap();
            let ram = fs::read(path.join("ram")).unwrap();
            (machine["state"]["pci"].clone(), ram)
        };
        let deadline = Instant::now() + SOON;
        let (mut last, mut number) = (None, 0);
        loop {
            number += 1;
            let path = self.folder.path().join(format!("rest-{number}"));
            assert_eq!(self.vmm.snapshot(&path).unwrap(), DONE);
            let now = Some(state(&path));
            if now == last {
                return path;
            }
            assert!(Instant::now() < deadline, "the devices do not come to rest");
            last = now;
        }
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

/// Hands a VM over to a new process.
fn hand_over(vmm: &mut Vmm, folder: &Path) {
    let next = Vmm::start(&[]).unwrap();
    let (url, receiving) = receive(&next, folder);
    assert_eq!(send(vmm, &url), DONE);
    assert_eq!(receiving.join().unwrap().unwrap(), DONE);
    let last = std::mem::replace(vmm, next);
    assert!(ends(&last.process), "who has handed it over does not end");
}

/// Has a VMM wait for a VM.
fn receive(next: &Vmm, folder: &Path) -> (String, JoinHandle<anyhow::Result<Answer>>) {
    let url = format!("unix:{}", folder.join("there").display());
    let receiving = next.begin("vm.receive-migration", &json!({"receiver_url": url}));
    next.wait_phase("Listening").unwrap();
    (url, receiving)
}

fn send(vmm: &Vmm, url: &str) -> Answer {
    let request = json!({"destination_url": url, "local": true});
    vmm.put("vm.send-migration", &request.to_string()).unwrap()
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
            thread::sleep(Duration::from_millis(2));
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
    let before = guest.snapshot_of_rest();
    let after = guest.folder.path().join("after");
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
fn interrupt_line_goes_along() {
    if !has_kvm() {
        return;
    }
    /// Config space: the Command register and BAR 0.
    const COMMAND: u32 = FIRST_DEVICE + 0x04;
    const BAR0: u32 = FIRST_DEVICE + 0x10;
    /// Counts interrupts.
    const COUNT: u32 = SCRATCH + 0x100;
    let intx = i32::try_from(INTX).unwrap();
    let kernel = tiny::guest(|code| {
        let [mut again, mut wait, mut served] = std::array::from_fn(|_| code.create_label());
        code.allow_interrupts()?;
        code.route_intx()?;
        // Memory space and bus master.
        code.store(COMMAND, 0x6)?;
        code.mov(ebp, dword_ptr(BAR0))?;
        code.xor(ebx, ebx)?;
        code.xor(esi, esi)?;
        code.set_label(&mut again)?;
        code.add(ebx, 3)?;
        code.mov(dword_ptr(ebp + intx), 1)?;
        code.set_label(&mut wait)?;
        code.pause()?;
        code.cmp(dword_ptr(COUNT), ebx)?;
        code.jne(wait)?;
        code.test(ebx, 0x3)?;
        code.jnz(again)?;
        code.print(b'.')?;
        code.jmp(again)?;
        // The third interrupt of a round lowers the line; until then it comes again and again. One may be for nothing.
        code.begin_handler(0x60)?;
        code.cmp(dword_ptr(ebp + intx), 0)?;
        code.je(served)?;
        code.inc(dword_ptr(COUNT))?;
        code.inc(esi)?;
        code.cmp(esi, 3)?;
        code.jne(served)?;
        code.xor(esi, esi)?;
        code.mov(dword_ptr(ebp + intx), 0)?;
        code.set_label(&mut served)?;
        code.end_handler()
    })
    .unwrap();
    let folder = tempfile::tempdir().unwrap();
    let [socket, console] = ["demo", "console"].map(|name| folder.path().join(name));
    let _server = serve_demo(&socket).unwrap();
    let mut vmm = Vmm::start(&[
        "--kernel",
        kernel.path().to_str().unwrap(),
        "--memory",
        "size=64M",
        "--user-device",
        &format!("id=demo,socket={}", socket.display()),
        "--serial",
        &format!("file={}", console.display()),
    ])
    .unwrap();
    let expect_more = || {
        let rounds = || fs::metadata(&console).map_or(0, |file| file.len());
        let (before, deadline) = (rounds(), Instant::now() + SOON);
        while rounds() < before + 2 {
            assert!(Instant::now() < deadline, "no interrupts come");
            thread::sleep(Duration::from_millis(1));
        }
    };
    for _ in 0..6 {
        expect_more();
        hand_over(&mut vmm, folder.path());
    }
    expect_more();
}

#[test]
fn vm_goes_on_when_its_destination_does_not() {
    if !has_kvm() {
        return;
    }
    let mut guest = Guest::start();
    for stage in [Stage::Offered, Stage::Left, Stage::Ordered] {
        let path = guest.folder.path().join(format!("{stage:?}"));
        let listener = UnixListener::bind(&path).unwrap();
        let destination = thread::spawn(move || end_at(&listener, stage));
        let request = json!({"destination_url": format!("unix:{}", path.display()), "local": true});
        let sending = guest.vmm.begin("vm.send-migration", &request);
        destination.join().unwrap();
        let answer = sending.join().unwrap().unwrap();
        if stage == Stage::Ordered {
            assert!(answer.is_error(&["stands still here"]), "{answer:?}");
            // Nobody but its user knows that it does not run there.
            let resolved = guest.vmm.remote(&["resolve", "--run"]).unwrap();
            assert_eq!(resolved.status.code(), Some(0));
        } else {
            assert!(answer.is_error(&["does not move"]), "{answer:?}");
        }
        guest.expect_work();
    }
    let answer = send(&guest.vmm, "tcp:127.0.0.1:9");
    assert!(answer.is_error(&["unix:PATH"]), "{answer:?}");
    assert!(!guest.disk.has_ended());
    // One that is there, and is not to have it after all.
    let next = Vmm::start(&[]).unwrap();
    let (_, receiving) = receive(&next, guest.folder.path());
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
    /// It has been told to run it.
    Ordered,
}

/// Takes part in a migration up to a stage, as a process that is killed then.
fn end_at(listener: &UnixListener, stage: Stage) {
    /// The kinds of frames.
    const READY: u32 = 2;
    const STATE: u32 = 6;
    const PREPARED: u32 = 7;
    const COMMIT: u32 = 8;
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
    if stage == Stage::Left {
        return;
    }
    let [prepared, none] = [PREPARED, 0].map(u32::to_le_bytes);
    stream.write_all(&[prepared, none].concat()).unwrap();
    // More descriptors, and the order.
    while head != [COMMIT, 0].map(u32::to_le_bytes).concat()[..] {
        head.rotate_left(1);
        stream.read_exact(&mut head[7..]).unwrap();
    }
}

/// Reads a frame.
fn frame(stream: &mut UnixStream) {
    let mut head = [0; 8];
    stream.read_exact(&mut head).unwrap();
    let length = u32::from_le_bytes([head[4], head[5], head[6], head[7]]);
    let mut rest = vec![0; length as usize];
    stream.read_exact(&mut rest).unwrap();
}
