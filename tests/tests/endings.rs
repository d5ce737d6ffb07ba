//! How runs of a guest end: each in its own way, with a message and an exit status of its own.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::process::Output;

use iced_x86::code_asm::{dword_ptr, eax, ptr};
use tempfile::NamedTempFile;
use tests::outrigger::{self, has_kvm};
use tests::tiny::{RESET, SCRATCH, guest};

fn boot(kernel: &NamedTempFile, more: &[&str]) -> Output {
    let kernel = kernel.path().to_str().unwrap();
    let mut arguments = vec!["--kernel", kernel, "--memory", "size=64M"];
    arguments.extend(more);
    outrigger::run(&arguments).unwrap()
}

fn status(output: &Output) -> Option<i32> {
    output.status.code()
}

fn printed(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn power_off_is_success() {
    if !has_kvm() {
        return;
    }
    let kernel = guest(|code| {
        for character in *b"hello" {
            code.print(character)?;
        }
        code.power_off()
    });
    let output = boot(&kernel.unwrap(), &[]);
    assert_eq!(
        (status(&output), printed(&output).as_str()),
        (Some(0), "hello")
    );
}

/// Counts its boots in memory that a reset leaves alone.
fn boots_three_times() -> NamedTempFile {
    guest(|code| {
        let mut third = code.create_label();
        code.print(b'R')?;
        code.inc(dword_ptr(SCRATCH))?;
        code.cmp(dword_ptr(SCRATCH), 3)?;
        code.je(third)?;
        code.outb(RESET, 1)?;
        code.halt()?;
        code.set_label(&mut third)?;
        code.power_off()
    })
    .unwrap()
}

#[test]
fn reset_starts_the_guest_again() {
    if !has_kvm() {
        return;
    }
    let output = boot(&boots_three_times(), &["--cpus", "3"]);
    assert_eq!(
        (status(&output), printed(&output).as_str()),
        (Some(0), "RRR")
    );
}

#[test]
fn reset_can_be_made_the_end() {
    if !has_kvm() {
        return;
    }
    let output = boot(&boots_three_times(), &["--no-reboot"]);
    assert_eq!((status(&output), printed(&output).as_str()), (Some(3), "R"));
    assert!(
        said(&output).contains("the guest reset"),
        "{}",
        said(&output)
    );
}

#[test]
fn keyboard_controller_resets() {
    if !has_kvm() {
        return;
    }
    let kernel = guest(|code| {
        code.outb(0x64, 0xfe)?;
        code.halt()
    });
    assert_eq!(status(&boot(&kernel.unwrap(), &["--no-reboot"])), Some(3));
}

#[test]
fn triple_fault_is_told() {
    if !has_kvm() {
        return;
    }
    let kernel = guest(|code| {
        // No interrupt descriptor can be read from a table of no length.
        code.store(SCRATCH, 0)?;
        code.store(SCRATCH + 4, 0)?;
        code.lidt(ptr(SCRATCH))?;
        code.ud2()
    });
    let output = boot(&kernel.unwrap(), &[]);
    assert_eq!(status(&output), Some(4), "{}", said(&output));
    assert!(
        said(&output).contains("triple fault on vCPU 0"),
        "{}",
        said(&output)
    );
}

#[test]
fn emulation_failure_names_the_instruction() {
    if !has_kvm() {
        return;
    }
    let kernel = guest(|code| {
        // There is nothing at this address that could be executed.
        code.mov(eax, 0xd000_0000u32)?;
        code.jmp(eax)
    });
    let output = boot(&kernel.unwrap(), &[]);
    assert_eq!(status(&output), Some(5), "{}", said(&output));
    assert!(
        said(&output).contains("cannot emulate the instruction at 0xd0000000"),
        "{}",
        said(&output)
    );
}

#[test]
fn many_vcpus_wait_for_the_first() {
    if !has_kvm() {
        return;
    }
    let kernel = guest(|code| code.power_off()).unwrap();
    let output = boot(&kernel, &["--cpus", "64"]);
    assert_eq!(status(&output), Some(0), "{}", said(&output));
}
