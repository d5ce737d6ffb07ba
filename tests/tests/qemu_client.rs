//! QEMU 11.1, a vfio-user client that nobody here wrote, gives the built-in devices to Linux guests. QEMU emulates the
//! CPU, so this runs on any machine.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::env;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;

use rustix::process::Signal;
use tempfile::TempDir;
use tests::device_thread::DeviceThread;
use tests::lab::ledger::{Ledger, await_flushes, await_verified, verify_ended, verify_lost};
use tests::lab::{BOOT, Images, Monitor, Peer, Process, Report, SOON, Tap, run};
use tests::outrigger;
use tests::skipped::skip;

/// What of the demo device works in QEMU. Not `decode`: where no device answers, its guests read zeros. And not
/// `msix-mask`: QEMU keeps an interrupt that is masked to itself, and shows the guest the pending bits of a server that
/// was told of no mask.
const CHECKS: &str =
    "config,capabilities,bars,registers,ram,io,dma,dma-later,msix,doorbells,msi,intx";

/// Guest memory that servers map.
const SHARED: &str =
    "-object memory-backend-memfd,id=ram,size=256M,share=on -machine memory-backend=ram";

/// QEMU with a guest, and what it needs.
struct Qemu {
    process: Process,
    folder: TempDir,
}

impl Qemu {
    /// Boots a guest with the device at a socket. `parameters` are for its kernel, and `memory` makes its RAM.
    fn boot(name: &str, socket: &Path, memory: &str, parameters: &str) -> Self {
        let images = images();
        let folder = tempfile::tempdir().unwrap();
        let device = format!(
            r#"{{"driver":"vfio-user-pci","socket":{{"type":"unix","path":"{}"}}}}"#,
            socket.display()
        );
        // On a busy machine the emulated timer is too slow for the kernel's test of it.
        let parameters = format!("console=ttyS0 quiet panic=-1 no_timer_check {parameters}");
        let mut qemu = Process::command(&images.folder().join("qemu-peer/qemu"));
        qemu.args("-nodefaults -no-user-config -display none -serial stdio".split(' '));
        // As in the lab: a kernel that patches its own code races with several emulation threads. And the first input
        // device is the power button.
        qemu.args("-M q35,i8042=off -accel tcg,thread=single -cpu max -smp 2 -m 256M".split(' '));
        let monitor = folder.path().join("monitor").display().to_string();
        let monitor = format!("unix:{monitor},server=on,wait=off");
        qemu.args(["-qmp", &monitor]);
        qemu.args(memory.split_whitespace())
            .args(["-device", &device]);
        qemu.arg("-kernel").arg(images.kernel("6.12"));
        qemu.arg("-initrd").arg(images.initramfs("6.12"));
        qemu.args(["-append", &parameters]);
        let log = images.logs().join(format!("qemu-client.{name}.log"));
        Self {
            process: Process::start(&mut qemu, &log).unwrap(),
            folder,
        }
    }

    fn report(&mut self) -> Report {
        Report::wait(&mut self.process, BOOT).unwrap()
    }

    fn press_power_button(&self) {
        let monitor = UnixStream::connect(self.folder.path().join("monitor")).unwrap();
        Monitor::on(monitor).unwrap().press_power_button().unwrap();
    }

    /// Waits for a guest that powers off.
    fn end(mut self) {
        assert!(self.process.wait(SOON).unwrap().status.success());
    }
}

fn images() -> Images {
    Images::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/lab"))
}

/// `outrigger serve` with a device, and the socket that it listens on.
fn serve(name: &str, socket: &Path, arguments: &[String]) -> Process {
    let mut command = Process::command(outrigger::binary());
    command.arg("serve").args(arguments);
    command.arg("--socket").arg(socket);
    let log = images()
        .logs()
        .join(format!("qemu-client.{name}-server.log"));
    let mut server = Process::start(&mut command, &log).unwrap();
    server.wait_for("listening", SOON).unwrap();
    server
}

#[test]
#[ignore = "`make peer` fetches QEMU 11.1 and runs this"]
fn a_linux_guest_uses_the_demo_device() {
    let server = DeviceThread::demo().unwrap();
    let checks = format!("outrigger.checks={CHECKS}");
    let mut qemu = Qemu::boot("shared", server.socket(), SHARED, &checks);
    let report = qemu.report();
    qemu.end();
    report.devices_are_well(1).unwrap();
    // QEMU resets a device before it starts a guest.
    assert_eq!(report.number("resets").unwrap(), 1);
}

#[test]
#[ignore = "`make peer` fetches QEMU 11.1 and runs this"]
fn the_demo_device_does_dma_by_messages() {
    let server = DeviceThread::demo().unwrap();
    // Not `dma`: QEMU answers no message while a CPU waits for the device.
    let checks = "outrigger.checks=registers,dma-later,msix";
    let mut qemu = Qemu::boot("private", server.socket(), "", checks);
    let report = qemu.report();
    qemu.end();
    report.devices_are_well(1).unwrap();
}

/// A guest makes some of a disk zeroes and discards some.
#[test]
#[ignore = "`make peer` fetches QEMU 11.1 and runs this"]
fn a_linux_guest_uses_the_disk() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("image");
    let file = std::fs::File::create(&image).unwrap();
    file.set_len(12 << 20).unwrap();
    let socket = folder.path().join("disk");
    let path = format!("--path={}", image.display());
    let mut server = serve("disk", &socket, &["disk".into(), path]);
    let checks = "outrigger.checks=disk-facts,disk-zeroes";
    let mut qemu = Qemu::boot("disk", &socket, SHARED, checks);
    let report = qemu.report();
    qemu.end();
    report.passed(1, &["disk-facts", "disk-zeroes"]).unwrap();
    server.signal(Signal::TERM).unwrap();
    server.wait(SOON).unwrap();
}

#[test]
#[ignore = "`make peer` fetches QEMU 11.1 and runs this"]
fn what_a_guest_has_flushed_survives_its_reboot_and_the_end_of_the_server() {
    const SIZE: u64 = 12 << 20;
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("image");
    let socket = folder.path().join("disk");
    let path = format!("--path={}", image.display());
    let arguments = [
        "disk".into(),
        path,
        "--serial=ledger".into(),
        "--num-queues=2".into(),
    ];
    let disk = Ledger::new("ledger".into(), image, SIZE, 7, "").unwrap();
    let mut disks = [disk];
    let parameters = "outrigger.checks=none outrigger.end=disks";

    let mut server = serve("ledger", &socket, &arguments);
    let mut qemu = Qemu::boot("ledger", &socket, SHARED, parameters);
    // Between the two, the guest reboots.
    for _ in 0..2 {
        await_verified(&mut qemu.process, &disks).unwrap();
        let from = qemu.process.lines().len();
        await_flushes(&mut qemu.process, &disks).unwrap();
        qemu.press_power_button();
        verify_ended(&mut qemu.process, from, &mut disks).unwrap();
    }
    await_verified(&mut qemu.process, &disks).unwrap();
    let from = qemu.process.lines().len();
    await_flushes(&mut qemu.process, &disks).unwrap();
    server.signal(Signal::KILL).unwrap();
    // QEMU may not survive the loss of a server: an assertion of its own fails at times.
    let _ = qemu.process.signal(Signal::KILL);
    qemu.process.wait(SOON).unwrap();
    verify_lost(&qemu.process, from, &mut disks).unwrap();

    let _server = serve("ledger-again", &socket, &arguments);
    let mut qemu = Qemu::boot("ledger-again", &socket, SHARED, parameters);
    await_verified(&mut qemu.process, &disks).unwrap();
    let from = qemu.process.lines().len();
    await_flushes(&mut qemu.process, &disks).unwrap();
    qemu.press_power_button();
    verify_ended(&mut qemu.process, from, &mut disks).unwrap();
}

/// Packets go both ways, and much data arrives undamaged.
#[test]
#[ignore = "`make peer` fetches QEMU 11.1 and runs this"]
fn a_linux_guest_uses_the_network_card() {
    // In a network of its own, whoever may open /dev/net/tun can make a tap.
    let apart = || {
        let mut command = Command::new("unshare");
        command.args(["--user", "--map-root-user", "--net"]);
        command
    };
    let make_tap = ["ip", "tuntap", "add", "dev", "probe", "mode", "tap"];
    let probe = apart().args(make_tap).output();
    if !probe.is_ok_and(|output| output.status.success()) {
        skip("no tap can be made in a network of its own (/dev/net/tun, `unshare`, `ip`)");
        return;
    }
    let mut inside = apart();
    inside.arg(env::current_exe().unwrap());
    inside.args(["--exact", "inside", "--ignored", "--nocapture"]);
    let status = inside.env("IN_A_NETWORK_OF_ITS_OWN", "1").status().unwrap();
    assert!(status.success());
}

/// What [`a_linux_guest_uses_the_network_card`] does, in a process of its own.
#[test]
#[ignore = "of no use but to another test"]
fn inside() {
    if env::var_os("IN_A_NETWORK_OF_ITS_OWN").is_none() {
        return;
    }
    let peer = Peer::start().unwrap();
    let _tap = Tap::make("card", 0, &["vnet_hdr"]).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("card");
    let mut server = serve("card", &socket, &["net".into(), "--tap=card".into()]);
    let checks = ["card-facts", "card-ping", "card-bulk", "card-queues"];
    let parameters = format!("outrigger.checks={} outrigger.end=cards", checks.join(","));
    let mut qemu = Qemu::boot("card", &socket, SHARED, &parameters);
    let report = qemu.report();
    peer.is_well().unwrap();
    report.passed(1, &checks).unwrap();
    run(
        "busybox",
        &["ping", "-q", "-c", "3", "-w", "20", "198.18.0.2"],
    )
    .unwrap();
    qemu.press_power_button();
    qemu.end();
    server.signal(Signal::TERM).unwrap();
    server.wait(SOON).unwrap();
}
