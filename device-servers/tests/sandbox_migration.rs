//! A disk and a network card migrate between servers that are in their sandboxes. Each server is a process of its own: this
//! program, started again with what it is to serve. (The test harness has threads, which nothing that enters a sandbox may
//! have.)

#![expect(clippy::unwrap_used, reason = "a test panics when it fails")]

#[path = "support/card.rs"]
mod card;
#[path = "support/drive.rs"]
mod drive;
#[path = "../../tests/src/skipped.rs"]
#[expect(unreachable_pub, reason = "it is reachable where it belongs")]
mod skipped;
mod support;

use std::env;
use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command};

use card::{ANNOUNCE, CONTROL, Card, HEADER, MERGEABLE, Peer, number, packet};
use device_servers::sandbox::{self, Role};
use device_servers::{disk, net};
use drive::{Image, Load, USUAL};
use skipped::skip;
use support::{BUFFERS, EVENT_IDX, Machine, Ram};
use vfio_user_client::{ConnError, DeviceState, LoggingRange};
use vfio_user_server::{Device, Ended, Server};

/// What a process is to serve, and the path or the name that goes with it.
const SERVES: &str = "SANDBOX_SERVES";
const OF: &str = "SANDBOX_OF";

fn main() {
    if let Ok(what) = env::var(SERVES) {
        return serve(&what, &env::var_os(OF).unwrap());
    }
    let tests: [(&str, fn()); 3] = [
        ("a disk migrates", a_disk_migrates),
        ("a network card migrates", a_network_card_migrates),
        (
            "a network card migrates to another tap",
            a_network_card_migrates_to_another_tap,
        ),
    ];
    println!("\nrunning {} tests", tests.len());
    for (name, test) in tests {
        test();
        println!("test {name} ... ok");
    }
}

/// What a server does. Its standard input is the connection.
fn serve(what: &str, of: &OsStr) {
    match what {
        "disk" | "incoming disk" => {
            let options = disk::Options {
                incoming: what != "disk",
                ..disk::Options::new(of)
            };
            let opened = disk::open(&options).unwrap();
            sandbox::enter(Role::Disk).unwrap();
            until_closed(opened.server().unwrap());
        }
        "card" => {
            // Standard output is in place of a tap.
            let tap = io::stdout().as_fd().try_clone_to_owned().unwrap();
            let opened = net::open_with(&card::options(), vec![tap]).unwrap();
            sandbox::enter(Role::Net).unwrap();
            until_closed(opened.server().unwrap());
        }
        _ => {
            let options = net::Options {
                tap: of.to_str().map(str::to_owned),
                ..card::options()
            };
            let opened = net::open(&options).unwrap();
            sandbox::enter(Role::Net).unwrap();
            until_closed(opened.server().unwrap());
        }
    }
}

fn until_closed<D: Device>(mut server: Server<D>) {
    let stream = io::stdin().as_fd().try_clone_to_owned().unwrap();
    assert!(matches!(server.serve(stream.into()), Ok(Ended::Closed)));
}

/// A machine with a device whose server is in its sandbox.
struct Sandboxed {
    machine: Machine,
    server: Child,
}

impl Sandboxed {
    fn new(what: &str, of: impl AsRef<OsStr>, output: Option<OwnedFd>, ram: Ram) -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut command = Command::new(env::current_exe().unwrap());
        command.env(SERVES, what).env(OF, of);
        command.stdin(OwnedFd::from(theirs));
        if let Some(output) = output {
            command.stdout(output);
        }
        let server = command.spawn().unwrap();
        // This process must not hold the other end.
        drop(command);
        let mut machine = Machine::connect(ours, ram);
        machine.enable_msix();
        Self { machine, server }
    }

    /// Ends the server, which has done nothing that its sandbox forbids.
    fn end(self) {
        let Self {
            machine,
            mut server,
        } = self;
        machine.end();
        let status = server.wait().unwrap();
        assert!(status.success(), "{status}");
    }
}

/// Has a device take over what another has saved.
fn resume(target: &Machine, state: &[u8]) {
    target.set_state(DeviceState::Resuming).unwrap();
    for piece in state.chunks(1000) {
        target.client.migration_write(piece).unwrap();
    }
    target.set_state(DeviceState::Stop).unwrap();
}

fn log_writes(machine: &Machine) {
    let all = [LoggingRange {
        iova: support::BASE,
        length: support::SIZE,
    }];
    machine.client.start_dma_logging(4096, &all).unwrap();
}

fn is_busy(result: &Result<(), ConnError>) -> bool {
    matches!(result, Err(ConnError::Refused { errno: 16, .. }))
}

fn a_disk_migrates() {
    let image = Image::new();
    let ram = Ram::new();
    let start = |what| Sandboxed::new(what, &image.path, None, ram.clone());
    let mut source = start("disk");
    let mut queue = source.machine.start(USUAL | EVENT_IDX, 1, 256).remove(0);
    let mut load = Load::new(5, 0..1000, BUFFERS, 60);
    for round in 0..3 {
        log_writes(&source.machine);
        load.run(&mut queue, &ram, 100);
        load.fill(&mut queue, &ram);
        assert!(!source.machine.dirty_pages().is_empty());
        let target = start("incoming disk");
        source.machine.set_state(DeviceState::StopCopy).unwrap();
        let mut state = source.machine.saved();
        source.machine.client.stop_dma_logging().unwrap();
        if round == 1 {
            // Cancelled: it locks the image again, and the other end cannot run.
            source.machine.set_state(DeviceState::Running).unwrap();
            load.run(&mut queue, &ram, 100);
            resume(&target.machine, &state);
            assert!(is_busy(&target.machine.set_state(DeviceState::Running)));
            target.machine.set_state(DeviceState::Resuming).unwrap();
            source.machine.set_state(DeviceState::StopCopy).unwrap();
            state = source.machine.saved();
        }
        resume(&target.machine, &state);
        let vector = queue.vector.clone().unwrap();
        queue.move_to(&target.machine);
        // Interrupts that the source has sent count.
        let mut count = [0; 8];
        if rustix::io::read(&*vector, &mut count).is_ok() {
            rustix::io::write(queue.vector.as_ref().unwrap(), &count).unwrap();
        }
        target.machine.set_state(DeviceState::Running).unwrap();
        assert!(is_busy(&source.machine.set_state(DeviceState::Running)));
        std::mem::replace(&mut source, target).end();
    }
    load.run(&mut queue, &ram, 100);
    load.finish(&mut queue, &ram);
    source.end();
    load.check(&image);
}

/// Moves a card between two servers, and returns it where it runs next with the one in which it was.
fn move_card(card: &mut Card, server: Child, target: Sandboxed) -> (Sandboxed, Child) {
    let source = &card.machine;
    source.set_state(DeviceState::StopCopy).unwrap();
    let state = source.saved();
    source.client.stop_dma_logging().unwrap();
    // Cancelled, and then done all the same.
    source.set_state(DeviceState::Running).unwrap();
    source.set_state(DeviceState::StopCopy).unwrap();
    assert_eq!(source.saved().len(), state.len());
    resume(&target.machine, &state);
    let machine = card.move_to(target.machine);
    card.machine.set_state(DeviceState::Running).unwrap();
    // It is told to announce itself, and does.
    card.await_config();
    assert_eq!(card.command(3, 0, &[]), 0);
    (Sandboxed { machine, server }, target.server)
}

const FEATURES: u64 = MERGEABLE | EVENT_IDX | CONTROL | ANNOUNCE;

fn a_network_card_migrates() {
    let ram = Ram::new();
    let start = || {
        let (theirs, peer) = Peer::pair();
        (Sandboxed::new("card", "", Some(theirs), ram.clone()), peer)
    };
    let (Sandboxed { machine, server }, peer) = start();
    let mut card = Card::start(machine, 1, FEATURES);
    log_writes(&card.machine);
    card.fill(0, 64, 2048);
    card.send(0, &packet(1, 100));
    assert_eq!(number(&peer.receive()), 1);
    peer.send(&packet(2, 3000));
    assert_eq!(number(&card.receive(0)), 2);
    assert!(!card.machine.dirty_pages().is_empty());

    let (target, peer) = start();
    let (source, server) = move_card(&mut card, server, target);
    source.end();
    // The server's own announcements, of which there are five.
    for _ in 0..5 {
        assert_eq!(peer.receive()[HEADER + 12..][..2], [0x80, 0x35]);
    }
    card.send(0, &packet(3, 100));
    assert_eq!(number(&peer.receive()), 3);
    peer.send(&packet(4, 3000));
    assert_eq!(number(&card.receive(0)), 4);
    let machine = card.machine;
    Sandboxed { machine, server }.end();
}

/// A tap that stays until this goes.
struct Tap(String);

impl Tap {
    fn new(number: u32) -> Option<Self> {
        let name = format!("orbox{number}-{}", std::process::id() % 100_000);
        let made = ip(&["tuntap", "add", "dev", &name, "mode", "tap"]);
        if !made {
            skip("no tap can be made (CAP_NET_ADMIN, /dev/net/tun, `ip`)");
            return None;
        }
        let tap = Self(name);
        assert!(ip(&["link", "set", &tap.0, "up"]));
        Some(tap)
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        ip(&["link", "delete", &self.0]);
    }
}

fn ip(words: &[&str]) -> bool {
    let output = Command::new("ip").args(words).output();
    output.is_ok_and(|output| output.status.success())
}

/// A tap is told of the driver's offloads, and says whether its link is up.
fn a_network_card_migrates_to_another_tap() {
    let (Some(first), Some(second)) = (Tap::new(1), Tap::new(2)) else {
        return;
    };
    let ram = Ram::new();
    let start = |tap: &Tap| Sandboxed::new("tap", &tap.0, None, ram.clone());
    let Sandboxed { machine, server } = start(&first);
    let mut card = Card::start(machine, 1, FEATURES | card::GUEST_CSUM);
    log_writes(&card.machine);
    card.send(0, &packet(1, 100));
    let (source, server) = move_card(&mut card, server, start(&second));
    source.end();
    card.send(0, &packet(2, 100));
    assert!(ip(&["link", "set", &second.0, "down"]));
    card.await_config();
    assert_eq!(card.config().1 & 1, 0);
    let machine = card.machine;
    Sandboxed { machine, server }.end();
}
