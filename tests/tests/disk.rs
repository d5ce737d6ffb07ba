//! A disk whose driver is a tiny guest: what is written is read back, and the VMM has no part in it.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::fs;
use std::io::Read;
use std::process::Child;

use tempfile::NamedTempFile;
use tests::device_thread::DeviceThread;
use tests::outrigger::{self, has_kvm};
use tests::tapped_socket::TappedSocket;
use tests::tiny::disk::{BEGIN, END, Job, disk_guest};

// Comparing takes time where KVM only emulates.
const SIZE: u64 = 1 << 19;

/// Reads what the guest says up to a character, which is to be the next.
fn expect(vm: &mut Child, character: u8) {
    let mut byte = [0];
    vm.stdout.as_mut().unwrap().read_exact(&mut byte).unwrap();
    assert_eq!(char::from(byte[0]), char::from(character));
}

/// Writes to the image, reads what it has written, and returns the image.
fn write_and_read(job: Job) -> Vec<u8> {
    let image = NamedTempFile::new().unwrap();
    image.as_file().set_len(SIZE).unwrap();
    let device = DeviceThread::disk(image.path()).unwrap();
    let socket = TappedSocket::before(device.socket()).unwrap();
    let reads = Job {
        writes: false,
        ..job
    };
    let kernel = disk_guest(&[job, reads]).unwrap();
    let kernel = kernel.path().to_str().unwrap();
    let user_device = format!("socket={}", socket.path().display());
    let arguments = ["--kernel", kernel, "--memory", "size=64M", "--user-device"];
    let mut vm = outrigger::start(&[arguments.as_slice(), &[&user_device]].concat()).unwrap();
    expect(&mut vm, BEGIN);
    let before = socket.bytes();
    assert!(before > 0, "the driver has set the device up by messages");
    for character in [END, BEGIN, END] {
        expect(&mut vm, character);
    }
    assert_eq!(socket.bytes(), before, "I/O takes messages");
    vm.kill().unwrap();
    outrigger::wait(vm).unwrap();
    drop(device);
    fs::read(image.path()).unwrap()
}

/// As [`write_and_read`], with a server of the VM's own.
fn write_and_read_in_sandbox(job: Job) -> Vec<u8> {
    let image = NamedTempFile::new().unwrap();
    image.as_file().set_len(SIZE).unwrap();
    let reads = Job {
        writes: false,
        ..job
    };
    let kernel = disk_guest(&[job, reads]).unwrap();
    let kernel = kernel.path().to_str().unwrap();
    let disk = format!("path={}", image.path().display());
    let arguments = ["--kernel", kernel, "--memory", "size=64M", "--disk", &disk];
    let mut vm = outrigger::start(&arguments).unwrap();
    for character in [BEGIN, END, BEGIN, END] {
        expect(&mut vm, character);
    }
    vm.kill().unwrap();
    outrigger::wait(vm).unwrap();
    fs::read(image.path()).unwrap()
}

/// Expects every piece of the image to say where it is, at both ends, and to be the same as all others in between.
fn expect_stamps(image: &[u8], length: usize) {
    let first = image.get(4..length - 4).unwrap();
    assert!(first.iter().any(|byte| *byte != 0));
    for (piece, number) in image.chunks_exact(length).zip(0..) {
        let sector = u32::try_from(number * length / 512).unwrap().to_le_bytes();
        assert_eq!(
            (&piece[..4], &piece[length - 4..]),
            (&sector[..], &sector[..])
        );
        assert_eq!(&piece[4..length - 4], first, "piece {number}");
    }
}

#[test]
fn steady_io_sends_no_message_and_has_its_data_right() {
    if !has_kvm() {
        return;
    }
    let short = Job {
        writes: true,
        length: 4096,
        depth: 32,
        requests: 128,
        random: false,
        checked: true,
        size: SIZE,
    };
    expect_stamps(&write_and_read(short), 4096);
    expect_stamps(&write_and_read_in_sandbox(short), 4096);
    let one_at_a_time = Job {
        depth: 1,
        random: true,
        requests: 50,
        ..short
    };
    write_and_read(one_at_a_time);
    let long = Job {
        length: 1 << 16,
        depth: 4,
        requests: 8,
        ..short
    };
    expect_stamps(&write_and_read(long), 1 << 16);
}
