//! Snapshots: a paused VM's state goes into a directory, and a VM in another process goes on from there.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::fs;
use std::path::Path;

use iced_x86::IcedError;
use iced_x86::code_asm::{al, bl, dword_ptr, eax, ebp, ebx, ecx, edi, esi, esp};
use rustix::process::Signal;
use serde_json::Value;
use tempfile::NamedTempFile;
use tests::api::{Answer, Vmm};
use tests::lab::{Process, SOON};
use tests::outrigger::{self, has_kvm, serve_demo};
use tests::tiny::disk::{BEGIN, END, FAILED, Job, disk_guest_beside};
use tests::tiny::{self, Code, FIRST_DEVICE, LOCAL_APIC, SCRATCH};

const DONE: Answer = Answer {
    status: 204,
    body: Value::Null,
};

/// Where guests have their stacks: the first CPU, and a second one.
const STACK: u32 = SCRATCH + 0x2000;
const SECOND_STACK: u32 = SCRATCH + 0x4000;

/// A guest that counts, fills memory with what it has counted, and says each letter of the alphabet in its turn.
fn counter() -> NamedTempFile {
    /// Memory that it writes to over and over, in double words.
    const FIELD: u32 = 0x10_0000;
    tiny::guest(|code| {
        code.print_line("ready")?;
        code.mov(esp, STACK)?;
        code.mov(bl, u32::from(b'A'))?;
        code.xor(eax, eax)?;
        let mut again = code.create_label();
        let mut count = code.create_label();
        code.set_label(&mut again)?;
        code.mov(ecx, 0x400)?;
        code.set_label(&mut count)?;
        code.inc(eax)?;
        code.mov(ebp, eax)?;
        code.and(ebp, FIELD - 1)?;
        code.mov(dword_ptr(SCRATCH + 0x10_0000) + ebp * 4, eax)?;
        code.dec(ecx)?;
        code.jnz(count)?;
        code.push(eax)?;
        code.mov(al, bl)?;
        code.print_al()?;
        code.print(b'\n')?;
        code.pop(eax)?;
        let mut within = code.create_label();
        code.inc(bl)?;
        code.cmp(bl, u32::from(b'Z') + 1)?;
        code.jne(within)?;
        code.mov(bl, u32::from(b'A'))?;
        code.set_label(&mut within)?;
        code.jmp(again)
    })
    .unwrap()
}

#[test]
fn guest_goes_on_in_another_process() {
    if !has_kvm() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let [first, second] = ["first", "second"].map(|name| folder.path().join(name));
    let kernel = counter();
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

/// Expects two snapshots to be the same, but for what changes with time, in vCPUs these parts.
fn expect_same(first: &Path, second: &Path, with_time: &[&str]) {
    assert!(fs::read(first.join("ram")).unwrap() == fs::read(second.join("ram")).unwrap());
    let [before, after] = [first, second].map(|path| timeless_state(path, with_time));
    for (name, before) in before.as_object().unwrap() {
        assert!(
            after[name] == *before,
            "{name}: {before:#}, then {:#}",
            after[name]
        );
    }
}

/// What `machine.json` says, but for what changes with time.
fn timeless_state(path: &Path, with_time: &[&str]) -> Value {
    let document = fs::read(path.join("machine.json")).unwrap();
    let mut document: Value = serde_json::from_slice(&document).unwrap();
    let mut state = document["state"].take();
    state["clock"].take();
    // The timer keeps when it was started.
    state["chips"]["pit"].take();
    for vcpu in state["vcpus"].as_array_mut().unwrap() {
        for part in with_time {
            vcpu[part].take();
        }
    }
    state
}

/// Interrupts that have come: of the demo device, and of the timer.
const INTERRUPTS: u32 = SCRATCH + 0x100;
const TICKS: u32 = SCRATCH + 0x104;
/// The first of three vectors of the demo device's, and that of the timer.
const VECTOR: u8 = 0x60;
const TIMER: u8 = 0x70;

/// Has this CPU work with the demo device in configuration space at `device` for ever: it writes and reads a register,
/// and has each of three vectors come. Says '.' every now and then, and '?' if something is not right.
fn use_demo(code: &mut Code, device: u32, apic: u32) -> Result<(), IcedError> {
    const REGISTER: i32 = 0x08;
    const RAISE: i32 = 0x10;
    // Memory space, bus master and no INTx.
    code.store(device + 4, 0x406)?;
    code.mov(ebp, dword_ptr(device + 0x10))?;
    code.mov(edi, dword_ptr(device + 0x14))?;
    for vector in 0..3 {
        let entry = edi + vector * 16;
        code.mov(dword_ptr(entry), LOCAL_APIC | apic << 12)?;
        code.mov(dword_ptr(entry + 4), 0)?;
        code.mov(dword_ptr(entry + 8), i32::from(VECTOR) + vector)?;
        code.mov(dword_ptr(entry + 12), 0)?;
    }
    // MSI-X on.
    code.store(device + 0xb0, 1 << 31)?;
    let [mut again, mut quiet, mut wrong] = std::array::from_fn(|_| code.create_label());
    code.xor(ebx, ebx)?;
    code.xor(esi, esi)?;
    code.set_label(&mut again)?;
    code.inc(ebx)?;
    code.mov(dword_ptr(ebp + REGISTER), ebx)?;
    for vector in 0..3 {
        code.inc(esi)?;
        code.mov(dword_ptr(ebp + RAISE), vector)?;
        let mut wait = code.create_label();
        code.set_label(&mut wait)?;
        code.pause()?;
        code.cmp(dword_ptr(INTERRUPTS), esi)?;
        code.jb(wait)?;
        // Not one too many either.
        code.ja(wrong)?;
    }
    code.cmp(dword_ptr(ebp + REGISTER), ebx)?;
    code.jne(wrong)?;
    code.test(ebx, 0xf)?;
    code.jnz(quiet)?;
    code.print_line(".")?;
    code.set_label(&mut quiet)?;
    code.jmp(again)?;
    code.set_label(&mut wrong)?;
    code.print_line("?")?;
    code.halt()?;
    for vector in VECTOR..VECTOR + 3 {
        code.begin_handler(vector)?;
        code.inc(dword_ptr(INTERRUPTS))?;
        code.end_handler()?;
    }
    Ok(())
}

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
        use_demo(code, FIRST_DEVICE, 0)?;
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
        use_demo(code, FIRST_DEVICE + (1 << 15), 1)
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
