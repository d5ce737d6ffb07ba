//! Migration: a VM goes from one process to another while it runs, and goes on there, whole.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use iced_x86::code_asm::{al, bl, dword_ptr, eax, ebp, ecx, esp};
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

/// Where the guest has its stack.
const STACK: u32 = SCRATCH + 0x2000;

/// A guest that counts, fills memory with what it has counted, and says each letter of the alphabet in its turn. Before
/// each it checks what it has filled memory with the last time: if that is wrong, it says '?'.
fn counter() -> NamedTempFile {
    /// Memory that it writes to over and over, in double words.
    const FIELD: u32 = 0x800;
    const FIELD_AT: u32 = SCRATCH + 0x10_0000;
    tiny::guest(|code| {
        code.print_line("ready")?;
        code.mov(esp, STACK)?;
        code.mov(bl, u32::from(b'A'))?;
        code.xor(eax, eax)?;
        let mut again = code.create_label();
        code.set_label(&mut again)?;
        // Each double word has its number and the round.
        let mut fill = code.create_label();
        code.inc(eax)?;
        code.xor(ecx, ecx)?;
        code.set_label(&mut fill)?;
        code.mov(ebp, eax)?;
        code.add(ebp, ecx)?;
        code.mov(dword_ptr(FIELD_AT) + ecx * 4, ebp)?;
        code.inc(ecx)?;
        code.cmp(ecx, FIELD)?;
        code.jne(fill)?;
        let mut check = code.create_label();
        let mut right = code.create_label();
        code.xor(ecx, ecx)?;
        code.set_label(&mut check)?;
        code.mov(ebp, eax)?;
        code.add(ebp, ecx)?;
        code.cmp(dword_ptr(FIELD_AT) + ecx * 4, ebp)?;
        code.je(right)?;
        code.push(eax)?;
        code.print(b'?')?;
        code.pop(eax)?;
        code.set_label(&mut right)?;
        code.inc(ecx)?;
        code.cmp(ecx, FIELD)?;
        code.jne(check)?;
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

#[test]
fn guest_goes_there_and_back() {
    if !has_kvm() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let kernel = counter();
    let kernel = kernel.path().to_str().unwrap();
    let mut vmm = Vmm::start(&["--kernel", kernel, "--memory", "size=64M"]).unwrap();
    vmm.process.wait_for("ready", SOON).unwrap();
    let mut said = String::new();
    let urls = [
        format!("unix:{}", folder.path().join("a").display()),
        free_port(),
        format!("unix:{}", folder.path().join("b").display()),
        free_port(),
    ];
    for (url, connections) in urls.iter().zip([1, 1, 4, 4]) {
        vmm.process.wait_for("C", SOON).unwrap();
        let next = Vmm::start(&[]).unwrap();
        let receiving = next.begin("vm.receive-migration", &json!({"receiver_url": url}));
        next.wait_phase("Listening").unwrap();
        let request = json!({"destination_url": url, "connections": connections});
        let sent = vmm.put("vm.send-migration", &request.to_string()).unwrap();
        assert_eq!(sent, DONE);
        assert_eq!(receiving.join().unwrap().unwrap(), DONE);
        assert_eq!(next.state().unwrap(), "Running");
        vmm.process.wait(SOON).unwrap();
        said += &letters(&vmm);
        vmm = next;
    }
    vmm.process.wait_for("C", SOON).unwrap();
    assert_eq!(vmm.put("vmm.shutdown", "").unwrap(), DONE);
    vmm.process.wait(SOON).unwrap();
    said += &letters(&vmm);
    let alphabet = ('A'..='Z').cycle();
    assert!(said.len() > 10, "{said}");
    assert!(said.chars().eq(alphabet.take(said.len())), "{said}");
}

/// The letters that the guest of a VMM that has ended has said.
fn letters(vmm: &Vmm) -> String {
    let lines = vmm.process.lines().iter().map(|line| line.text.trim_end());
    lines.filter(|line| line.len() == 1).collect()
}

/// The address of a port that nobody has.
fn free_port() -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    format!("tcp:{}", listener.local_addr().unwrap())
}
