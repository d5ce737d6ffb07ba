//! Doorbells: writes of the guest that reach the device as events, and which writes do not.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::io::{self, Read};
use std::sync::mpsc::{self, Receiver, Sender};

use iced_x86::IcedError;
use iced_x86::code_asm::{dword_ptr, eax, ebp, edi, word_ptr};
use tempfile::NamedTempFile;
use tests::device_thread::{DeviceThread, IDS};
use tests::outrigger::{self, has_kvm};
use tests::tiny::{self, Code, FIRST_DEVICE};
use vfio_user_server::{Bar, Description, Device, Doorbell};

const COMMAND: u32 = FIRST_DEVICE + 0x04;
const BAR0: u32 = FIRST_DEVICE + 0x10;
/// Memory space.
const DECODE: u32 = 2;
/// Where the guest moves the BAR: into the window for BARs, and behind what the VMM has placed there.
const ELSEWHERE: u32 = 0xd000_0000;

/// The two doorbells: one for any value, and one for a value of its own.
const ANY: i32 = 0x100;
const MATCHED: i32 = 0x104;
const VALUE: i32 = 5;

/// What reaches the device. Reads do not count: with one the guest makes sure that what it did has arrived.
#[derive(Debug, PartialEq, Eq)]
enum Event {
    Rung(usize),
    Written(u64, Vec<u8>),
}

struct Listener(Sender<Event>);

impl Device for Listener {
    fn read(&mut self, _: usize, _: u64, data: &mut [u8]) -> io::Result<()> {
        data.fill(0);
        Ok(())
    }

    fn write(&mut self, _: usize, offset: u64, data: &[u8]) -> io::Result<()> {
        self.0.send(Event::Written(offset, data.to_vec())).unwrap();
        Ok(())
    }

    fn reset(&mut self) {}

    fn doorbell(&mut self, doorbell: usize) {
        self.0.send(Event::Rung(doorbell)).unwrap();
    }
}

fn description() -> Description {
    let doorbell = |offset, value| Doorbell {
        bar: 0,
        offset,
        size: 4,
        value,
    };
    Description::new(IDS)
        .bar(0, Bar::memory32(0x1000))
        .doorbell(doorbell(0x100, None))
        .doorbell(doorbell(0x104, Some(5)))
}

/// A guest whose code finds the device's BAR 0 at EBP.
fn guest(code: impl FnOnce(&mut Code) -> Result<(), IcedError>) -> NamedTempFile {
    let guest = tiny::guest(|guest| {
        guest.store(COMMAND, DECODE)?;
        guest.mov(ebp, dword_ptr(BAR0))?;
        code(guest)?;
        guest.power_off()
    });
    guest.unwrap()
}

/// Runs such a guest. Returns what it prints, and what reaches the device.
fn run(code: impl FnOnce(&mut Code) -> Result<(), IcedError>) -> (String, Vec<Event>) {
    let (sender, events) = mpsc::channel();
    let device = DeviceThread::custom(description(), |_| Listener(sender)).unwrap();
    let output = outrigger::run_with_device(guest(code).path(), device.socket()).unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{said}");
    drop(device);
    let printed = String::from_utf8(output.stdout).unwrap();
    (printed, events.iter().collect())
}

/// Moves the BAR, and EBP with it.
fn move_away(code: &mut Code) -> Result<(), IcedError> {
    code.store(COMMAND, 0)?;
    code.store(BAR0, ELSEWHERE)?;
    code.store(COMMAND, DECODE)?;
    code.mov(ebp, ELSEWHERE)
}

/// Writes to a doorbell, and waits until the device has heard it.
fn ring(code: &mut Code, offset: i32, value: i32) -> Result<(), IcedError> {
    code.mov(dword_ptr(ebp + offset), value)?;
    code.mov(eax, dword_ptr(ebp))
}

/// A device that has ears for nothing from its first doorbell until it is told to go on.
struct Deaf {
    go_on: Receiver<()>,
}

impl Device for Deaf {
    fn read(&mut self, _: usize, _: u64, data: &mut [u8]) -> io::Result<()> {
        data.fill(0);
        Ok(())
    }

    fn write(&mut self, _: usize, _: u64, _: &[u8]) -> io::Result<()> {
        Ok(())
    }

    fn reset(&mut self) {}

    fn doorbell(&mut self, _: usize) {
        // Fails when the test has gone, and nobody needs the device any more.
        let _ = self.go_on.recv();
    }
}

#[test]
fn nobody_waits_for_a_doorbell_to_be_heard() {
    if !has_kvm() {
        return;
    }
    for is_moved in [false, true] {
        let (sender, go_on) = mpsc::channel();
        let device = DeviceThread::custom(description(), |_| Deaf { go_on }).unwrap();
        let kernel = guest(|code| {
            if is_moved {
                move_away(code)?;
            }
            code.mov(dword_ptr(ebp + ANY), 1)?;
            code.mov(dword_ptr(ebp + ANY), 2)?;
            code.mov(dword_ptr(ebp + MATCHED), VALUE)?;
            code.print(b'.')
        });
        let user_device = format!("id=deaf,socket={}", device.socket().display());
        let kernel = kernel.path().to_str().unwrap();
        let arguments = ["--kernel", kernel, "--memory", "size=64M", "--user-device"];
        let mut vm = outrigger::start(&[arguments.as_slice(), &[&user_device]].concat()).unwrap();
        vm.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
        drop(sender);
        let output = outrigger::wait(vm).unwrap();
        // A write that is a message waits for its answer, and one that waits in vain is a fault.
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(0), "{said}");
        assert!(!said.contains("deaf:"), "moved: {is_moved}; {said}");
    }
}

#[test]
fn writes_that_do_not_match_are_messages() {
    if !has_kvm() {
        return;
    }
    let (_, events) = run(|code| {
        ring(code, MATCHED, VALUE + 1)?;
        code.mov(word_ptr(ebp + ANY), 7)?;
        ring(code, ANY + 8, 9)?;
        ring(code, MATCHED, VALUE)
    });
    let expected = [
        Event::Written(0x104, vec![6, 0, 0, 0]),
        Event::Written(0x100, vec![7, 0]),
        Event::Written(0x108, vec![9, 0, 0, 0]),
        Event::Rung(1),
    ];
    assert_eq!(events, expected);
}

#[test]
fn doorbells_move_with_their_bar() {
    if !has_kvm() {
        return;
    }
    let (printed, events) = run(|code| {
        let mut answers = code.create_label();
        code.mov(edi, ebp)?;
        // Off: nothing is left of it.
        code.store(COMMAND, 0)?;
        code.mov(dword_ptr(edi + ANY), 1)?;
        code.mov(dword_ptr(edi + MATCHED), VALUE)?;
        move_away(code)?;
        ring(code, ANY, 1)?;
        ring(code, MATCHED, VALUE)?;
        ring(code, MATCHED, VALUE + 1)?;
        // Nobody is where it was.
        code.mov(dword_ptr(edi + ANY), 1)?;
        code.mov(dword_ptr(edi + MATCHED), VALUE)?;
        for offset in [0, ANY, MATCHED] {
            code.cmp(dword_ptr(edi + offset), -1)?;
            code.jne(answers)?;
            code.print(b'.')?;
        }
        // And back.
        code.mov(dword_ptr(BAR0), edi)?;
        code.mov(ebp, edi)?;
        ring(code, MATCHED, VALUE)?;
        code.set_label(&mut answers)
    });
    let expected = [
        Event::Rung(0),
        Event::Rung(1),
        Event::Written(0x104, vec![6, 0, 0, 0]),
        Event::Rung(1),
    ];
    assert_eq!((printed.as_str(), events), ("...", expected.into()));
}
