//! A device server that takes away what it has given: the memory behind a BAR.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;

use iced_x86::code_asm::{dword_ptr, eax, ebp, edi};
use rustix::fs::{MemfdFlags, memfd_create};
use tempfile::NamedTempFile;

use crate::device_thread::{Bar, DeviceThread, Registers};
use crate::tiny::{self, FIRST_DEVICE};

/// The file behind BAR 1; a write to BAR 0 truncates it.
struct Truncator(File);

impl Registers for Truncator {
    fn read(&mut self, _: u32, _: u64, _: &mut [u8]) -> io::Result<()> {
        Err(ErrorKind::InvalidInput.into())
    }

    fn write(&mut self, bar: u32, _: u64, _: &[u8]) -> io::Result<()> {
        if bar == 0 { self.0.set_len(0) } else { Ok(()) }
    }
}

/// Starts the server.
///
/// # Errors
/// When it does not start.
pub fn serve() -> anyhow::Result<DeviceThread> {
    const SIZE: u64 = 0x1000;
    let file: File = memfd_create("bar", MemfdFlags::CLOEXEC)?.into();
    file.set_len(SIZE)?;
    let trapped = Bar {
        size: SIZE,
        ..Bar::default()
    };
    let mapped = Bar {
        file: Some(file.as_raw_fd()),
        ..trapped
    };
    DeviceThread::custom(Truncator(file), &[trapped, mapped])
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
