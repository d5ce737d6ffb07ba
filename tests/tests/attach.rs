//! Devices that are in some other state than a new one when the VM starts, or do not let go of it.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::io::Read;
use std::sync::Arc;
use std::time::{Duration, Instant};

use iced_x86::code_asm::{dword_ptr, eax, ebp};
use rustix::process::{Pid, Signal, kill_process};
use tests::device_thread::DeviceThread;
use tests::outrigger::{self, has_kvm};
use tests::tiny::{self, FIRST_DEVICE, RESET};
use vfio_user_client::{Client, DeviceState, DmaError, GuestDma, Options};

const COMMAND: u32 = FIRST_DEVICE + 0x04;
const BAR0: u32 = FIRST_DEVICE + 0x10;
/// The demo device: how long a reset takes, in milliseconds.
const RESET_DELAY: i32 = 0x58;

/// Another VMM, which has been here before.
struct Nobody;

impl GuestDma for Nobody {
    fn read(&self, _: u64, _: &mut [u8]) -> Result<(), DmaError> {
        Err(DmaError)
    }

    fn write(&self, _: u64, _: &[u8]) -> Result<(), DmaError> {
        Err(DmaError)
    }
}

/// Prints the lowest byte of the first register, which is 'o'.
fn looks_at_the_device() -> tempfile::NamedTempFile {
    tiny::guest(|code| {
        code.store(COMMAND, 2)?;
        code.mov(ebp, dword_ptr(BAR0))?;
        code.mov(eax, dword_ptr(ebp))?;
        code.print_al()?;
        code.power_off()
    })
    .unwrap()
}

#[test]
fn a_device_runs_in_whatever_state_it_was_left() {
    if !has_kvm() {
        return;
    }
    let device = DeviceThread::demo().unwrap();
    for state in [
        DeviceState::Stop,
        DeviceState::StopCopy,
        DeviceState::PreCopy,
        DeviceState::Resuming,
    ] {
        let client =
            Client::connect(device.socket(), Arc::new(Nobody), &Options::default()).unwrap();
        client.set_device_state(state).unwrap();
        drop(client);
        let output =
            outrigger::run_with_device(looks_at_the_device().path(), device.socket()).unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(
            (output.status.code(), output.stdout.as_slice()),
            (Some(0), b"o".as_slice()),
            "{state:?}: {said}"
        );
    }
}

#[test]
fn a_device_that_takes_long_to_reset_does_not_keep_the_user_waiting() {
    if !has_kvm() {
        return;
    }
    let kernel = tiny::guest(|code| {
        code.store(COMMAND, 2)?;
        code.mov(ebp, dword_ptr(BAR0))?;
        code.mov(dword_ptr(ebp + RESET_DELAY), 10_000)?;
        code.outb(RESET, 1)?;
        code.halt()
    });
    let device = DeviceThread::demo().unwrap();
    let kernel = kernel.unwrap();
    let socket = format!("socket={}", device.socket().display());
    let mut vm = outrigger::start(&[
        "-v",
        "--kernel",
        kernel.path().to_str().unwrap(),
        "--memory",
        "size=64M",
        "--user-device",
        &socket,
    ])
    .unwrap();
    let mut said = String::new();
    let mut log = vm.stderr.take().unwrap();
    while !said.contains("the guest reset") {
        let mut byte = [0];
        assert_eq!(log.read(&mut byte).unwrap(), 1, "it ended: {said}");
        said.push(char::from(byte[0]));
    }
    let told = Instant::now();
    kill_process(Pid::from_child(&vm), Signal::TERM).unwrap();
    let output = outrigger::wait(vm).unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert!(told.elapsed() < Duration::from_secs(5), "it waited");
}
