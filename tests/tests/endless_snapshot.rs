//! A snapshot that would never end: a device's server has more and more state to give. Everything else goes on, and it
//! ends when it is cancelled, or with the VMM.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::io;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::json;
use tests::api::{Answer, Vmm, request};
use tests::device_thread::{DeviceThread, IDS};
use tests::lab::SOON;
use tests::outrigger::has_kvm;
use tests::tiny;
use vfio_user_server::{Bar, Description, Device, Migration, StateStream};

struct Endless;

impl Device for Endless {
    fn read(&mut self, _: usize, _: u64, data: &mut [u8]) -> io::Result<()> {
        data.fill(0);
        Ok(())
    }

    fn write(&mut self, _: usize, _: u64, _: &[u8]) -> io::Result<()> {
        Ok(())
    }

    fn reset(&mut self) {}

    fn migration(&mut self) -> Migration<'_> {
        Migration::Stream(self)
    }
}

impl StateStream for Endless {
    fn read_state(&mut self, _: u64, data: &mut [u8]) -> io::Result<usize> {
        data.fill(0x5a);
        Ok(data.len())
    }

    fn write_state(&mut self, _: u64, _: &[u8]) -> io::Result<()> {
        Ok(())
    }

    fn state_written(&mut self, _: u64) -> io::Result<()> {
        Ok(())
    }
}

fn snapshot(socket: &Path, folder: &Path) -> anyhow::Result<Answer> {
    let body = json!({"destination_url": format!("file://{}", folder.display())});
    request(socket, "PUT", "vm.snapshot", &body.to_string())
}

/// Waits until a snapshot is being written.
fn wait_until_it_is_written(vmm: &Vmm, folder: &Path) {
    let deadline = Instant::now() + SOON;
    let is_written = || {
        folder
            .join("device-0")
            .metadata()
            .is_ok_and(|file| file.len() > 0)
    };
    while !is_written() {
        assert!(Instant::now() < deadline, "{:?}", vmm.get("vm.migration"));
        thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn snapshot_without_an_end_can_be_ended() {
    if !has_kvm() {
        return;
    }
    let description = Description::new(IDS).bar(0, Bar::memory32(0x1000));
    let device = DeviceThread::custom(description, |_| Endless).unwrap();
    let kernel = tiny::guest(|code| {
        code.print_line("ready")?;
        code.halt()
    });
    let kernel = kernel.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let [first, second] = ["first", "second"].map(|name| folder.path().join(name));
    let user_device = format!("id=endless,socket={}", device.socket().display());
    let kernel = kernel.path().to_str().unwrap();
    let arguments = [
        "--kernel",
        kernel,
        "--memory",
        "size=64M",
        "--user-device",
        &user_device,
    ];
    let mut vmm = Vmm::start(&arguments).unwrap();
    vmm.process.wait_for("ready", SOON).unwrap();
    assert_eq!(vmm.put("vm.pause", "").unwrap().status, 204);
    vmm.wait_state("Paused").unwrap();

    let socket = vmm.socket.clone();
    thread::scope(|scope| {
        let taken = scope.spawn(|| snapshot(&socket, &first).unwrap());
        wait_until_it_is_written(&vmm, &first);
        assert_eq!(vmm.state().unwrap(), "Paused");
        for endpoint in ["vmm.ping", "vm.info", "vm.counters", "vm.migration"] {
            assert_eq!(vmm.get(endpoint).unwrap().status, 200, "{endpoint}");
        }
        assert_eq!(snapshot(&socket, &second).unwrap().status, 429);
        assert_eq!(vmm.put("vm.resume", "").unwrap().status, 429);
        assert!(!taken.is_finished());
        let cancelled = request(&socket, "DELETE", "vm.migration", "").unwrap();
        assert_eq!(cancelled.status, 204);
        let taken = taken.join().unwrap();
        assert!(taken.body.to_string().contains("cancelled"), "{taken:?}");
    });
    assert!(!first.exists());
    assert_eq!(vmm.put("vm.resume", "").unwrap().status, 204);
    assert_eq!(vmm.put("vm.pause", "").unwrap().status, 204);
    vmm.wait_state("Paused").unwrap();

    thread::scope(|scope| {
        // Whether it is still told of the end is not the point.
        scope.spawn(|| drop(snapshot(&socket, &second)));
        wait_until_it_is_written(&vmm, &second);
        vmm.process.signal(Signal::TERM).unwrap();
        let exit = vmm.process.wait(SOON).unwrap();
        assert!(exit.status.success(), "{}", exit.status);
    });
    assert!(!second.exists());
}
