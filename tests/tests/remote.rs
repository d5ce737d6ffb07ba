//! `outrigger remote` and `--event-monitor`: what they print, and how they end.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::fs;
use std::process::Output;
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::process::Signal;
use serde_json::{Value, json};
use tempfile::NamedTempFile;
use tests::api::Vmm;
use tests::lab::{Process, SOON};
use tests::outrigger::{self, has_kvm};
use tests::tiny;

/// A guest that says that it runs, and then does so.
fn idle() -> NamedTempFile {
    tiny::guest(|code| {
        code.print_line("ready")?;
        code.halt()
    })
    .unwrap()
}

/// What was said, and the exit status.
fn end(output: &Output) -> (String, Option<i32>) {
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    (said, output.status.code())
}

fn succeed(vmm: &Vmm, arguments: &[&str]) -> Value {
    let output = vmm.remote(arguments).unwrap();
    assert_eq!(end(&output), (String::new(), Some(0)), "{arguments:?}");
    serde_json::from_slice(&output.stdout).unwrap_or_default()
}

#[test]
fn vm_lives_by_the_command_line() {
    if !has_kvm() {
        return;
    }
    let kernel = idle();
    let config = NamedTempFile::new().unwrap();
    let body = json!({
        "payload": {"kernel": kernel.path()},
        "memory": {"size": 64 << 20},
        "serial": {"mode": "Tty"},
    });
    fs::write(&config, body.to_string()).unwrap();
    let mut vmm = Vmm::start(&[]).unwrap();
    assert_eq!(succeed(&vmm, &["ping"])["pid"], vmm.process.id());
    let created = ["create", config.path().to_str().unwrap()];
    assert_eq!(succeed(&vmm, &created), Value::Null);
    assert_eq!(succeed(&vmm, &["info"])["state"], "Created");
    succeed(&vmm, &["boot"]);
    vmm.process.wait_for("ready", SOON).unwrap();
    succeed(&vmm, &["pause"]);
    vmm.wait_state("Paused").unwrap();
    succeed(&vmm, &["resume"]);
    succeed(&vmm, &["power-button"]);
    succeed(&vmm, &["reboot"]);
    vmm.process.wait_for("ready", SOON).unwrap();
    assert_eq!(succeed(&vmm, &["counters"])["_memory"]["size"], 64 << 20);
    succeed(&vmm, &["shutdown"]);
    succeed(&vmm, &["delete"]);
    succeed(&vmm, &["shutdown-vmm"]);
    assert!(vmm.process.wait(SOON).unwrap().status.success());
}

#[test]
fn exit_status_tells_what_came_of_it() {
    let mut vmm = Vmm::start(&[]).unwrap();
    for (arguments, part) in [
        (&["info"] as &[&str], "vm.info: there is no VM"),
        (&["pause"], "vm.pause: there is no VM"),
        (&["counters"], "vm.counters: there is no VM"),
        (&["snapshot", "file:///s"], "vm.snapshot: there is no VM"),
        (&["snapshot", "/s"], "is not file:///PATH"),
        (&["migrate", "unix:/s"], "vm.send-migration: there is no VM"),
        (
            &["migrate", "unix:/s", "--connections", "17"],
            "between 1 and 16",
        ),
        (&["receive", "http://h"], "tcp:HOST:PORT"),
        (&["restore", "file:///no/such/snapshot"], "vm.restore: "),
        (
            &["restore", "file:///s", "--device", "path=p"],
            "has no id=",
        ),
        (&["cancel"], "there is no operation"),
        (&["create", "/no/such/file"], "cannot read /no/such/file"),
        (&["frobnicate"], "frobnicate"),
    ] {
        let (said, status) = end(&vmm.remote(arguments).unwrap());
        assert_eq!(status, Some(1), "{arguments:?}: {said}");
        assert!(said.contains(part), "{arguments:?}: {said}");
        assert_eq!(said.lines().count(), 1, "{arguments:?}: {said}");
    }
    vmm.process.signal(Signal::TERM).unwrap();
    vmm.process.wait(SOON).unwrap();
    // Nobody is asked now.
    let (said, status) = end(&vmm.remote(&["ping"]).unwrap());
    assert_eq!(status, Some(2), "{said}");
    assert!(said.contains("cannot connect"), "{said}");
}

#[test]
fn events_tell_a_vms_life() {
    if !has_kvm() {
        return;
    }
    let before = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let (events, device) = (
        folder.path().join("events"),
        folder.path().join("demo.sock"),
    );
    let mut command = Process::command(outrigger::binary());
    command.args(["serve", "demo", "--socket"]).arg(&device);
    let mut server = Process::start(&mut command, "/dev/null".as_ref()).unwrap();
    server.wait_for("listening", SOON).unwrap();
    let monitor = format!("path={}", events.display());
    let device = format!("socket={},id=demo", device.display());
    let kernel = idle();
    let mut vmm = Vmm::start(&[
        "--event-monitor",
        &monitor,
        "--kernel",
        kernel.path().to_str().unwrap(),
        "--memory",
        "size=64M",
        "--user-device",
        &device,
    ])
    .unwrap();
    vmm.process.wait_for("ready", SOON).unwrap();
    succeed(&vmm, &["pause"]);
    vmm.wait_state("Paused").unwrap();
    succeed(&vmm, &["resume"]);
    succeed(&vmm, &["reboot"]);
    server.signal(Signal::KILL).unwrap();
    vmm.process.wait_for("demo: ", SOON).unwrap();
    succeed(&vmm, &["shutdown-vmm"]);
    vmm.process.wait(SOON).unwrap();

    let text = fs::read_to_string(events).unwrap();
    let told = text.lines().map(|line| serde_json::from_str(line).unwrap());
    // When a pause has come about is told by another thread, sooner or later.
    let told: Vec<Value> = told
        .filter(|event: &Value| event["event"] != "paused")
        .collect();
    let names: Vec<_> = told
        .iter()
        .map(|event| format!("{} {}", event["source"], event["event"]).replace('"', ""))
        .collect();
    let expected = [
        "vmm starting",
        "vm created",
        "vm booting",
        "vm booted",
        "vm pausing",
        "vm resumed",
        "vm rebooting",
        "vm rebooted",
        "device lost",
        "vm shutdown",
        "vmm shutdown",
    ];
    assert_eq!(names, expected);
    let lost = told.iter().find(|event| event["event"] == "lost").unwrap();
    assert_eq!(lost["properties"]["id"], "demo");
    let time = |event: &Value, clock: &str| {
        let part = |name: &str| event[clock][name].as_u64().unwrap();
        (part("secs"), part("nanos"))
    };
    let times: Vec<_> = told.iter().map(|event| time(event, "timestamp")).collect();
    assert!(times.is_sorted(), "{times:?}");
    assert!(
        told.iter()
            .all(|event| time(event, "time").0 >= before.as_secs())
    );
}
