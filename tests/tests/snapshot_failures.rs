//! Snapshots that cannot be taken or restored: the error says why, and nothing has changed.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use iced_x86::code_asm::{dword_ptr, eax, ebp, ecx};
use rustix::process::Signal;
use serde_json::{Value, json};
use tempfile::{NamedTempFile, TempDir};
use tests::api::{DONE, Vmm, request};
use tests::lab::{Process, SOON};
use tests::outrigger::{has_kvm, serve_demo};
use tests::skipped::skip;
use tests::tiny::demo::{expect_heard_once, ringer};
use tests::tiny::{self, FIRST_DEVICE, SCRATCH};

/// How long it may take to find out that a device's server hangs.
const BOUND: Duration = Duration::from_secs(10);

/// The demo device: eight bytes to keep things in.
const REGISTER: i32 = 0x08;

/// A VM with the demo device, and the folder that all of its files are in.
struct Machine {
    vmm: Vmm,
    server: Process,
    folder: TempDir,
    _kernel: NamedTempFile,
}

impl Machine {
    fn start(kernel: NamedTempFile, memory: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("demo");
        let server = serve_demo(&socket).unwrap();
        let vmm = Vmm::start(&[
            "--kernel",
            kernel.path().to_str().unwrap(),
            "--memory",
            memory,
            "--user-device",
            &format!("id=demo,socket={}", socket.display()),
        ])
        .unwrap();
        Self {
            vmm,
            server,
            folder,
            _kernel: kernel,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Expects that the VM stands still, can go on, and can be paused again.
    fn is_whole(&mut self) {
        assert_eq!(self.vmm.state().unwrap(), "Paused");
        assert_eq!(self.vmm.put("vm.resume", "").unwrap(), DONE);
        for _ in 0..2 {
            self.vmm.process.wait_for("works", SOON).unwrap();
        }
        self.vmm.pause().unwrap();
    }
}

/// A guest that says again and again that the device works, and fills 4 MiB of memory.
fn worker() -> NamedTempFile {
    tiny::guest(|code| {
        let [mut again, mut fill, mut wrong] = std::array::from_fn(|_| code.create_label());
        code.store(FIRST_DEVICE + 4, 2)?;
        code.mov(ebp, dword_ptr(FIRST_DEVICE + 0x10))?;
        code.mov(ecx, 0x400)?;
        code.set_label(&mut fill)?;
        code.mov(eax, ecx)?;
        code.shl(eax, 12)?;
        code.mov(dword_ptr(eax + (SCRATCH + 0x20_0000).cast_signed()), ecx)?;
        code.dec(ecx)?;
        code.jnz(fill)?;
        code.set_label(&mut again)?;
        code.inc(ecx)?;
        code.mov(dword_ptr(ebp + REGISTER), ecx)?;
        code.cmp(dword_ptr(ebp + REGISTER), ecx)?;
        code.jne(wrong)?;
        code.print_line("works")?;
        code.jmp(again)?;
        code.set_label(&mut wrong)?;
        code.print_line("broken")?;
        code.jmp(again)
    })
    .unwrap()
}

#[test]
fn snapshots_that_fail_leave_the_vm_as_it_was() {
    if !has_kvm() {
        return;
    }
    let mut machine = Machine::start(worker(), "size=64M");
    machine.vmm.process.wait_for("works", SOON).unwrap();
    let running = machine.vmm.snapshot(&machine.path("running")).unwrap();
    assert!(running.is_error(&["running", "paused"]), "{running:?}");
    assert!(!machine.path("running").exists());
    machine.vmm.pause().unwrap();

    let first = machine.path("first");
    assert_eq!(machine.vmm.snapshot(&first).unwrap(), DONE);
    let before = files(&first);
    let again = machine.vmm.snapshot(&first).unwrap();
    assert!(again.is_error(&["first", "already"]), "{again:?}");
    assert_eq!(files(&first), before);
    machine.is_whole();

    fs::write(machine.path("file"), "").unwrap();
    for (path, part) in [
        (machine.path("file"), "not a directory"),
        (machine.path("file/within"), "Not a directory"),
        (machine.path("none/within"), "No such file"),
        // Not even root can.
        ("/sys/snapshot".into(), "ermi"),
    ] {
        let refused = machine.vmm.snapshot(&path).unwrap();
        let path = path.to_str().unwrap();
        assert!(refused.is_error(&[path, part]), "{refused:?}");
        machine.is_whole();
    }

    if let Some(full) = FullFolder::new(machine.path("full")) {
        // It is made there, or is there already.
        let within = full.0.join("within");
        for path in [&within, &full.0] {
            let failed = machine.vmm.snapshot(path).unwrap();
            let path = path.join("ram");
            let parts = [path.to_str().unwrap(), "No space left"];
            assert!(failed.is_error(&parts), "{failed:?}");
            assert_eq!(files(&full.0), [("more".into(), MORE)]);
            machine.is_whole();
        }
    }

    machine.server.signal(Signal::KILL).unwrap();
    machine.vmm.process.wait_for("demo", SOON).unwrap();
    let lost = machine.vmm.snapshot(&machine.path("lost")).unwrap();
    assert!(lost.is_error(&["demo", "lost"]), "{lost:?}");
    assert!(!machine.path("lost").exists());
    assert_eq!(machine.vmm.state().unwrap(), "Paused");
    assert_eq!(machine.vmm.put("vm.resume", "").unwrap(), DONE);
    machine.vmm.process.wait_for("broken", SOON).unwrap();
}

/// Names and lengths of what is in a folder.
fn files(folder: &Path) -> Vec<(String, u64)> {
    let mut files: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| {
            let entry = entry.unwrap();
            let name = entry.file_name().into_string().unwrap();
            (name, entry.metadata().unwrap().len())
        })
        .collect();
    files.sort();
    files
}

/// A file system with little room left.
struct FullFolder(PathBuf);

/// How long the file is that takes up some of that room.
const MORE: u64 = 64 << 10;

impl FullFolder {
    fn new(path: PathBuf) -> Option<Self> {
        fs::create_dir(&path).unwrap();
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", "size=1m", "none"]);
        if !mount
            .arg(&path)
            .status()
            .is_ok_and(|status| status.success())
        {
            skip("a file system of little size cannot be mounted");
            return None;
        }
        File::create(path.join("more"))
            .unwrap()
            .set_len(MORE)
            .unwrap();
        Some(Self(path))
    }
}

impl Drop for FullFolder {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

#[test]
fn snapshot_of_a_vm_whose_device_hangs_fails_soon_and_loses_no_doorbell() {
    if !has_kvm() {
        return;
    }
    let kernel = ringer().unwrap();
    let mut machine = Machine::start(kernel, "size=64M");
    machine.vmm.process.wait_for("ready", SOON).unwrap();
    machine.server.signal(Signal::STOP).unwrap();
    machine.vmm.process.wait_for("rang", SOON).unwrap();
    machine.vmm.pause().unwrap();
    let asked = Instant::now();
    let failed = machine.vmm.snapshot(&machine.path("hung")).unwrap();
    assert!(asked.elapsed() < BOUND, "{:?}", asked.elapsed());
    assert!(failed.is_error(&["demo does not answer"]), "{failed:?}");
    assert!(!machine.path("hung").exists());
    assert_eq!(machine.vmm.state().unwrap(), "Paused");

    // The server may hear the doorbell now, or only when it has been saved as one that nobody has heard.
    machine.server.signal(Signal::CONT).unwrap();
    let snapshot = machine.path("snapshot");
    assert_eq!(machine.vmm.snapshot(&snapshot).unwrap(), DONE);
    heard_once(&mut machine.vmm);

    let other = machine.path("other");
    let _server = serve_demo(&other).unwrap();
    let mut vmm = Vmm::start(&[]).unwrap();
    let places = [("demo", other.as_path())];
    assert_eq!(vmm.restore(&snapshot, false, &places).unwrap(), DONE);
    heard_once(&mut vmm);
}

/// Has a paused guest go on, whose doorbell the device hears exactly once.
fn heard_once(vmm: &mut Vmm) {
    assert_eq!(vmm.put("vm.resume", "").unwrap(), DONE);
    expect_heard_once(&mut vmm.process);
}

#[test]
fn snapshot_that_is_cancelled_leaves_the_vm_as_it_was() {
    if !has_kvm() {
        return;
    }
    const TRIES: usize = 10;
    let mut machine = Machine::start(worker(), "size=2G,prefault=on");
    machine.vmm.process.wait_for("works", SOON).unwrap();
    machine.vmm.pause().unwrap();
    let socket = machine.vmm.socket.clone();
    // It may be done before it is cancelled.
    let is_cancelled = (0..TRIES).any(|number| {
        let path = machine.path(&number.to_string());
        let outcome = thread::scope(|scope| {
            let body = json!({"destination_url": format!("file://{}", path.display())});
            let (body, socket) = (body.to_string(), &socket);
            let taken = scope.spawn(move || request(socket, "PUT", "vm.snapshot", &body).unwrap());
            while !taken.is_finished() {
                let progress = request(socket, "GET", "vm.migration", "").unwrap().body;
                if progress["operation"] == "Snapshot" && progress["copied_bytes"] != 0 {
                    let cancelled = request(socket, "DELETE", "vm.migration", "").unwrap();
                    assert!([204, 404].contains(&cancelled.status), "{cancelled:?}");
                    break;
                }
            }
            taken.join().unwrap()
        });
        assert_eq!(path.exists(), outcome == DONE);
        outcome.is_error(&["vm.snapshot was cancelled"])
    });
    assert!(is_cancelled);
    let progress = machine.vmm.get("vm.migration").unwrap().body;
    assert_eq!(progress["phase"], "Cancelled");
    machine.is_whole();
}

#[test]
fn corrupted_snapshots_are_refused_and_the_good_one_is_restored() {
    if !has_kvm() {
        return;
    }
    let mut machine = Machine::start(worker(), "size=64M");
    machine.vmm.process.wait_for("works", SOON).unwrap();
    machine.vmm.pause().unwrap();
    let good = machine.path("good");
    assert_eq!(machine.vmm.snapshot(&good).unwrap(), DONE);
    machine.vmm.process.signal(Signal::KILL).unwrap();
    machine.vmm.process.wait(SOON).unwrap();
    let mut vmm = Vmm::start(&[]).unwrap();

    type Corrupt<'a> = &'a dyn Fn(&Path);
    let cut = |path: PathBuf, length| {
        let file = File::options().write(true).open(path).unwrap();
        file.set_len(length).unwrap();
    };
    let edit = |folder: &Path, pointer: &str, value: Value| {
        let path = folder.join("machine.json");
        let mut document: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        *document.pointer_mut(pointer).unwrap() = value;
        fs::write(path, document.to_string()).unwrap();
    };
    let cases: &[(&str, Corrupt<'_>, &[&str])] = &[
        (
            "nothing",
            &|at| fs::remove_dir_all(at).unwrap(),
            &["No such file"],
        ),
        (
            "incomplete",
            &|at| fs::remove_file(at.join("machine.json")).unwrap(),
            &["no complete snapshot"],
        ),
        (
            "short document",
            &|at| cut(at.join("machine.json"), 1000),
            &["machine.json"],
        ),
        (
            "empty document",
            &|at| cut(at.join("machine.json"), 0),
            &["machine.json"],
        ),
        (
            "short RAM",
            &|at| cut(at.join("ram"), 63 << 20),
            &["ram", "67108864"],
        ),
        (
            "no RAM",
            &|at| fs::remove_file(at.join("ram")).unwrap(),
            &["ram", "No such file"],
        ),
        (
            "no device",
            &|at| fs::remove_file(at.join("device-0")).unwrap(),
            &["device-0", "No such file"],
        ),
        (
            "short device",
            &|at| cut(at.join("device-0"), 100),
            &["device-0", "100 bytes"],
        ),
        (
            "empty device",
            &|at| cut(at.join("device-0"), 0),
            &["device-0", "0 bytes"],
        ),
        (
            "garbage for a device",
            &|at| {
                let path = at.join("device-0");
                let length = fs::metadata(&path).unwrap().len();
                fs::write(path, vec![0x5a; length.try_into().unwrap()]).unwrap();
            },
            &["demo"],
        ),
        (
            "other version",
            &|at| edit(at, "/machine/version", json!(77)),
            &["machine.json", "version 77"],
        ),
        (
            "other name of the device",
            &|at| edit(at, "/machine/devices/0/id", json!("other")),
            &["other", "demo"],
        ),
        (
            "other name of the device's state",
            &|at| edit(at, "/state/pci/endpoints/0/id", json!("other")),
            &["demo"],
        ),
        (
            "other RAM",
            &|at| edit(at, "/machine/config/memory/size", json!(128 << 20)),
            &["RAM"],
        ),
        (
            "RAM elsewhere",
            &|at| edit(at, "/machine/ram/0/end", json!(32 << 20)),
            &["RAM"],
        ),
        (
            "more vCPUs",
            &|at| edit(at, "/machine/config/vcpus", json!(2)),
            &["vCPUs"],
        ),
        (
            "no vCPUs",
            &|at| edit(at, "/machine/config/vcpus", json!(0)),
            &["between 1 and 254 vCPUs"],
        ),
        (
            "more vCPUs than there can be",
            &|at| edit(at, "/machine/config/vcpus", json!(u32::MAX)),
            &["between 1 and 254 vCPUs"],
        ),
        (
            "wild registers",
            &|at| edit(at, "/state/vcpus/0/sregs", json!("00")),
            &["machine.json", "length"],
        ),
        (
            "wild BARs",
            &|at| edit(at, "/state/pci/endpoints/0/config/bars", json!([])),
            &["machine.json"],
        ),
    ];
    for (what, corrupt, parts) in cases {
        let bad = machine.path("bad");
        fs::create_dir(&bad).unwrap();
        for (name, _) in files(&good) {
            fs::copy(good.join(&name), bad.join(&name)).unwrap();
        }
        corrupt(&bad);
        let refused = vmm.restore(&bad, true, &[]).unwrap();
        assert!(refused.is_error(parts), "{what}: {refused:?}");
        println!("{what}: {}", refused.body);
        assert_eq!(vmm.get("vm.info").unwrap().status, 404, "{what}");
        let _ = fs::remove_dir_all(&bad);
    }
    let unknown = vmm.restore(&good, true, &[("other", &good)]).unwrap();
    assert!(unknown.is_error(&["devices", "other"]), "{unknown:?}");
    let nobody = vmm.restore(&good, true, &[("demo", &good)]).unwrap();
    assert!(
        nobody.is_error(&["demo", good.to_str().unwrap()]),
        "{nobody:?}"
    );
    assert_eq!(vmm.restore(&good, true, &[]).unwrap(), DONE);
    vmm.process.wait_for("works", SOON).unwrap();
    let said = vmm.process.lines().iter();
    assert!(said.clone().all(|line| line.text != "broken"), "{said:?}");
}
