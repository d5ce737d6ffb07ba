//! What a process can do in the sandbox, and what ends it. Each case is a process of its own: this program, started again
//! with the name of a case. (The test harness has threads, which nothing that enters a sandbox may have.)
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::UdpSocket;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::Duration;
use std::{env, thread};

use device_servers::sandbox::{self, Role, SandboxError};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::process::{Pid, Signal, kill_process};

/// A case: its name, and what a process does in the sandbox.
type Case = (&'static str, fn());

/// What a server does. The process goes on.
const ALLOWED: [Case; 4] = [
    ("has threads", || {
        let sleep = || thread::sleep(Duration::from_millis(1));
        let thread = thread::Builder::new().name("worker".into()).spawn(sleep);
        thread.unwrap().join().unwrap();
    }),
    ("talks", || {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let [mut ours, mut theirs] = [ours, theirs].map(|end| File::from(OwnedFd::from(end)));
        ours.write_all(b"x").unwrap();
        let second = Timespec {
            tv_sec: 1,
            tv_nsec: 0,
        };
        poll(&mut [PollFd::new(&theirs, PollFlags::IN)], Some(&second)).unwrap();
        theirs.read_exact(&mut [0]).unwrap();
    }),
    ("has memory", || {
        let file = memfd_create("memory", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(file.as_fd(), 1 << 20).unwrap();
        let memory = vec![1_u8; 64 << 20];
        assert_eq!(
            memory.iter().map(|byte| u32::from(*byte)).sum::<u32>(),
            64 << 20
        );
    }),
    ("logs", || eprintln!("a line")),
];

/// What a server does not do. The process ends there.
const FORBIDDEN: [Case; 7] = [
    ("opens a file", || drop(File::open("/dev/null"))),
    ("removes a file", || drop(fs::remove_file("/no/such/file"))),
    ("makes a socket", || drop(UdpSocket::bind("127.0.0.1:0"))),
    ("connects", || drop(UnixStream::connect("/no/such/socket"))),
    ("starts a program", || drop(Command::new("true").status())),
    ("becomes a program", || drop(Command::new("true").exec())),
    ("sends a signal", || {
        let _ = kill_process(Pid::INIT, Signal::CONT);
    }),
];

/// The variable that tells a process which case it is.
const CASE: &str = "SANDBOX_CASE";

fn main() {
    if let Ok(case) = env::var(CASE) {
        return be(&case);
    }
    println!("\nrunning {} tests", ALLOWED.len() + FORBIDDEN.len() + 1);
    threads_are_noticed();
    for (name, _) in ALLOWED {
        let status = start(name);
        assert!(status.success(), "{name}: {status}");
        println!("test a server {name} ... ok");
    }
    for (name, _) in FORBIDDEN {
        let status = start(name);
        let signal = status.signal();
        assert_eq!(signal, Some(Signal::SYS.as_raw()), "{name}: {status}");
        println!("test whoever {name} is killed ... ok");
    }
}

/// A sandbox would be each thread's own.
fn threads_are_noticed() {
    let (sender, receiver) = mpsc::channel::<()>();
    let other = thread::spawn(move || receiver.recv());
    let entered = sandbox::enter(Role::Demo);
    assert!(
        matches!(entered, Err(SandboxError::Threads(2))),
        "{entered:?}"
    );
    drop(sender);
    other.join().unwrap().unwrap_err();
    println!("test threads are noticed ... ok");
}

fn start(case: &str) -> ExitStatus {
    let mut command = Command::new(env::current_exe().unwrap());
    command
        .env(CASE, case)
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    command.status().unwrap()
}

/// What a process does that is a case.
fn be(case: &str) {
    let mut cases = ALLOWED.iter().chain(&FORBIDDEN);
    let (_, act) = cases.find(|(name, _)| *name == case).unwrap();
    sandbox::enter(Role::Demo).unwrap();
    act();
}
