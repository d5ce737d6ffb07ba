//! A device behind a server that nobody here wrote, and a guest that uses all of it that does not need Linux.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use guest::{
    DMA_ADDRESS, DMA_COMMAND, DMA_LENGTH, DMA_STATUS, DMA_WRITE, MAGIC_VALUE, MAPPED, RAISE,
    RAM_DATA, RAM_OFFSET, RAM_TRAPS,
};
use iced_x86::IcedError;
use iced_x86::code_asm::{CodeLabel, dword_ptr, ebp, ebx, edi};
use tests::foreign::ForeignDevice;
use tests::outrigger::{self, has_kvm};
use tests::tiny::{self, Code, FIRST_DEVICE, LOCAL_APIC, SCRATCH};

const COMMAND: u32 = FIRST_DEVICE + 0x04;
const BAR0: u32 = FIRST_DEVICE + 0x10;
const BAR1: u32 = FIRST_DEVICE + 0x14;
const BAR2: u32 = FIRST_DEVICE + 0x18;
const MSIX: u32 = FIRST_DEVICE + 0x40;
/// Memory space, bus master, INTx disabled.
const ENABLED: u32 = 0x406;

/// Where the device writes to, and where interrupts are counted.
const BUFFER: u32 = SCRATCH + 0x4000;
const COUNT: u32 = SCRATCH + 0x100;

/// Goes on if a register of the device, whose BAR 0 is at EBP, has this value.
fn expect(
    code: &mut Code,
    register: u64,
    value: u32,
    otherwise: CodeLabel,
) -> Result<(), IcedError> {
    code.cmp(dword_ptr(ebp + at(register)), value)?;
    code.jne(otherwise)
}

fn set(code: &mut Code, register: u64, value: u32) -> Result<(), IcedError> {
    code.mov(dword_ptr(ebp + at(register)), value)
}

fn at(register: u64) -> i32 {
    i32::try_from(register).unwrap()
}

#[test]
fn registers_memory_dma_and_interrupts_work() {
    if !has_kvm() {
        return;
    }
    let device = ForeignDevice::start().unwrap();
    let mapped = u32::try_from(MAPPED.start).unwrap();
    let first_word = u32::from_le_bytes([0, 1, 2, 3].map(|index| guest::pattern(7, index)));
    let kernel = tiny::guest(|code| {
        let mut wrong = code.create_label();
        code.allow_interrupts()?;
        code.store(COMMAND, ENABLED)?;
        code.mov(ebp, dword_ptr(BAR0))?;
        code.mov(edi, dword_ptr(BAR1))?;
        // BAR 2 has 64 bits; it is moved below 4 GiB, where a guest without paging can reach it.
        code.store(BAR2, 0xd000_0000)?;
        code.store(BAR2 + 4, 0)?;
        code.mov(ebx, 0xd000_0000_u32)?;
        expect(code, guest::MAGIC, MAGIC_VALUE, wrong)?;
        code.print(b'R')?;

        // Mapped memory is the device's memory, and costs no message.
        code.mov(dword_ptr(ebx + mapped), 0x1234_5678)?;
        set(code, RAM_OFFSET, mapped)?;
        expect(code, RAM_DATA, 0x1234_5678, wrong)?;
        expect(code, RAM_TRAPS, 0, wrong)?;
        code.print(b'M')?;

        set(code, DMA_ADDRESS, BUFFER)?;
        set(code, DMA_LENGTH, 4096)?;
        set(code, guest::DMA_SEED, 7)?;
        set(code, DMA_COMMAND, DMA_WRITE)?;
        expect(code, DMA_STATUS, 0, wrong)?;
        code.cmp(dword_ptr(BUFFER), first_word)?;
        code.jne(wrong)?;
        code.print(b'D')?;

        code.mov(dword_ptr(edi), LOCAL_APIC)?;
        code.mov(dword_ptr(edi + 4), 0)?;
        code.mov(dword_ptr(edi + 8), 0x50)?;
        code.mov(dword_ptr(edi + 12), 0)?;
        code.store(MSIX, 1 << 31)?;
        set(code, RAISE, 0)?;
        code.wait_for(COUNT, 1)?;
        code.set_label(&mut wrong)?;
        code.power_off()?;
        code.begin_handler(0x50)?;
        code.print(b'I')?;
        code.inc(dword_ptr(COUNT))?;
        code.end_handler()
    })
    .unwrap();
    let output = outrigger::run_with_device(kernel.path(), device.socket()).unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(
        (output.status.code(), output.stdout.as_slice()),
        (Some(0), b"RMDI".as_slice()),
        "{said}"
    );
}
