//! A guest that counts.

use iced_x86::code_asm::{al, bl, dword_ptr, eax, ebp, ecx, esp};
use tempfile::NamedTempFile;

use super::{SCRATCH, STACK, guest};

/// A guest that counts, fills memory with what it has counted, and says each letter of the alphabet in its turn.
///
/// # Errors
/// As of [`guest()`].
pub fn counter() -> anyhow::Result<NamedTempFile> {
    /// Memory that it writes to over and over, in double words.
    const FIELD: u32 = 0x10_0000;
    guest(|code| {
        code.print_line("ready")?;
        code.mov(esp, STACK)?;
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
}
