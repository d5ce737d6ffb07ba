//! The servers of a VM's own devices: what they are left with, and that they end with the VM, however that ends.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use iced_x86::code_asm::{dword_ptr, ptr};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};
use tempfile::{NamedTempFile, TempDir};
use tests::lab::{Process, SOON};
use tests::outrigger::{self, has_kvm};
use tests::skipped::skip;
use tests::tiny::{self, FIRST_DEVICE, RESET, SCRATCH};

#[test]
fn server_has_its_device_and_nothing_else() {
    if !has_kvm() {
        return;
    }
    let image = Image::new();
    // Whoever starts a VM may have left a file open.
    let mut command = Process::command(Path::new("/bin/sh"));
    command.args(["-c", r#"exec "$0" "$@" 7</etc/passwd"#]);
    command.arg(outrigger::binary());
    let _vm = image.start_by(command, &waits_for_loss());
    let server = image.server().unwrap();
    server.expect_sandbox(&image.path);
}

#[test]
fn server_of_a_network_card_has_its_tap_and_nothing_else() {
    if !has_kvm() {
        return;
    }
    let id = format!("net{}", std::process::id());
    let mut command = Process::command(outrigger::binary());
    let kernel = waits_for_loss();
    command.arg("--kernel").arg(kernel.path());
    command.args(["--memory", "size=64M", "--net"]);
    command.arg(format!("num_queues=4,id={id}"));
    let mut vm = Process::start(&mut command, Path::new("/dev/null")).unwrap();
    if let Err(error) = vm.wait_for("ready", SOON) {
        let says = |text: &str| vm.lines().iter().any(|line| line.text.contains(text));
        let has_no_taps = says("CAP_NET_ADMIN") || says("cannot open /dev/net/tun");
        assert!(has_no_taps, "{error:#}");
        skip("no tap can be made (CAP_NET_ADMIN, /dev/net/tun, `ip`)");
        return;
    }
    let server = Server::find("net", &format!("--id={id}")).unwrap();
    server.expect_sandbox(Path::new("/dev/net/tun"));
    vm.signal(Signal::TERM).unwrap();
    vm.wait(SOON).unwrap();
    assert!(server.has_ended(Duration::ZERO));
}

#[test]
fn list_of_processes_tells_whose_a_server_is() {
    if !has_kvm() {
        return;
    }
    let image = Image::new();
    let _vm = image.start(&waits_for_loss());
    let server = image.server().unwrap();
    // Behind the name: the state, the parent, the process group and the session (proc_pid_stat(5)).
    let stat = server.read("stat");
    let (name, fields) = stat.split_once(") ").unwrap();
    assert!(name.ends_with("(outrigger-disk"), "{name}");
    let fields: Vec<_> = fields.split(' ').collect();
    assert_eq!(fields[3], server.pid.to_string(), "no session of its own");
    let arguments = server.read("cmdline");
    let path = image.path.display();
    let expected = format!(
        "outrigger serve disk --id=root --path={path} --vm={} ",
        fields[1]
    );
    assert_eq!(arguments.replace('\0', " "), expected);
}

#[test]
fn killed_server_takes_its_device_away_and_leaves_no_zombie() {
    if !has_kvm() {
        return;
    }
    let image = Image::new();
    let mut vm = image.start(&waits_for_loss());
    let server = image.server().unwrap();
    kill_process(server.pid, Signal::KILL).unwrap();
    vm.wait_for("root: its server has ended: signal: 9", SOON)
        .unwrap();
    assert!(!server.folder().exists(), "it is a zombie");
    assert!(vm.wait(SOON).unwrap().status.success());
    for text in ["gone", "root: the server closed the connection"] {
        let said = vm.lines().iter().filter(|line| line.text.contains(text));
        assert_eq!(said.count(), 1, "{text}");
    }
}

#[test]
fn servers_end_with_a_vm_that_is_ended() {
    if !has_kvm() {
        return;
    }
    let image = Image::new();
    for signal in [Signal::TERM, Signal::INT, Signal::HUP, Signal::KILL] {
        let mut vm = image.start(&waits_for_loss());
        let server = image.server().unwrap();
        vm.signal(signal).unwrap();
        vm.wait(SOON).unwrap();
        // A VM that can waits for them, so that the next one finds the image free.
        let patience = match signal {
            Signal::KILL => SOON,
            _ => Duration::ZERO,
        };
        assert!(server.has_ended(patience), "{signal:?}");
    }
}

#[test]
fn servers_end_with_a_vm_that_ends() {
    if !has_kvm() {
        return;
    }
    let image = Image::new();
    let disk = format!("path={}", image.path.display());
    let power_off = tiny::guest(|code| code.power_off());
    let triple_fault = tiny::guest(|code| {
        code.store(SCRATCH, 0)?;
        code.store(SCRATCH + 4, 0)?;
        code.lidt(ptr(SCRATCH))?;
        code.ud2()
    });
    // The first reset is not the end.
    let resets = tiny::guest(|code| {
        let mut second = code.create_label();
        code.inc(dword_ptr(SCRATCH))?;
        code.cmp(dword_ptr(SCRATCH), 2)?;
        code.je(second)?;
        code.outb(RESET, 1)?;
        code.halt()?;
        code.set_label(&mut second)?;
        code.power_off()
    });
    for (kernel, flag, status) in [
        (&power_off, "--console=off", 0),
        (&triple_fault, "--console=off", 4),
        (&resets, "--console=off", 0),
        (&resets, "--no-reboot", 3),
        // What goes wrong when there are servers already.
        (&power_off, "--user-device=socket=/no/such/socket", 1),
    ] {
        let kernel = kernel.as_ref().unwrap().path().to_str().unwrap();
        let output = outrigger::run(&["--kernel", kernel, "--disk", &disk, flag]).unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(status), "{said}");
        assert!(image.server().is_none(), "{flag}");
        assert!(!said.contains("its server has ended"), "{flag}: {said}");
    }
}

#[test]
fn disk_for_any_vmm_is_in_the_sandbox_too() {
    if !has_kvm() {
        return;
    }
    let image = Image::new();
    let socket = image.path.with_extension("sock");
    let serve = || {
        let mut command = Process::command(outrigger::binary());
        command.args(["serve", "disk", "--path"]).arg(&image.path);
        command.arg("--socket").arg(&socket);
        let mut process = Process::start(&mut command, Path::new("/dev/null")).unwrap();
        process.wait_for("listening", SOON).unwrap();
        process
    };
    let mut first = serve();
    first.signal(Signal::KILL).unwrap();
    first.wait(SOON).unwrap();
    assert!(socket.exists());
    let mut second = serve();
    let mode = fs::metadata(&socket).unwrap().permissions().mode();
    assert_eq!(mode & 0o077, 0, "others may connect");

    for _ in 0..2 {
        let kernel = tiny::guest(|code| code.power_off()).unwrap();
        let output = outrigger::run_with_device(kernel.path(), &socket).unwrap();
        assert!(output.status.success());
    }
    second.signal(Signal::TERM).unwrap();
    second.wait(SOON).unwrap();
}

/// An image in a folder of its own.
struct Image {
    path: PathBuf,
    _folder: TempDir,
}

impl Image {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image.raw");
        File::create(&path).unwrap().set_len(1 << 20).unwrap();
        Self {
            path,
            _folder: folder,
        }
    }

    /// Starts a VM with this disk, and waits for its guest.
    fn start(&self, kernel: &NamedTempFile) -> Process {
        self.start_by(Process::command(outrigger::binary()), kernel)
    }

    fn start_by(&self, mut command: Command, kernel: &NamedTempFile) -> Process {
        command.arg("--kernel").arg(kernel.path());
        command.args(["--memory", "size=64M", "--disk"]);
        command.arg(format!("id=root,path={}", self.path.display()));
        let mut vm = Process::start(&mut command, Path::new("/dev/null")).unwrap();
        vm.wait_for("ready", SOON).unwrap();
        vm
    }

    /// The process that serves it, if there is one.
    fn server(&self) -> Option<Server> {
        Server::find("disk", &format!("--path={}", self.path.display()))
    }
}

/// A server's process.
struct Server {
    pid: Pid,
    /// Readable when it has ended.
    end: OwnedFd,
}

impl Server {
    /// The server of such a device that was started with this argument, if there is one. (A zombie has no arguments.)
    fn find(device: &str, argument: &str) -> Option<Self> {
        let is_it = |pid: &Pid| {
            let arguments = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let arguments: Vec<_> = arguments.split('\0').collect();
            arguments.starts_with(&["outrigger", "serve", device]) && arguments.contains(&argument)
        };
        let processes = fs::read_dir("/proc").unwrap().flatten();
        let numbers = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        let pid = numbers.filter_map(Pid::from_raw).find(is_it)?;
        let end = pidfd_open(pid, PidfdFlags::empty()).unwrap();
        Some(Self { pid, end })
    }

    /// Expects that it can do nothing, and has nothing open but `file` and what every server has.
    fn expect_sandbox(&self, file: &Path) {
        const OPEN: [&str; 4] = [
            "socket:",
            "anon_inode:[eventfd]",
            "anon_inode:[io_uring]",
            "/memfd:guest-ram",
        ];
        let files = fs::read_dir(self.folder().join("fd")).unwrap().flatten();
        let files = files.map(|file| (file.file_name(), fs::read_link(file.path()).unwrap()));
        let strange = files.filter(|(number, target)| {
            let is = |kind: &str| target.to_str().unwrap().starts_with(kind);
            !match number.to_str().unwrap() {
                "0" | "1" => is("/dev/null"),
                "2" => is("pipe:"),
                _ => target == file || OPEN.iter().any(|kind| is(kind)),
            }
        });
        assert_eq!(strange.collect::<Vec<_>>(), []);
        let current = fs::read_link(self.folder().join("cwd")).unwrap();
        assert_eq!(current, Path::new("/"));
        for thread in fs::read_dir(self.folder().join("task")).unwrap().flatten() {
            let status = fs::read_to_string(thread.path().join("status")).unwrap();
            let field = |name: &str| {
                let mut lines = status.lines();
                lines
                    .find_map(|line| line.strip_prefix(name))
                    .unwrap()
                    .trim()
            };
            for set in ["CapInh:", "CapPrm:", "CapEff:", "CapAmb:"] {
                assert_eq!(field(set), "0000000000000000", "{set}");
            }
            assert_eq!((field("NoNewPrivs:"), field("Seccomp:")), ("1", "2"));
        }
        let limits = self.read("limits");
        let core = limits.lines().find(|line| line.contains("core file size"));
        let core: Vec<_> = core.unwrap().split_whitespace().skip(4).take(2).collect();
        assert_eq!(core, ["0", "0"]);
    }

    fn has_ended(&self, patience: Duration) -> bool {
        let patience = Timespec::try_from(patience).unwrap();
        let mut end = [PollFd::new(&self.end, PollFlags::IN)];
        poll(&mut end, Some(&patience)).unwrap() > 0
    }

    fn read(&self, file: &str) -> String {
        fs::read_to_string(self.folder().join(file)).unwrap()
    }

    fn folder(&self) -> PathBuf {
        format!("/proc/{}", self.pid).into()
    }
}

/// A guest that waits for its first device to go, and then powers off.
fn waits_for_loss() -> NamedTempFile {
    tiny::guest(|code| {
        code.print_line("ready")?;
        code.wait_for(FIRST_DEVICE, u32::MAX)?;
        code.print_line("gone")?;
        code.power_off()
    })
    .unwrap()
}
