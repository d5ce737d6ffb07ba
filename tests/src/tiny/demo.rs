//! Guests that work with the demo device.

use std::time::Instant;

use iced_x86::IcedError;
use iced_x86::code_asm::{
    CodeLabel, al, byte_ptr, dword_ptr, eax, ebp, ebx, ecx, edi, edx, esi, esp,
};
use tempfile::NamedTempFile;

use super::disk::{Job, endless_disk_guest_beside};
use super::{Code, FIRST_DEVICE, LOCAL_APIC, SCRATCH, guest};
use crate::lab::{Process, SOON};

/// What a guest prints when something is wrong.
pub const WRONG: u8 = b'?';

/// Interrupts of the device that have come.
const INTERRUPTS: u32 = SCRATCH + 0x100;
/// The first of three vectors of the device's.
const VECTOR: u8 = 0x60;

/// Has this CPU work with the demo device in configuration space at `device` for ever: it writes and reads a register,
/// and has each of three vectors come. `then` is what it does after each round, whose number is in EBX; EBP, EDI and ESI
/// are not its own. Says [`WRONG`], and no more, if something is not right, or `then` goes where it is told.
///
/// # Errors
/// As all of [`Code`].
pub fn use_demo(
    code: &mut Code,
    device: u32,
    apic: u32,
    then: impl FnOnce(&mut Code, CodeLabel) -> Result<(), IcedError>,
) -> Result<(), IcedError> {
    const REGISTER: i32 = 0x08;
    const RAISE: i32 = 0x10;
    // Memory space, bus master and no INTx.
    code.store(device + 4, 0x406)?;
    code.mov(ebp, dword_ptr(device + 0x10))?;
    code.mov(edi, dword_ptr(device + 0x14))?;
    for vector in 0..3 {
        let entry = edi + vector * 16;
        code.mov(dword_ptr(entry), LOCAL_APIC | apic << 12)?;
        code.mov(dword_ptr(entry + 4), 0)?;
        code.mov(dword_ptr(entry + 8), i32::from(VECTOR) + vector)?;
        code.mov(dword_ptr(entry + 12), 0)?;
    }
    // MSI-X on.
    code.store(device + 0xb0, 1 << 31)?;
    let [mut again, mut wrong] = std::array::from_fn(|_| code.create_label());
    code.xor(ebx, ebx)?;
    code.xor(esi, esi)?;
    code.set_label(&mut again)?;
    code.inc(ebx)?;
    code.mov(dword_ptr(ebp + REGISTER), ebx)?;
    for vector in 0..3 {
        code.inc(esi)?;
        code.mov(dword_ptr(ebp + RAISE), vector)?;
        let mut wait = code.create_label();
        code.set_label(&mut wait)?;
        code.pause()?;
        code.cmp(dword_ptr(INTERRUPTS), esi)?;
        code.jb(wait)?;
        // Not one too many either.
        code.ja(wrong)?;
    }
    code.cmp(dword_ptr(ebp + REGISTER), ebx)?;
    code.jne(wrong)?;
    then(code, wrong)?;
    code.jmp(again)?;
    code.set_label(&mut wrong)?;
    code.print(WRONG)?;
    code.print(b'\n')?;
    code.halt()?;
    for vector in VECTOR..VECTOR + 3 {
        code.begin_handler(vector)?;
        code.inc(dword_ptr(INTERRUPTS))?;
        code.end_handler()?;
    }
    Ok(())
}

/// What follows is done in every 16th round only, up to the label that is returned.
fn now_and_then(code: &mut Code) -> Result<CodeLabel, IcedError> {
    let quiet = code.create_label();
    code.test(ebx, 0xf)?;
    code.jnz(quiet)?;
    Ok(quiet)
}

/// Has a CPU that [uses the device](use_demo) say '.' every now and then.
///
/// # Errors
/// As all of [`Code`].
pub fn say_dots(code: &mut Code, _: CodeLabel) -> Result<(), IcedError> {
    let mut quiet = now_and_then(code)?;
    code.print_line(".")?;
    code.set_label(&mut quiet)
}

/// Pages that the guest writes to in turn: a word of each has the number of the round.
const FIELD: u32 = 0x300_0000;
const PAGES: u32 = 0x100;
const PAGE: u32 = 0x1000;

/// A guest for all that there is: its first CPU does these jobs with a disk over and over, its second works with the
/// demo device behind it and with memory, which it checks, and says the letters from a to z, one after the other. It needs
/// 64 MiB of memory.
///
/// # Errors
/// As of [`guest()`].
pub fn worker(jobs: &[Job]) -> anyhow::Result<NamedTempFile> {
    /// The letter that is to come.
    const LETTER: u32 = SCRATCH + 0x108;
    /// The second CPU's stack.
    const STACK: u32 = SCRATCH + 0x4000;
    endless_disk_guest_beside(jobs, |code| {
        code.allow_interrupts()?;
        code.mov(esp, STACK)?;
        code.store(LETTER, u32::from(b'a'))?;
        // As if there had been rounds before.
        for round in 1..=PAGES {
            let before = round.wrapping_sub(PAGES);
            code.store(FIELD + round % PAGES * PAGE, before)?;
        }
        use_demo(code, FIRST_DEVICE + (1 << 15), 1, |code, wrong| {
            code.mov(ecx, ebx)?;
            code.and(ecx, PAGES.cast_signed() - 1)?;
            code.shl(ecx, PAGE.ilog2())?;
            code.lea(edx, dword_ptr(ebx - PAGES))?;
            code.cmp(dword_ptr(ecx + FIELD), edx)?;
            code.jne(wrong)?;
            code.mov(dword_ptr(ecx + FIELD), ebx)?;
            let mut quiet = now_and_then(code)?;
            code.mov(al, byte_ptr(LETTER))?;
            code.print_al()?;
            code.print(b'\n')?;
            code.inc(dword_ptr(LETTER))?;
            code.cmp(dword_ptr(LETTER), u32::from(b'z') + 1)?;
            code.jne(quiet)?;
            code.store(LETTER, u32::from(b'a'))?;
            code.set_label(&mut quiet)
        })
    })
}

/// A guest with the demo device that says `ready`. When the device does not answer, it rings its doorbell once and says
/// `rang`. Later it says how often that was heard: `#` and the number.
///
/// # Errors
/// As of [`guest()`].
pub fn ringer() -> anyhow::Result<NamedTempFile> {
    /// The first doorbell, and how often it has rung.
    const BELL: i32 = 0x800;
    const RUNG: i32 = 0x80;
    guest(|code| {
        let [mut works, mut heard] = std::array::from_fn(|_| code.create_label());
        code.store(FIRST_DEVICE + 4, 2)?;
        code.mov(ebp, dword_ptr(FIRST_DEVICE + 0x10))?;
        code.print_line("ready")?;
        code.set_label(&mut works)?;
        code.cmp(dword_ptr(ebp), -1)?;
        code.jne(works)?;
        code.mov(dword_ptr(ebp + BELL), 1)?;
        code.print_line("rang")?;
        code.set_label(&mut heard)?;
        code.mov(eax, dword_ptr(ebp + RUNG))?;
        code.cmp(eax, -1)?;
        code.je(heard)?;
        code.mov(ebx, eax)?;
        code.print(b'#')?;
        code.mov(eax, ebx)?;
        code.add(eax, i32::from(b'0'))?;
        code.print_al()?;
        code.print(b'\n')?;
        code.jmp(heard)
    })
}

/// Expects that the doorbell of the [`ringer`] has been heard exactly once, if not at once.
///
/// # Panics
/// When it has not.
pub fn expect_heard_once(guest: &mut Process) {
    let mut next = || {
        guest
            .wait_for("#", SOON)
            .map(|line| line.text)
            .unwrap_or_default()
    };
    let mut said = next();
    let deadline = Instant::now() + SOON;
    while said == "#0" {
        assert!(Instant::now() < deadline, "it is not heard");
        said = next();
    }
    for _ in 0..5 {
        assert_eq!(said, "#1");
        said = next();
    }
}
