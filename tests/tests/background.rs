//! A VM in the background of a terminal: what is typed there is not for it, and does not stop it.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::io::Write;
use std::process::{Command, Stdio};

use iced_x86::code_asm::{eax, ebx};
use tests::outrigger::{self, has_kvm};
use tests::tiny;

#[test]
fn background_job_leaves_the_terminal_alone() {
    if !has_kvm() {
        return;
    }
    // Long enough for what is typed to arrive: a billion cycles.
    let kernel = tiny::guest(|code| {
        let mut again = code.create_label();
        code.rdtsc()?;
        code.mov(ebx, eax)?;
        code.set_label(&mut again)?;
        code.rdtsc()?;
        code.sub(eax, ebx)?;
        code.cmp(eax, 1_000_000_000)?;
        code.jb(again)?;
        code.power_off()
    })
    .unwrap();
    // script(1) gives the shell a terminal, and -m puts its job into the background of that.
    let job = format!(
        "{} --kernel {} --memory size=64M & wait %1; echo status $?",
        outrigger::binary().display(),
        kernel.path().display()
    );
    let mut script = Command::new("script")
        .args([
            "--quiet",
            "--command",
            &format!("bash -mc '{job}'"),
            "/dev/null",
        ])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut keyboard = script.stdin.take().unwrap();
    keyboard.write_all(b"typed\n").unwrap();
    let output = outrigger::wait(script).unwrap();
    let printed = String::from_utf8_lossy(&output.stdout);
    assert!(printed.contains("status 0"), "{printed}");
}
