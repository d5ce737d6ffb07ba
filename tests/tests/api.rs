//! The control API, from its users' side: a VM's life by it, and what it does to clients that do not behave.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use iced_x86::code_asm::{dword_ptr, eax, ebp};
use rustix::process::Signal;
use serde_json::{Value, json};
use tempfile::NamedTempFile;
use tests::api::{Answer, Vmm, exchange, parse, request};
use tests::lab::{Process, SOON};
use tests::outrigger::{self, has_kvm};
use tests::tiny::{self, FIRST_DEVICE};

/// A guest that says that it runs, and then does so.
fn idle() -> NamedTempFile {
    tiny::guest(|code| {
        code.print_line("ready")?;
        code.halt()
    })
    .unwrap()
}

/// The body of `vm.create` for a guest that prints to the VMM's output.
fn config(kernel: &NamedTempFile) -> String {
    json!({
        "payload": {"kernel": kernel.path()},
        "memory": {"size": 64 << 20},
        "serial": {"mode": "Tty"},
    })
    .to_string()
}

const DONE: Answer = Answer {
    status: 204,
    body: Value::Null,
};

#[test]
fn vm_lives_by_the_api() {
    if !has_kvm() {
        return;
    }
    let mut vmm = Vmm::start(&[]).unwrap();
    let ping = vmm.get("vmm.ping").unwrap();
    assert_eq!(ping.status, 200);
    assert_eq!(ping.body["pid"], vmm.process.id());
    for endpoint in ["vm.info", "vm.counters", "vm.migration"] {
        assert_eq!(vmm.get(endpoint).unwrap().status, 404, "{endpoint}");
    }
    for endpoint in ["vm.boot", "vm.pause", "vm.delete", "vm.reboot"] {
        assert_eq!(vmm.put(endpoint, "").unwrap().status, 404, "{endpoint}");
    }
    let kernel = idle();
    let config = config(&kernel);
    assert_eq!(vmm.put("vm.create", &config).unwrap(), DONE);
    assert_eq!(vmm.put("vm.create", &config).unwrap().status, 409);
    assert_eq!(vmm.state().unwrap(), "Created");
    assert_eq!(vmm.put("vm.pause", "").unwrap().status, 405);
    // What was created can be booted more than once.
    for _ in 0..2 {
        assert_eq!(vmm.put("vm.boot", "").unwrap(), DONE);
        vmm.process.wait_for("ready", SOON).unwrap();
        assert_eq!(vmm.put("vm.boot", "").unwrap().status, 405);
        assert_eq!(vmm.state().unwrap(), "Running");
        assert_eq!(vmm.put("vm.resume", "").unwrap().status, 405);
        assert_eq!(vmm.put("vm.pause", "").unwrap(), DONE);
        vmm.wait_state("Paused").unwrap();
        assert_eq!(vmm.put("vm.pause", "").unwrap().status, 405);
        assert_eq!(vmm.put("vm.resume", "").unwrap(), DONE);
        assert_eq!(vmm.state().unwrap(), "Running");
        assert_eq!(vmm.put("vm.reboot", "").unwrap(), DONE);
        vmm.process.wait_for("ready", SOON).unwrap();
        assert_eq!(vmm.put("vm.power-button", "").unwrap(), DONE);
        let counters = vmm.get("vm.counters").unwrap().body;
        assert_eq!(counters["_memory"]["size"], 64 << 20);
        assert_eq!(vmm.put("vm.shutdown", "").unwrap(), DONE);
        assert_eq!(vmm.state().unwrap(), "Created");
        assert_eq!(vmm.put("vm.shutdown", "").unwrap().status, 405);
    }
    assert_eq!(vmm.put("vm.delete", "").unwrap(), DONE);
    assert_eq!(vmm.get("vm.info").unwrap().status, 404);
    assert_eq!(vmm.put("vmm.shutdown", "").unwrap(), DONE);
    assert!(vmm.process.wait(SOON).unwrap().status.success());
    assert!(!vmm.socket.exists());
}

#[test]
fn reboot_lets_a_paused_vm_run() {
    if !has_kvm() {
        return;
    }
    let kernel = idle();
    let mut vmm = start(&kernel, &[]);
    assert_eq!(vmm.put("vm.pause", "").unwrap(), DONE);
    vmm.wait_state("Paused").unwrap();
    assert_eq!(vmm.put("vm.reboot", "").unwrap(), DONE);
    vmm.process.wait_for("ready", SOON).unwrap();
    assert_eq!(vmm.state().unwrap(), "Running");
}

/// Starts a VMM with a VM, and waits for its guest.
fn start(kernel: &NamedTempFile, more: &[&str]) -> Vmm {
    let kernel = kernel.path().to_str().unwrap();
    let vm = ["--kernel", kernel, "--memory", "size=64M"];
    let mut vmm = Vmm::start(&[&vm, more].concat()).unwrap();
    vmm.process.wait_for("ready", SOON).unwrap();
    vmm
}

#[test]
fn guest_that_powers_off_ends_the_vmm_unless_it_stays() {
    if !has_kvm() {
        return;
    }
    let kernel = tiny::guest(|code| {
        code.print_line("ready")?;
        code.power_off()
    })
    .unwrap();
    let mut vmm = start(&kernel, &[]);
    assert!(vmm.process.wait(SOON).unwrap().status.success());
    assert!(!vmm.socket.exists());
    let mut vmm = start(&kernel, &["--no-shutdown"]);
    vmm.wait_state("Created").unwrap();
    assert_eq!(vmm.put("vm.boot", "").unwrap(), DONE);
    vmm.process.wait_for("ready", SOON).unwrap();
    vmm.wait_state("Created").unwrap();
    vmm.process.signal(Signal::TERM).unwrap();
    assert!(vmm.process.wait(SOON).unwrap().status.success());
}

#[test]
fn vm_that_cannot_be_is_refused() {
    let mut vmm = Vmm::start(&[]).unwrap();
    for (body, named) in [
        (
            r#"{"payload": {"kernel": "k"}, "cpus": {"boot_vcpus": 0, "max_vcpus": 0}}"#,
            "--cpus",
        ),
        (
            r#"{"payload": {"kernel": "k"}, "fs": [{"tag": "t", "socket": "s"}]}"#,
            "fs",
        ),
        (r#"{"payload": {"firmware": "f"}}"#, "kernel"),
        ("", "body"),
        ("{", "body"),
        ("[]", "body"),
    ] {
        let answer = vmm.put("vm.create", body).unwrap();
        assert!(matches!(answer.status, 400 | 500), "{body}: {answer:?}");
        assert!(
            answer.body.to_string().contains(named),
            "{body}: {answer:?}"
        );
        assert_eq!(vmm.get("vm.info").unwrap().status, 404);
    }
    let body = r#"{"payload": {"kernel": "/no/such/kernel"}}"#;
    assert_eq!(vmm.put("vm.create", body).unwrap(), DONE);
    let answer = vmm.put("vm.boot", "").unwrap();
    assert_eq!(answer.status, 500);
    let messages = answer.body.as_array().unwrap();
    assert!(
        messages[1]
            .as_str()
            .unwrap()
            .contains("--kernel /no/such/kernel"),
        "{messages:?}"
    );
    assert_eq!(vmm.state().unwrap(), "Created");
    vmm.process.signal(Signal::INT).unwrap();
    assert!(vmm.process.wait(SOON).unwrap().status.success());
}

#[test]
fn operations_answer_at_the_end_or_at_once() {
    let vmm = Vmm::start(&[]).unwrap();
    let body = r#"{"source_url": "file:///no/such/snapshot"}"#;
    let answer = vmm.put("vm.restore", body).unwrap();
    assert!(answer.status >= 500, "{answer:?}");
    let progress = vmm.get("vm.migration").unwrap();
    assert_eq!(progress.body["operation"], "Restore");
    assert_eq!(progress.body["phase"], "Failed");
    assert_eq!(progress.body["error"], answer.body);
    let length = body.len();
    let head = format!(
        "PUT /api/v1/vm.restore HTTP/1.1\r\nHost: h\r\nPrefer: wait=1, Respond-Async\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{body}"
    );
    let answer = exchange(&vmm.socket, head.as_bytes()).unwrap();
    assert!(
        answer.contains("\r\nPreference-Applied: respond-async\r\n"),
        "{answer}"
    );
    assert_eq!(parse(&answer).unwrap().status, 202);
    let deadline = Instant::now() + SOON;
    while vmm.get("vm.migration").unwrap().body["phase"] == "Preparing" {
        assert!(Instant::now() < deadline);
    }
    assert_eq!(
        request(&vmm.socket, "DELETE", "vm.migration", "")
            .unwrap()
            .status,
        404
    );
    // These need a VM.
    for (endpoint, body) in [
        ("vm.snapshot", r#"{"destination_url": "file:///s"}"#),
        ("vm.send-migration", r#"{"destination_url": "unix:/s"}"#),
    ] {
        assert_eq!(vmm.put(endpoint, body).unwrap().status, 404, "{endpoint}");
    }
}

#[test]
fn requests_that_make_no_sense_change_nothing() {
    if !has_kvm() {
        return;
    }
    let kernel = idle();
    let vmm = start(&kernel, &[]);
    let long = "x".repeat(2 << 20);
    let header = format!("GET /api/v1/vmm.ping HTTP/1.1\r\nHost: h\r\nX: {long}\r\n\r\n");
    let body = format!(
        "PUT /api/v1/vm.create HTTP/1.1\r\nHost: h\r\nContent-Length: {}\r\n\r\n{long}",
        long.len()
    );
    let chunked = format!(
        "PUT /api/v1/vm.create HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n{:x}\r\n{long}\r\n0\r\n\r\n",
        long.len()
    );
    let line = format!("GET /{long} HTTP/1.1\r\nHost: h\r\n\r\n");
    let put = |headers: &str, body: &str| {
        format!("PUT /api/v1/vm.shutdown HTTP/1.1\r\nHost: h\r\n{headers}\r\n{body}")
    };
    for (what, bytes) in [
        ("no HTTP", "hello\r\n\r\n".to_owned()),
        ("no HTTP at all", "\0\u{7f}ELF".repeat(100) + "\r\n\r\n"),
        ("HTTP/2", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_owned()),
        ("long header", header),
        ("long line", line),
        ("long body", body),
        ("long body in chunks", chunked),
        ("no length", put("Content-Length: x\r\n", "")),
        ("negative length", put("Content-Length: -1\r\n", "")),
        (
            "two lengths",
            put("Content-Length: 1\r\nContent-Length: 2\r\n", "ab"),
        ),
        ("bad chunk", put("Transfer-Encoding: chunked\r\n", "zz\r\n")),
        ("unwanted body", put("Content-Length: 2\r\n", "{}")),
        ("truncated body", put("Content-Length: 10\r\n", "{}")),
        (
            "wrong method",
            "POST /api/v1/vm.shutdown HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n".to_owned(),
        ),
        (
            "wrong path",
            "PUT /api/v1/vm.shutdown/ HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n".to_owned(),
        ),
        (
            "wrong version",
            "PUT /api/v2/vm.shutdown HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n".to_owned(),
        ),
    ] {
        // Cut off, or told why.
        let answer = exchange(&vmm.socket, bytes.as_bytes()).unwrap_or_default();
        let is_refused = answer.is_empty() || answer.starts_with("HTTP/1.1 4");
        assert!(is_refused, "{what}: {answer}");
        assert_eq!(vmm.state().unwrap(), "Running", "{what}");
    }
}

#[test]
fn body_may_come_after_its_head_also_where_it_is_not_wanted() {
    let vmm = Vmm::start(&[]).unwrap();
    for (request, status) in [
        ("PUT /api/v1/vm.resize", 404),
        ("PUT /api/v1/vmm.ping", 405),
        ("PUT /api/v1/vm.create", 400),
    ] {
        let mut stream = UnixStream::connect(&vmm.socket).unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        let head = format!(
            "{request} HTTP/1.1\r\nHost: h\r\nConnection: close\r\nContent-Length: 2\r\n\r\n"
        );
        stream.write_all(head.as_bytes()).unwrap();
        // Time enough to be answered and cut off, if that is what happens: others are served after this one.
        for _ in 0..3 {
            assert_eq!(vmm.get("vmm.ping").unwrap().status, 200);
        }
        stream.write_all(b"{}").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert_eq!(parse(&answer).unwrap().status, status, "{request}");
    }
}

#[test]
fn half_a_request_is_cut_off_and_holds_up_nobody() {
    let vmm = Vmm::start(&[]).unwrap();
    let halves = [
        "",
        "PUT /api/v1/vmm.shut",
        "PUT /api/v1/vmm.shutdown HTTP/1.1\r\nHost: h\r\n",
        "PUT /api/v1/vmm.shutdown HTTP/1.1\r\nHost: h\r\nContent-Length: 10\r\n\r\n{",
        // A whole one, and then nothing.
        "GET /api/v1/vmm.ping HTTP/1.1\r\nHost: h\r\n\r\n",
    ];
    // More than are served at once.
    let clients: Vec<_> = halves
        .iter()
        .cycle()
        .take(100)
        .map(|half| {
            let mut stream = UnixStream::connect(&vmm.socket).unwrap();
            stream.set_read_timeout(Some(SOON)).unwrap();
            stream.write_all(half.as_bytes()).unwrap();
            stream
        })
        .collect();
    for mut client in clients {
        let mut answer = String::new();
        client.read_to_string(&mut answer).unwrap();
        let is_fine = answer.is_empty()
            || answer.starts_with("HTTP/1.1 408")
            || answer.starts_with("HTTP/1.1 200");
        assert!(is_fine, "{answer}");
    }
    assert_eq!(vmm.get("vmm.ping").unwrap().status, 200);
}

#[test]
fn half_a_request_holds_up_no_other() {
    let vmm = Vmm::start(&[]).unwrap();
    let mut half = UnixStream::connect(&vmm.socket).unwrap();
    half.write_all(b"GET /api/v1/vm").unwrap();
    assert_eq!(vmm.get("vmm.ping").unwrap().status, 200);
    half.write_all(b"m.ping HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
        .unwrap();
    let mut answer = String::new();
    half.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
}

#[test]
fn api_answers_while_a_device_server_hangs() {
    if !has_kvm() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("demo.sock");
    let mut command = Process::command(outrigger::binary());
    command.args(["serve", "demo", "--socket"]).arg(&socket);
    let mut server = Process::start(&mut command, Path::new("/dev/null")).unwrap();
    server.wait_for("listening", SOON).unwrap();
    let kernel = tiny::guest(|code| {
        let mut again = code.create_label();
        code.store(FIRST_DEVICE + 4, 2)?;
        code.mov(ebp, dword_ptr(FIRST_DEVICE + 0x10))?;
        code.print_line("ready")?;
        code.set_label(&mut again)?;
        code.mov(eax, dword_ptr(ebp))?;
        code.jmp(again)
    })
    .unwrap();
    let device = format!("socket={},id=demo", socket.display());
    let vmm = start(&kernel, &["--user-device", &device]);
    let count = |name: &str| {
        let counters = vmm.get("vm.counters").unwrap().body;
        counters["demo"][name].as_u64().unwrap()
    };
    let in_an_access = || {
        let counters = vmm.get("vm.counters").unwrap().body;
        let count = |name: &str| counters["demo"][name].as_u64().unwrap();
        count("answers") < count("calls")
    };

    server.signal(Signal::STOP).unwrap();
    let stopped = Instant::now();
    while !in_an_access() {
        assert!(stopped.elapsed() < SOON, "the guest does not read");
    }
    assert_eq!(vmm.put("vm.pause", "").unwrap(), DONE);
    let api = &vmm.socket;
    let answers: Vec<_> = thread::scope(|scope| {
        let ask = || {
            let asked = Instant::now();
            let info = request(api, "GET", "vm.info", "").unwrap();
            let counters = request(api, "GET", "vm.counters", "").unwrap();
            assert_eq!((info.status, counters.status), (200, 200));
            (info.body["state"].clone(), asked.elapsed())
        };
        let clients: Vec<_> = (0..32).map(|_| scope.spawn(ask)).collect();
        clients
            .into_iter()
            .map(|client| client.join().unwrap())
            .collect()
    });
    let answered = stopped.elapsed();
    // Before the access is given up: the guest is still in it.
    assert_eq!(vmm.state().unwrap(), "Running");
    server.signal(Signal::CONT).unwrap();
    vmm.wait_state("Paused").unwrap();
    assert!(answered < Duration::from_secs(2), "{answered:?}");
    for (state, latency) in answers {
        assert_eq!(state, "Running");
        assert!(latency < Duration::from_secs(1), "{latency:?}");
    }
    assert_eq!(
        (count("timeouts"), count("faults"), count("lost")),
        (0, 0, 0)
    );
    let before = count("answers");
    assert_eq!(vmm.put("vm.resume", "").unwrap(), DONE);
    let deadline = Instant::now() + SOON;
    while count("answers") <= before {
        assert!(Instant::now() < deadline, "the guest does not go on");
    }
}

#[test]
fn socket_is_its_users_alone() {
    let vmm = Vmm::start(&[]).unwrap();
    let mode = vmm.socket.symlink_metadata().unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o600);
    // Nobody takes it from whoever listens, nor follows a link, and each mistake is one line.
    let socket = vmm.socket.to_str().unwrap();
    let link = vmm.socket.with_extension("link");
    std::os::unix::fs::symlink(vmm.socket.with_extension("target"), &link).unwrap();
    for (path, part) in [
        (socket, "another process"),
        (link.to_str().unwrap(), "not a socket"),
        ("/no/such/folder/api", "No such file"),
        ("path=", "a path is needed"),
    ] {
        let output = outrigger::run(&["--api-socket", path]).unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(
            said.contains("--api-socket") && said.contains(part),
            "{said}"
        );
        assert_eq!(said.lines().count(), 1, "{said}");
    }
    assert!(!vmm.socket.with_extension("target").exists());
    assert_eq!(vmm.get("vmm.ping").unwrap().status, 200);
}

#[test]
fn killed_vmms_socket_is_replaced() {
    let mut vmm = Vmm::start(&[]).unwrap();
    vmm.process.signal(Signal::KILL).unwrap();
    vmm.process.wait(SOON).unwrap();
    let option = format!("path={}", vmm.socket.display());
    let mut command = Process::command(outrigger::binary());
    command.args(["--api-socket", &option]);
    let mut next = Process::start(&mut command, Path::new("/dev/null")).unwrap();
    let deadline = Instant::now() + SOON;
    while request(&vmm.socket, "GET", "vmm.ping", "").is_err() {
        assert!(Instant::now() < deadline);
    }
    next.signal(Signal::TERM).unwrap();
    assert!(next.wait(SOON).unwrap().status.success());
    assert!(!vmm.socket.exists());
}
