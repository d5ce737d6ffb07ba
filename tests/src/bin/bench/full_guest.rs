//! A guest all of whose memory is in use.

use iced_x86::IcedError;
use iced_x86::code_asm::{dword_ptr, ebx, ecx};
use tempfile::NamedTempFile;
use tests::tiny::{self, Code};

/// What the guest prints when all of its memory is in use, and then over and over.
pub(crate) const READY: u8 = b'R';
const ALIVE: u8 = b'.';

/// What the guest does when all of its memory is in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Life {
    /// Nothing: its vCPU is halted.
    Idle,
    /// It prints without a pause, so that everybody sees when it stands still.
    Talking,
    /// It also writes to memory: to the next page of 64 MiB between one character and the next.
    Writing,
}

/// A guest that has written to each page of its memory behind the first 16 MiB, says [`READY`], and then lives like this.
pub(crate) fn full_guest(mebibytes: u32, life: Life) -> anyhow::Result<NamedTempFile> {
    const START: u32 = 16 << 20;
    const WRITTEN: u32 = 64 << 20;
    const PAGE: i32 = 4096;
    let end = mebibytes << 20;
    tiny::guest(|code| {
        fill(code, START, end)?;
        code.print(READY)?;
        code.mov(ecx, START)?;
        let mut again = code.create_label();
        let mut within = code.create_label();
        code.set_label(&mut again)?;
        match life {
            Life::Idle => code.hlt()?,
            Life::Talking | Life::Writing => code.print(ALIVE)?,
        }
        if life == Life::Writing {
            code.inc(dword_ptr(ecx))?;
            code.add(ecx, PAGE)?;
            code.cmp(ecx, (START + WRITTEN).cast_signed())?;
            code.jb(within)?;
            code.mov(ecx, START)?;
        }
        code.set_label(&mut within)?;
        code.jmp(again)
    })
}

/// Writes something else to each page.
fn fill(code: &mut Code, start: u32, end: u32) -> Result<(), IcedError> {
    code.mov(ebx, start)?;
    let mut again = code.create_label();
    code.set_label(&mut again)?;
    code.mov(dword_ptr(ebx), ebx)?;
    code.add(ebx, 4096)?;
    code.cmp(ebx, end.cast_signed())?;
    code.jb(again)
}
