//! A device whose server refuses one step of a migration after the other: the VM stays where it was, with a device that
//! goes on as if nothing had been, unless the VM has moved already.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::io;
use std::sync::{Arc, Mutex};

use serde_json::json;
use tests::api::{DONE, Vmm};
use tests::device_thread::{DeviceThread, IDS};
use tests::lab::SOON;
use tests::outrigger::has_kvm;
use tests::tiny::counter::counter;
use vfio_user_server::{Bar, Description, Device, Migration, StateStream};

/// What a device is asked to do in the course of a migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    ReadEarly,
    Stop,
    Read,
    WriteEarly,
    Write,
    Take,
    Start,
}

/// The step that a device refuses, if it does.
type Mood = Arc<Mutex<Option<Step>>>;

/// A device that has a little state, some of which it gives away early.
struct Picky(Mood);

const STATE: &[u8] = b"all that it has";

impl Picky {
    fn may(&self, step: Step) -> io::Result<()> {
        match *self.0.lock().unwrap() {
            Some(refused) if refused == step => Err(io::ErrorKind::InvalidInput.into()),
            _ => Ok(()),
        }
    }
}

impl Device for Picky {
    fn read(&mut self, _: usize, _: u64, data: &mut [u8]) -> io::Result<()> {
        data.fill(0);
        Ok(())
    }

    fn write(&mut self, _: usize, _: u64, _: &[u8]) -> io::Result<()> {
        Ok(())
    }

    fn reset(&mut self) {}

    fn stop(&mut self) -> io::Result<()> {
        self.may(Step::Stop)
    }

    fn start(&mut self) -> io::Result<()> {
        self.may(Step::Start)
    }

    fn migration(&mut self) -> Migration<'_> {
        Migration::Stream(self)
    }
}

/// Reads `STATE` from `offset` on.
fn read(offset: u64, data: &mut [u8]) -> usize {
    let rest = STATE.get(usize::try_from(offset).unwrap()..);
    let rest = rest.unwrap_or_default();
    let length = rest.len().min(data.len());
    data[..length].copy_from_slice(&rest[..length]);
    length
}

impl StateStream for Picky {
    fn has_early_state(&self) -> bool {
        true
    }

    fn read_early_state(&mut self, offset: u64, data: &mut [u8]) -> io::Result<usize> {
        self.may(Step::ReadEarly)?;
        Ok(read(offset, data))
    }

    fn read_state(&mut self, offset: u64, data: &mut [u8]) -> io::Result<usize> {
        self.may(Step::Read)?;
        Ok(read(offset, data))
    }

    fn write_early_state(&mut self, _: u64, _: &[u8]) -> io::Result<()> {
        self.may(Step::WriteEarly)
    }

    fn write_state(&mut self, _: u64, _: &[u8]) -> io::Result<()> {
        self.may(Step::Write)
    }

    fn state_written(&mut self, size: u64) -> io::Result<()> {
        assert_eq!(size, STATE.len() as u64);
        self.may(Step::Take)
    }
}

fn serve(mood: &Mood) -> DeviceThread {
    let description = Description::new(IDS).bar(0, Bar::memory32(0x1000));
    let mood = mood.clone();
    DeviceThread::custom(description, move |_| Picky(mood)).unwrap()
}

/// Where a device is when it refuses something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum At {
    Source,
    Destination,
}

#[test]
fn vm_stays_with_its_device_whatever_is_refused_before_it_has_moved() {
    if !has_kvm() {
        return;
    }
    let (here, there) = (Mood::default(), Mood::default());
    let device = serve(&here);
    let kernel = counter().unwrap();
    let kernel = kernel.path().to_str().unwrap();
    let user_device = format!("id=picky,socket={}", device.socket().display());
    let mut vmm = Vmm::start(&[
        "--kernel",
        kernel,
        "--memory",
        "size=64M",
        "--user-device",
        &user_device,
    ])
    .unwrap();
    vmm.process.wait_for("A", SOON).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let url = format!("unix:{}", folder.path().join("door").display());
    let is_lost = |vmm: &Vmm| vmm.get("vm.counters").unwrap().body["picky"]["lost"] == 1;

    for (at, step) in [
        (At::Source, Step::ReadEarly),
        (At::Source, Step::Stop),
        (At::Source, Step::Read),
        (At::Destination, Step::Stop),
        (At::Destination, Step::WriteEarly),
        (At::Destination, Step::Write),
        (At::Destination, Step::Take),
        (At::Destination, Step::Start),
    ] {
        let mood = match at {
            At::Source => &here,
            At::Destination => &there,
        };
        let next_device = serve(&there);
        let next = Vmm::start(&[]).unwrap();
        let place = json!([{"id": "picky", "socket": next_device.socket()}]);
        let body = json!({"receiver_url": url, "devices": place});
        let receiving = next.begin("vm.receive-migration", &body);
        next.wait_phase("Listening").unwrap();
        *mood.lock().unwrap() = Some(step);
        let body = json!({"destination_url": url});
        let sent = vmm.put("vm.send-migration", &body.to_string()).unwrap();
        let received = receiving.join().unwrap().unwrap();
        *mood.lock().unwrap() = None;
        if step == Step::Start {
            // The VM has moved by then, and goes on without it.
            assert_eq!((sent, received), (DONE, DONE));
            assert_eq!(next.state().unwrap(), "Running");
            assert!(is_lost(&next));
            continue;
        }
        assert!(
            sent.is_error(&["the VM does not move", "picky"]),
            "{at:?}, {step:?}: {sent:?}"
        );
        assert!(
            received.is_error(&["no VM has come", "picky"]),
            "{at:?}, {step:?}: {received:?}"
        );
        assert_eq!(next.get("vm.info").unwrap().status, 404);
        assert_eq!(vmm.state().unwrap(), "Running");
        assert!(!is_lost(&vmm), "{at:?}, {step:?}");
        for letter in ["A", "B"] {
            vmm.process.wait_for(letter, SOON).unwrap();
        }
    }
}
