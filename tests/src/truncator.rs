//! A device server that takes away what it has given: the memory behind a BAR.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::sync::Arc;

use iced_x86::code_asm::{dword_ptr, eax, ebp, edi};
use rustix::fs::{MemfdFlags, memfd_create};
use tempfile::NamedTempFile;
use vfio_user_server::{Bar, Description, Device};

use crate::device_thread::{DeviceThread, IDS};
use crate::tiny::{self, FIRST_DEVICE};

/// The file behind BAR 1; a write to BAR 0 truncates it.
struct Truncator(Arc<File>);

impl Device for Truncator {
    fn read(&mut self, _: usize, _: u64, _: &mut [u8]) -> io::Result<()> {
        Err(ErrorKind::InvalidInput.into())
    }

    fn write(&mut self, bar: usize, _: u64, _: &[u8]) -> io::Result<()> {
        if bar == 0 { self.0.set_len(0) } else { Ok(()) }
    }

    fn reset(&mut self) {}
}

/// Starts the server.
///
/// # Errors
/// When it does not start.
pub fn serve() -> anyhow::Result<DeviceThread> {
    const SIZE: u64 = 0x1000;
    let file = File::from(memfd_create("bar", MemfdFlags::CLOEXEC)?);
    file.set_len(SIZE)?;
    let file = Arc::new(file);
    let mapped = Bar::memory32(SIZE).backed_by(Arc::clone(&file));
    let description = Description::new(IDS)
        .bar(0, Bar::memory32(SIZE))
        .bar(1, mapped.mappable(0..SIZE));
    DeviceThread::custom(description, |_| Truncator(file))
}

/// A guest that prints A when the BAR is memory, and B when it then reads as all-ones.
///
/// # Errors
/// When its file cannot be written.
pub fn guest() -> anyhow::Result<NamedTempFile> {
    tiny::guest(|code| {
        let mut wrong = code.create_label();
        code.store(FIRST_DEVICE + 4, 2)?;
        code.mov(ebp, dword_ptr(FIRST_DEVICE + 0x10))?;
        code.mov(edi, dword_ptr(FIRST_DEVICE + 0x14))?;
        code.mov(dword_ptr(edi), 0x1234_5678)?;
        code.mov(eax, dword_ptr(edi))?;
        code.cmp(eax, 0x1234_5678)?;
        code.jne(wrong)?;
        code.print(b'A')?;
        code.mov(dword_ptr(ebp), 1)?;
        code.mov(eax, dword_ptr(edi))?;
        code.cmp(eax, -1)?;
        code.jne(wrong)?;
        code.print(b'B')?;
        code.set_label(&mut wrong)?;
        code.power_off()
    })
}
