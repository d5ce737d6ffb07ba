//! Mistakes on the command line: each is one line that names the flag, exit status 1, and nothing is left behind.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::fs::File;
use std::os::unix::net::UnixListener;
use std::process::{Command, Output, Stdio};

use tempfile::TempDir;
use tests::outrigger::{self, has_kvm};
use tests::tiny;

fn run(arguments: &[&str]) -> Output {
    outrigger::run(arguments).unwrap()
}

/// Expects that a command line fails with one line that has all of `parts` in it.
fn expect_mistake(arguments: &[&str], parts: &[&str]) {
    let output = run(arguments);
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{arguments:?}: {said}");
    assert_eq!(said.trim_end().lines().count(), 1, "{arguments:?}: {said}");
    for part in parts {
        assert!(said.contains(part), "{arguments:?}: no `{part}` in: {said}");
    }
    assert_eq!(output.stdout, b"");
}

#[test]
fn files_that_cannot_be_booted_are_named() {
    expect_mistake(
        &["--kernel", "/no/such/kernel"],
        &["--kernel /no/such/kernel", "No such file"],
    );
    expect_mistake(
        &["--kernel", "/tmp"],
        &["--kernel /tmp", "not a regular file"],
    );
    let kernel = tiny::guest(|code| code.halt()).unwrap();
    let kernel = kernel.path().to_str().unwrap();
    let initramfs = ["--kernel", kernel, "--initramfs", "/no/such/initramfs"];
    expect_mistake(
        &initramfs,
        &["--initramfs /no/such/initramfs", "No such file"],
    );
}

#[test]
fn absurd_values_are_refused() {
    let kernel = tiny::guest(|code| code.halt()).unwrap();
    let kernel = kernel.path().to_str().unwrap();
    for (flag, value, parts) in [
        ("--memory", "size=1M", ["size=1048576", "64M"]),
        ("--memory", "size=999999T", ["--memory", "1024T"]),
        ("--memory", "size=much", ["size=much", "512M"]),
        ("--memory", "size=", ["size=", "512M"]),
        (
            "--memory",
            "size=99999999999999999999",
            ["--memory", "512M"],
        ),
        ("--memory", "size=1G,size=2G", ["--memory", "twice"]),
        (
            "--memory",
            "hugepages=maybe",
            ["hugepages=maybe", "on or off"],
        ),
        ("--memory", "sise=1G", ["unknown key `sise`", "size"]),
        (
            "--memory",
            "size=1G,shared=off",
            ["shared=off", "always shared"],
        ),
        ("--cpus", "0", ["--cpus", "between 1 and"]),
        ("--cpus", "100000", ["--cpus", "between 1 and"]),
        ("--cpus", "boot=many", ["--cpus", "boot=many"]),
        ("--serial", "pty", ["--serial", "socket=PATH"]),
        (
            "--serial",
            "file=/no/such/folder/file",
            ["--serial file=/no/such/folder/file", "No such file"],
        ),
        ("--console", "tty", ["--console", "off"]),
        (
            "--user-device",
            "id=d",
            ["--user-device", "`socket=` is missing"],
        ),
        ("--user-device", "path=/s", ["unknown key `path`", "socket"]),
        ("--disk", "readonly=on", ["--disk", "`path=` is missing"]),
        ("--disk", "path=", ["--disk", "a path is needed"]),
        ("--disk", "path=d,format=qcow2", ["--disk", "queue_size"]),
        ("--disk", "path=d,queue_size=x", ["--disk", "queue_size=x"]),
    ] {
        // The serial port is opened last, when there is a VM.
        if flag == "--serial" && value.starts_with("file") && !has_kvm() {
            continue;
        }
        expect_mistake(&["--kernel", kernel, flag, value], &parts);
    }
}

#[test]
fn unknown_flags_are_named() {
    expect_mistake(
        &["--kernel", "k", "--frobnicate"],
        &["--frobnicate", "--help"],
    );
    expect_mistake(&[], &["--kernel", "--help"]);
}

#[test]
fn files_that_are_no_kernels_are_refused() {
    if !has_kvm() {
        return;
    }
    for (contents, part) in [
        (b"".as_slice(), "neither a bzImage nor an ELF file"),
        (b"#!/bin/sh\n", "neither a bzImage nor an ELF file"),
        (&[0; 4096], "neither a bzImage nor an ELF file"),
        (b"\x7fELF", "--kernel"),
    ] {
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("kernel");
        std::fs::write(&path, contents).unwrap();
        let path = path.to_str().unwrap();
        expect_mistake(&["--kernel", path], &["--kernel", path, part]);
    }
}

#[test]
fn sockets_without_a_server_are_named() {
    if !has_kvm() {
        return;
    }
    let kernel = tiny::guest(|code| code.halt()).unwrap();
    let kernel = kernel.path().to_str().unwrap();
    let folder = TempDir::new().unwrap();
    let absent = folder.path().join("absent.sock");
    let abandoned = folder.path().join("abandoned.sock");
    drop(UnixListener::bind(&abandoned).unwrap());
    for (socket, part) in [(absent, "No such file"), (abandoned, "refused")] {
        let option = format!("socket={},id=disk", socket.display());
        let parts = [
            "--user-device",
            socket.to_str().unwrap(),
            "disk",
            "start its server",
            part,
        ];
        expect_mistake(&["--kernel", kernel, "--user-device", &option], &parts);
    }
}

#[test]
fn images_that_cannot_be_served_are_named() {
    if !has_kvm() {
        return;
    }
    let kernel = tiny::guest(|code| code.halt()).unwrap();
    let kernel = kernel.path().to_str().unwrap();
    let folder = TempDir::new().unwrap();
    let image = folder.path().join("image.raw");
    File::create(&image).unwrap().set_len(1 << 20).unwrap();
    let image = image.to_str().unwrap();
    let expect = |disks: &[&str], flag: &str, part: &str| {
        let arguments = [&["--kernel", kernel, "--disk"], disks].concat();
        expect_mistake(&arguments, &[flag, part]);
    };
    let absent = ["path=/no/such/image"];
    let refusal = "--disk: cannot open /no/such/image: No such file";
    expect(&absent, "outrigger: ", refusal);
    expect(&["path=/dev/null"], "--disk: /dev/null", "block device");
    let (disk, flag) = (format!("path={image}"), format!("--disk path={image}: "));
    expect(&[&disk, &disk], &format!("--disk: {image}"), "in use");
    let short = format!("{disk},queue_size=100");
    expect(&[&short], &flag, "power of two");
    // Nothing is left of the servers that did start.
    let after = format!("{disk},num_queues=0");
    expect(&[&disk, absent[0]], "outrigger: ", refusal);
    expect(&[&after], &flag, "queues");
}

#[test]
fn nobody_hears_of_a_list_that_nobody_reads() {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut command = Command::new(outrigger::binary());
    let output = command
        .args(["vfio", "list"])
        .stdout(writer)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
        .wait_with_output()
        .unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    assert!(output.status.success());
}

#[test]
fn nothing_is_left_behind_by_a_serial_socket() {
    if !has_kvm() {
        return;
    }
    let folder = TempDir::new().unwrap();
    let socket = folder.path().join("serial.sock");
    let option = format!("socket={}", socket.display());
    let kernel = tiny::guest(|code| code.power_off()).unwrap();
    let arguments = [
        "--kernel",
        kernel.path().to_str().unwrap(),
        "--serial",
        &option,
    ];
    assert_eq!(run(&arguments).status.code(), Some(0));
    assert!(!socket.exists());
    // A socket of a VM that was killed is no obstacle.
    drop(UnixListener::bind(&socket).unwrap());
    assert_eq!(run(&arguments).status.code(), Some(0));
    // That of one which runs is.
    let _running = UnixListener::bind(&socket).unwrap();
    expect_mistake(&arguments, &["--serial socket=", "in use"]);
    assert!(socket.exists());
}

#[test]
fn snapshots_that_cannot_be_restored_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().to_str().unwrap();
    let url = format!("source_url=file://{path},resume=on");
    expect_mistake(&["--restore", &url], &[path, "no complete snapshot"]);
    let none = format!("source_url=file://{path}/none,resume=on");
    expect_mistake(&["--restore", &none], &["none", "No such file"]);
    for (value, part) in [
        ("resume=on", "source_url"),
        ("source_url=/relative,resume=on", "file:///PATH"),
        ("source_url=file:///s,resume=maybe", "on or off"),
        ("source_url=file:///s", "resume=on"),
    ] {
        expect_mistake(&["--restore", value], &["--restore", part]);
    }
    let also = ["--restore", &url, "--disk", "path=/d"];
    expect_mistake(&also, &["--restore", "--disk"]);
}
