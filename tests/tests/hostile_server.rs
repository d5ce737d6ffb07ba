//! Device servers that take away what they have given, die, or hang: the guest loses the device, and goes on.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::path::{Path, PathBuf};

use guest::{MAGIC_VALUE, MAPPED};
use iced_x86::IcedError;
use iced_x86::code_asm::{dword_ptr, eax, ebp, ebx, ecx, edi, esi};
use rustix::process::Signal;
use tempfile::{NamedTempFile, TempDir};
use tests::device_thread::DeviceThread;
use tests::lab::{Process, SOON, Stream};
use tests::outrigger::{self, has_kvm};
use tests::tiny::{self, Code, FIRST_DEVICE, SCRATCH};
use tests::truncator;

/// (A KVM that only emulates asks the VMM for memory that it cannot read; on others, KVM_RUN fails: see the lab.)
#[test]
fn truncated_bar_is_lost_and_the_guest_goes_on() {
    if !has_kvm() {
        return;
    }
    let server = truncator::serve().unwrap();
    let kernel = truncator::guest().unwrap();
    let output = outrigger::run_with_device(kernel.path(), server.socket()).unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(
        (output.status.code(), output.stdout.as_slice()),
        (Some(0), b"AB".as_slice()),
        "{said}"
    );
}

/// A server in a process of its own.
struct Server {
    process: Process,
    socket: PathBuf,
    _folder: TempDir,
}

impl Server {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("device.sock");
        let mut command = Process::command(outrigger::binary());
        command.args(["serve", "demo", "--socket"]).arg(&socket);
        let mut process = Process::start(&mut command, &folder.path().join("log")).unwrap();
        process.wait_for("listening", SOON).unwrap();
        Self {
            process,
            socket,
            _folder: folder,
        }
    }
}

/// Starts a guest with a device called `bad`, and one called `well`.
fn start(kernel: &NamedTempFile, bad: &Path, well: &Path) -> Process {
    let mut command = Process::command(outrigger::binary());
    command.arg("--kernel").arg(kernel.path());
    command.args(["--memory", "size=64M", "--cpus", "2", "--user-device"]);
    command.args([("bad", bad), ("well", well)].map(|(id, socket)| {
        let socket = socket.display();
        format!("id={id},socket={socket}")
    }));
    Process::start(&mut command, Path::new("/dev/null")).unwrap()
}

/// What the log says about devices that are lost.
fn lost(vm: &Process) -> Vec<&str> {
    let errors = vm
        .lines()
        .iter()
        .filter(|line| line.stream == Stream::Error);
    let text = errors.map(|line| line.text.as_str());
    text.filter(|text| text.contains("the guest reads all-ones"))
        .collect()
}

/// Config space of the second device.
const SECOND_DEVICE: u32 = FIRST_DEVICE + (1 << 15);
/// The Command register, BARs 0 and 2 in config space.
const COMMAND: u32 = 0x04;
const BAR0: u32 = 0x10;
const BAR2: u32 = 0x18;

/// Has both devices decode their BARs. EBP and EDI: the registers of the first and the second, EBX: the part of the
/// first one's memory that is mapped.
fn find_devices(code: &mut Code) -> Result<(), IcedError> {
    /// BAR 2 has 64 bits; a guest without paging can reach it here.
    const MEMORY: u32 = 0xd000_0000;
    code.store(FIRST_DEVICE + BAR2, MEMORY)?;
    code.store(FIRST_DEVICE + BAR2 + 4, 0)?;
    code.mov(ebx, MEMORY + u32::try_from(MAPPED.start).unwrap())?;
    code.store(FIRST_DEVICE + COMMAND, 2)?;
    code.store(SECOND_DEVICE + COMMAND, 2)?;
    code.mov(ebp, dword_ptr(FIRST_DEVICE + BAR0))?;
    code.mov(edi, dword_ptr(SECOND_DEVICE + BAR0))
}

#[test]
fn killed_server_takes_its_own_device_away_and_no_other() {
    if !has_kvm() {
        return;
    }
    let kernel = tiny::guest(|code| {
        let [mut wrong, mut again] = [code.create_label(), code.create_label()];
        find_devices(code)?;
        code.mov(dword_ptr(ebx), 0x1234_5678)?;
        code.cmp(dword_ptr(ebx), 0x1234_5678)?;
        code.jne(wrong)?;
        code.cmp(dword_ptr(ebp), MAGIC_VALUE)?;
        code.jne(wrong)?;
        code.print_line("ready")?;
        code.set_label(&mut again)?;
        code.cmp(dword_ptr(edi), MAGIC_VALUE)?;
        code.jne(wrong)?;
        code.cmp(dword_ptr(ebp), -1)?;
        code.jne(again)?;
        // All of it is gone.
        for offset in [0, COMMAND, BAR0, 0x40, 0x100] {
            code.wait_for(FIRST_DEVICE + offset, u32::MAX)?;
        }
        let mut again = code.create_label();
        code.set_label(&mut again)?;
        code.cmp(dword_ptr(ebx), -1)?;
        code.jne(again)?;
        code.mov(dword_ptr(ebx), 0)?;
        code.store(FIRST_DEVICE + COMMAND, 0)?;
        code.cmp(dword_ptr(edi), MAGIC_VALUE)?;
        code.jne(wrong)?;
        code.print_line("gone")?;
        code.set_label(&mut wrong)?;
        code.power_off()
    })
    .unwrap();
    let mut bad = Server::start();
    let well = DeviceThread::demo().unwrap();
    let mut vm = start(&kernel, &bad.socket, well.socket());
    vm.wait_for("ready", SOON).unwrap();
    bad.process.signal(Signal::KILL).unwrap();
    vm.wait_for("gone", SOON).unwrap();
    assert!(vm.wait(SOON).unwrap().status.success());
    let lost = lost(&vm);
    assert!(
        matches!(lost[..], [line] if line.contains("bad:")),
        "{lost:?}"
    );
}

#[test]
fn stopped_server_holds_up_who_asks_it_and_nobody_else() {
    if !has_kvm() {
        return;
    }
    /// How many accesses to the device the second CPU has done, and what the last one was.
    const COUNT: u32 = SCRATCH;
    const LAST: u32 = SCRATCH + 4;
    /// How many accesses of another device the first CPU does at least while the second does one, which takes two
    /// seconds: far fewer than are possible, and more than if it had to wait.
    const WORK: u32 = 100;

    let kernel = tiny::guest(|code| {
        let [mut second, mut wrong] = [code.create_label(), code.create_label()];
        find_devices(code)?;
        code.store(COUNT, 0)?;
        code.store(LAST, 0)?;
        code.start_second_cpu(second)?;
        code.wait_for(LAST, MAGIC_VALUE)?;
        code.print_line("ready")?;
        code.wait_for(LAST, u32::MAX)?;
        code.print_line("hung")?;
        // Whole accesses of the second CPU: from the end of one to the end of the next.
        code.xor(ecx, ecx)?;
        code.mov(esi, dword_ptr(COUNT))?;
        let mut again = code.create_label();
        code.set_label(&mut again)?;
        code.inc(ecx)?;
        code.cmp(dword_ptr(edi), MAGIC_VALUE)?;
        code.jne(wrong)?;
        code.cmp(dword_ptr(COUNT), esi)?;
        code.je(again)?;
        code.cmp(ecx, WORK)?;
        code.jb(wrong)?;
        code.print_line("free")?;
        code.wait_for(LAST, MAGIC_VALUE)?;
        code.print_line("back")?;
        code.wait_for(LAST, u32::MAX)?;
        code.print_line("hung again")?;
        code.halt()?;
        code.set_label(&mut wrong)?;
        code.power_off()?;

        code.set_label(&mut second)?;
        code.mov(ebp, dword_ptr(FIRST_DEVICE + BAR0))?;
        let mut again = code.create_label();
        code.set_label(&mut again)?;
        code.mov(eax, dword_ptr(ebp))?;
        code.mov(dword_ptr(LAST), eax)?;
        code.inc(dword_ptr(COUNT))?;
        code.jmp(again)
    })
    .unwrap();
    let mut bad = Server::start();
    let well = DeviceThread::demo().unwrap();
    let mut vm = start(&kernel, &bad.socket, well.socket());
    vm.wait_for("ready", SOON).unwrap();
    bad.process.signal(Signal::STOP).unwrap();
    vm.wait_for("hung", SOON).unwrap();
    vm.wait_for("free", SOON).unwrap();
    bad.process.signal(Signal::CONT).unwrap();
    vm.wait_for("back", SOON).unwrap();
    bad.process.signal(Signal::STOP).unwrap();
    vm.wait_for("hung again", SOON).unwrap();
    vm.signal(Signal::TERM).unwrap();
    assert!(vm.wait(SOON).unwrap().status.success());
    assert_eq!(lost(&vm), [""; 0]);
}
