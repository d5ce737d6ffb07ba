//! Snapshots: a paused VM's state goes into a directory, and a VM in another process goes on from there.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::fs;
use std::path::Path;

use iced_x86::code_asm::{al, bl, dword_ptr, eax, ebp, ecx};
use serde_json::{Value, json};
use tempfile::NamedTempFile;
use tests::api::{Answer, Vmm};
use tests::lab::SOON;
use tests::outrigger::has_kvm;
use tests::tiny::{self, SCRATCH};

const DONE: Answer = Answer {
    status: 204,
    body: Value::Null,
};

/// A guest that counts, fills memory with what it has counted, and says each letter of the alphabet in its turn.
fn counter() -> NamedTempFile {
    /// Memory that it writes to over and over, in double words.
    const FIELD: u32 = 0x10_0000;
    tiny::guest(|code| {
        code.print_line("ready")?;
        code.mov(bl, u32::from(b'A'))?;
        code.xor(eax, eax)?;
        let mut again = code.create_label();
        let mut count = code.create_label();
        code.set_label(&mut again)?;
        code.mov(ecx, 0x400)?;
        code.set_label(&mut count)?;
        code.inc(eax)?;
        code.mov(ebp, eax)?;
        code.and(ebp, FIELD - 1)?;
        code.mov(dword_ptr(SCRATCH + 0x10_0000) + ebp * 4, eax)?;
        code.dec(ecx)?;
        code.jnz(count)?;
        code.push(eax)?;
        code.mov(al, bl)?;
        code.print_al()?;
        code.print(b'\n')?;
        code.pop(eax)?;
        let mut within = code.create_label();
        code.inc(bl)?;
        code.cmp(bl, u32::from(b'Z') + 1)?;
        code.jne(within)?;
        code.mov(bl, u32::from(b'A'))?;
        code.set_label(&mut within)?;
        code.jmp(again)
    })
    .unwrap()
}

fn url(path: &Path) -> String {
    format!("file://{}", path.display())
}

fn snapshot(vmm: &Vmm, path: &Path) {
    let body = json!({"destination_url": url(path)}).to_string();
    assert_eq!(vmm.put("vm.snapshot", &body).unwrap(), DONE);
}

fn restore(path: &Path, resume: bool) -> Vmm {
    let vmm = Vmm::start(&[]).unwrap();
    let body = json!({"source_url": url(path), "resume": resume}).to_string();
    assert_eq!(vmm.put("vm.restore", &body).unwrap(), DONE);
    vmm
}

#[test]
fn guest_goes_on_in_another_process() {
    if !has_kvm() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let [first, second] = ["first", "second"].map(|name| folder.path().join(name));
    let kernel = counter();
    let kernel = kernel.path().to_str().unwrap();
    let mut vmm = Vmm::start(&["--kernel", kernel, "--memory", "size=64M"]).unwrap();
    vmm.process.wait_for("ready", SOON).unwrap();
    vmm.process.wait_for("Z", SOON).unwrap();
    assert_eq!(vmm.put("vm.pause", "").unwrap(), DONE);
    vmm.wait_state("Paused").unwrap();
    snapshot(&vmm, &first);
    assert_eq!(vmm.state().unwrap(), "Paused");
    let said = said_until_the_end(vmm);

    let vmm = restore(&first, false);
    assert_eq!(vmm.state().unwrap(), "Paused");
    snapshot(&vmm, &second);
    assert!(fs::read(first.join("ram")).unwrap() == fs::read(second.join("ram")).unwrap());
    let [before, after] = [&first, &second].map(|path| timeless_state(path));
    for (name, before) in before.as_object().unwrap() {
        assert!(
            after[name] == *before,
            "{name}: {before:#}, then {:#}",
            after[name]
        );
    }
    assert_eq!(vmm.put("vm.resume", "").unwrap(), DONE);
    let mut vmm = vmm;
    vmm.process.wait_for("Z", SOON).unwrap();
    let all: String = [said, said_until_the_end(vmm)].concat();
    let alphabet = ('A'..='Z').cycle();
    assert!(all.len() > 26);
    assert!(all.chars().eq(alphabet.take(all.len())), "{all}");
}

/// Ends a VMM, and returns the letters that its guest has said.
fn said_until_the_end(mut vmm: Vmm) -> String {
    assert_eq!(vmm.put("vmm.shutdown", "").unwrap(), DONE);
    vmm.process.wait(SOON).unwrap();
    let lines = vmm.process.lines().iter().map(|line| line.text.trim_end());
    lines.filter(|line| line.len() == 1).collect()
}

/// What `machine.json` says, but for what changes with time.
fn timeless_state(path: &Path) -> Value {
    let document = fs::read(path.join("machine.json")).unwrap();
    let mut document: Value = serde_json::from_slice(&document).unwrap();
    let mut state = document["state"].take();
    state["clock"].take();
    // The timer keeps when it was started.
    state["chips"]["pit"].take();
    for vcpu in state["vcpus"].as_array_mut().unwrap() {
        vcpu["tsc"].take();
    }
    state
}
