//! QEMU 11.1, a vfio-user client that nobody here wrote, gives the demo device to a Linux guest. QEMU emulates the CPU,
//! so this runs on any machine.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::path::Path;

use tests::device_thread::DeviceThread;
use tests::lab::{BOOT, Images, Process, Report, SOON};

/// What works in QEMU. Not `decode`: where no device answers, its guests read zeros. And not `msix-mask`: QEMU keeps an
/// interrupt that is masked to itself, and shows the guest the pending bits of a server that was told of no mask.
const CHECKS: &str =
    "config,capabilities,bars,registers,ram,io,dma,dma-later,msix,doorbells,msi,intx";

/// Boots a guest whose RAM is made by `memory`, and has it do `checks`.
fn boot(name: &str, memory: &[&str], checks: &str) -> Report {
    let lab = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/lab");
    let images = Images::new(lab.clone());
    let server = DeviceThread::demo().unwrap();
    let device = format!(
        r#"{{"driver":"vfio-user-pci","socket":{{"type":"unix","path":"{}"}}}}"#,
        server.socket().display()
    );
    // On a busy machine the emulated timer is too slow for the kernel's test of it.
    let parameters =
        format!("console=ttyS0 quiet panic=-1 no_timer_check outrigger.checks={checks}");
    let mut qemu = Process::command(&lab.join("qemu-peer/qemu"));
    qemu.args("-nodefaults -no-user-config -no-reboot -display none -serial stdio".split(' '));
    // As in the lab: a kernel that patches its own code races with several emulation threads.
    qemu.args("-M q35 -accel tcg,thread=single -cpu max -smp 2 -m 256M".split(' '));
    qemu.args(memory).args(["-device", &device]);
    qemu.arg("-kernel").arg(images.kernel("6.12"));
    qemu.arg("-initrd").arg(images.initramfs("6.12"));
    qemu.args(["-append", &parameters]);
    let log = images.logs().join(format!("qemu-client.{name}.log"));
    let mut qemu = Process::start(&mut qemu, &log).unwrap();
    let report = Report::wait(&mut qemu, BOOT).unwrap();
    assert!(qemu.wait(SOON).unwrap().status.success());
    report.devices_are_well(1).unwrap();
    report
}

#[test]
#[ignore = "`make peer` fetches QEMU 11.1 and runs this"]
fn a_linux_guest_uses_the_demo_device() {
    let memory =
        "-object memory-backend-memfd,id=ram,size=256M,share=on -machine memory-backend=ram";
    let report = boot("shared", &memory.split(' ').collect::<Vec<_>>(), CHECKS);
    // QEMU resets a device before it starts a guest.
    assert_eq!(report.number("resets").unwrap(), 1);
}

#[test]
#[ignore = "`make peer` fetches QEMU 11.1 and runs this"]
fn the_demo_device_does_dma_by_messages() {
    // Not `dma`: QEMU answers no message while a CPU waits for the device.
    boot("private", &[], "registers,dma-later,msix");
}
