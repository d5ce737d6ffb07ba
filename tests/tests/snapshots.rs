//! Snapshots: a paused VM's state goes into a directory, and a VM in another process goes on from there.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::fs;
use std::path::Path;

use iced_x86::code_asm::{dword_ptr, esp};
use rustix::process::Signal;
use tests::api::{DONE, Vmm};
use tests::lab::{Process, SOON};
use tests::outrigger::{self, has_kvm, serve_demo};
use tests::saved::expect_same;
use tests::tiny::counter::counter;
use tests::tiny::demo::{say_dots, use_demo};
use tests::tiny::disk::{BEGIN, END, FAILED, Job, disk_guest_beside};
use tests::tiny::{self, FIRST_DEVICE, LOCAL_APIC, SCRATCH};

/// Where the second CPU of guests has its stack.
const SECOND_STACK: u32 = SCRATCH + 0x4000;

#[test]
fn guest_goes_on_in_another_process() {
    if !has_kvm() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let [first, second] = ["first", "second"].map(|name| folder.path().join(name));
    let kernel = counter().unwrap();
    let kernel = kernel.path().to_str().unwrap();
    let mut vmm = Vmm::start(&["--kernel", kernel, "--memory", "size=64M"]).unwrap();
    vmm.process.wait_for("ready", SOON).unwrap();
    vmm.process.wait_for("Z", SOON).unwrap();
    vmm.pause().unwrap();
    assert_eq!(vmm.snapshot(&first).unwrap(), DONE);
    assert_eq!(vmm.state().unwrap(), "Paused");
    let said = said_until_the_end(vmm);

    let vmm = Vmm::start(&[]).unwrap();
    assert_eq!(vmm.restore(&first, false, &[]).unwrap(), DONE);
    assert_eq!(vmm.state().unwrap(), "Paused");
    assert_eq!(vmm.snapshot(&second).unwrap(), DONE);
    expect_same(&first, &second, &["tsc"]);
    assert_eq!(vmm.put("vm.resume", "").unwrap(), DONE);
    let mut vmm = vmm;
    vmm.process.wait_for("Z", SOON).unwrap();
    let all: String = [said, said_until_the_end(vmm)].concat();
    let alphabet = ('A'..='Z').cycle();
    assert!(all.len() > 26);
    assert!(all.chars().eq(alphabet.take(all.len())), "{all}");
}

/// Ends a VMM, and returns the letters that its guest has said.
fn said_until_the_end(mut vmm: Vmm) -> String {
    assert_eq!(vmm.put("vmm.shutdown", "").unwrap(), DONE);
    vmm.process.wait(SOON).unwrap();
    let lines = vmm.process.lines().iter().map(|line| line.text.trim_end());
    lines.filter(|line| line.len() == 1).collect()
}

/// Interrupts of the timer that have come, and their vector.
const TICKS: u32 = SCRATCH + 0x104;
const TIMER: u8 = 0x70;

#[test]
fn interrupts_and_timers_go_on() {
    if !has_kvm() {
        return;
    }
    let kernel = tiny::guest(|code| {
        code.allow_interrupts()?;
        // The local APIC's timer: periodic, of so many cycles of its clock by one.
        for (register, value) in [
            (0x3e0, 0xb),
            (0x320, 1 << 17 | u32::from(TIMER)),
            (0x380, 20_000_000),
        ] {
            code.store(LOCAL_APIC + register, value)?;
        }
        use_demo(code, FIRST_DEVICE, 0, say_dots)?;
        code.begin_handler(TIMER)?;
        code.inc(dword_ptr(TICKS))?;
        code.print_line("tick")?;
        code.end_handler()
    })
    .unwrap();
    let folder = tempfile::tempdir().unwrap();
    let [first, second] = ["first", "second"].map(|name| folder.path().join(name));
    let [old, new] = ["old", "new"].map(|name| folder.path().join(name));
    let server = serve_demo(&old).unwrap();
    let mut vmm = Vmm::start(&[
        "--kernel",
        kernel.path().to_str().unwrap(),
        "--memory",
        "size=64M",
        "--user-device",
        &format!("id=demo,socket={}", old.display()),
    ])
    .unwrap();
    let both = |vm: &mut Process| {
        for word in [".", "tick", ".", "tick"] {
            vm.wait_for(word, SOON).unwrap();
        }
        let said = vm.lines().iter();
        assert!(said.clone().all(|line| line.text != "?"), "{said:?}");
    };
    both(&mut vmm.process);
    vmm.pause().unwrap();
    assert_eq!(vmm.snapshot(&first).unwrap(), DONE);
    vmm.process.signal(Signal::KILL).unwrap();
    vmm.process.wait(SOON).unwrap();
    drop(server);

    let _server = serve_demo(&new).unwrap();
    let mut vmm = Vmm::start(&[]).unwrap();
    let places = [("demo", new.as_path())];
    assert_eq!(vmm.restore(&first, false, &places).unwrap(), DONE);
    assert_eq!(vmm.snapshot(&second).unwrap(), DONE);
    // The timer goes on while the guest stands still.
    expect_same(&first, &second, &["tsc", "lapic"]);
    assert_eq!(vmm.put("vm.resume", "").unwrap(), DONE);
    both(&mut vmm.process);
    drop(vmm);

    // Another one goes on by the command line, without an API.
    let third = folder.path().join("third");
    let _server = serve_demo(&third).unwrap();
    let mut command = Process::command(outrigger::binary());
    command.args([
        "--restore",
        &format!("source_url=file://{},resume=on", first.display()),
        "--user-device",
        &format!("id=demo,socket={}", third.display()),
    ]);
    let mut vm = Process::start(&mut command, Path::new("/dev/null")).unwrap();
    both(&mut vm);
    vm.signal(Signal::TERM).unwrap();
    assert!(vm.wait(SOON).unwrap().status.success());
}

#[test]
fn disk_and_demo_device_at_work_go_on_with_new_servers() {
    if !has_kvm() {
        return;
    }
    const SIZE: u64 = 1 << 19;
    const PIECE: usize = 4096;
    let writes = Job {
        writes: true,
        length: 4096,
        depth: 32,
        requests: 128,
        random: false,
        checked: true,
        size: SIZE,
    };
    let reads = Job {
        writes: false,
        ..writes
    };
    let jobs = [writes, reads].repeat(4);
    let kernel = disk_guest_beside(&jobs, |code| {
        code.allow_interrupts()?;
        code.mov(esp, SECOND_STACK)?;
        use_demo(code, FIRST_DEVICE + (1 << 15), 1, say_dots)
    })
    .unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = |name| folder.path().join(name);
    let image = path("image");
    fs::File::create(&image).unwrap().set_len(SIZE).unwrap();
    let server = serve_demo(&path("old")).unwrap();
    let mut vmm = Vmm::start(&[
        "--kernel",
        kernel.path().to_str().unwrap(),
        "--memory",
        "size=64M",
        "--cpus",
        "2",
        "--disk",
        &format!("path={}", image.display()),
        "--user-device",
        &format!("id=demo,socket={}", path("old").display()),
    ])
    .unwrap();
    let end = char::from(END).to_string();
    vmm.process.wait_for(&end, SOON).unwrap();
    vmm.pause().unwrap();
    assert_eq!(vmm.snapshot(&path("snapshot")).unwrap(), DONE);
    vmm.process.signal(Signal::KILL).unwrap();
    vmm.process.wait(SOON).unwrap();
    drop(server);
    let before = said(&vmm);
    let count = |said: &str, what: u8| said.bytes().filter(|byte| *byte == what).count();
    let ended = count(&before, END);
    assert!(ended < jobs.len(), "it was done already: {before}");

    let _server = serve_demo(&path("new")).unwrap();
    let mut vmm = Vmm::start(&[]).unwrap();
    let places = [("demo", path("new"))];
    let places = places
        .each_ref()
        .map(|(id, socket)| (*id, socket.as_path()));
    let restored = vmm.restore(&path("snapshot"), true, &places).unwrap();
    assert_eq!(restored, DONE);
    for _ in ended..jobs.len() {
        vmm.process.wait_for(&end, SOON).unwrap();
        let all = before.clone() + &said(&vmm);
        if count(&all, END) == jobs.len() {
            break;
        }
    }
    vmm.process.wait_for(".", SOON).unwrap();
    let all = before + &said(&vmm);
    assert_eq!(
        [BEGIN, END].map(|what| count(&all, what)),
        [jobs.len(); 2],
        "{all}"
    );
    assert_eq!(
        [FAILED, b'?'].map(|what| count(&all, what)),
        [0, 0],
        "{all}"
    );
    let image = fs::read(&image).unwrap();
    for (piece, number) in image.chunks_exact(PIECE).zip(0..) {
        let sector = u32::try_from(number * PIECE / 512).unwrap().to_le_bytes();
        assert_eq!(piece[..4], sector, "piece {number}");
        assert_eq!(piece[PIECE - 4..], sector, "piece {number}");
        assert_eq!(piece[4..PIECE - 4], image[4..PIECE - 4], "piece {number}");
    }
}

/// What the guest has said so far.
fn said(vmm: &Vmm) -> String {
    let lines = vmm.process.lines().iter();
    lines.map(|line| line.text.as_str()).collect()
}
