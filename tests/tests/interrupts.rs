//! Interrupts of a vfio-user device, all the way into a guest's handlers.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use guest::{INTX, PBA_OFFSET, RAISE};
use iced_x86::code_asm::{dword_ptr, eax, ebp, edi, esi};
use tests::device_thread::DeviceThread;
use tests::outrigger::{self, has_kvm};
use tests::tiny::{self, FIRST_DEVICE, LOCAL_APIC, SCRATCH};

/// Config space: the Command register, BARs 0 and 1, and where the demo device has its MSI-X capability.
const COMMAND: u32 = FIRST_DEVICE + 0x04;
const BAR0: u32 = FIRST_DEVICE + 0x10;
const BAR1: u32 = FIRST_DEVICE + 0x14;
const MSIX: u32 = FIRST_DEVICE + 0xb0;
/// Memory space and bus master.
const DECODE: u32 = 0x6;
/// INTx disabled.
const NO_INTX: u32 = 1 << 10;

/// Counts interrupts.
const COUNT: u32 = SCRATCH + 0x100;

fn output_of(kernel: &tempfile::NamedTempFile, device: &DeviceThread) -> String {
    let output = outrigger::run_with_device(kernel.path(), device.socket()).unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{said}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn msix_vectors_reach_their_handlers_and_wait_while_masked() {
    if !has_kvm() {
        return;
    }
    let device = DeviceThread::demo().unwrap();
    let pba = i32::try_from(PBA_OFFSET).unwrap();
    let raise = i32::try_from(RAISE).unwrap();
    let kernel = tiny::guest(|code| {
        code.allow_interrupts()?;
        code.store(COMMAND, DECODE | NO_INTX)?;
        // EBP: the device's registers, EDI: its MSI-X table.
        code.mov(ebp, dword_ptr(BAR0))?;
        code.mov(edi, dword_ptr(BAR1))?;
        for vector in 0..3 {
            let entry = edi + vector * 16;
            code.mov(dword_ptr(entry), LOCAL_APIC)?;
            code.mov(dword_ptr(entry + 4), 0)?;
            code.mov(dword_ptr(entry + 8), 0x50 + vector)?;
            code.mov(dword_ptr(entry + 12), 0)?;
        }
        code.store(MSIX, 1 << 31)?;
        for vector in 0..3 {
            code.mov(dword_ptr(ebp + raise), vector)?;
            code.wait_for(COUNT, u32::try_from(vector).unwrap_or(0) + 1)?;
        }
        // Vector 1 again, but masked: it is pending, and comes when it is unmasked.
        code.mov(dword_ptr(edi + 16 + 12), 1)?;
        code.mov(dword_ptr(ebp + raise), 1)?;
        code.mov(eax, dword_ptr(edi + pba))?;
        code.add(eax, i32::from(b'0'))?;
        code.print_al()?;
        code.mov(dword_ptr(edi + 16 + 12), 0)?;
        code.wait_for(COUNT, 4)?;
        code.mov(eax, dword_ptr(edi + pba))?;
        code.add(eax, i32::from(b'0'))?;
        code.print_al()?;
        // All vectors at once, by the function mask.
        code.store(MSIX, 3 << 30)?;
        code.mov(dword_ptr(ebp + raise), 2)?;
        code.print(b'-')?;
        code.store(MSIX, 1 << 31)?;
        code.wait_for(COUNT, 5)?;
        code.power_off()?;
        for (vector, letter) in (0x50..=0x52).zip(b'A'..) {
            code.begin_handler(vector)?;
            code.print(letter)?;
            code.inc(dword_ptr(COUNT))?;
            code.end_handler()?;
        }
        Ok(())
    });
    assert_eq!(output_of(&kernel.unwrap(), &device), "ABC2B0-C");
}

#[test]
fn intx_comes_again_while_the_device_holds_it() {
    if !has_kvm() {
        return;
    }
    let device = DeviceThread::demo().unwrap();
    let intx = i32::try_from(INTX).unwrap();
    let kernel = tiny::guest(|code| {
        let mut served = code.create_label();
        code.allow_interrupts()?;
        code.route_intx()?;
        code.store(COMMAND, DECODE)?;
        code.mov(ebp, dword_ptr(BAR0))?;
        for round in 1..=2 {
            code.mov(dword_ptr(ebp + intx), 1)?;
            code.wait_for(COUNT, 3 * round)?;
            code.print(b'.')?;
        }
        code.power_off()?;
        // The third interrupt of a round lowers the line; until then it comes again and again. (A KVM that only emulates
        // ends an interrupt when it delivers it, so that one more may come when the line is low already.)
        code.begin_handler(0x60)?;
        code.cmp(dword_ptr(ebp + intx), 0)?;
        code.je(served)?;
        code.print(b'I')?;
        code.inc(dword_ptr(COUNT))?;
        code.inc(esi)?;
        code.cmp(esi, 3)?;
        code.jne(served)?;
        code.xor(esi, esi)?;
        code.mov(dword_ptr(ebp + intx), 0)?;
        code.set_label(&mut served)?;
        code.end_handler()
    });
    assert_eq!(output_of(&kernel.unwrap(), &device), "III.III.");
}

#[test]
fn intx_comes_again_after_it_was_disabled_in_its_handler() {
    if !has_kvm() {
        return;
    }
    let device = DeviceThread::demo().unwrap();
    let intx = i32::try_from(INTX).unwrap();
    let kernel = tiny::guest(|code| {
        let mut served = code.create_label();
        code.allow_interrupts()?;
        code.route_intx()?;
        code.store(COMMAND, DECODE)?;
        code.mov(ebp, dword_ptr(BAR0))?;
        for round in 1..=3 {
            code.store(COMMAND, DECODE)?;
            code.mov(dword_ptr(ebp + intx), 1)?;
            code.wait_for(COUNT, round)?;
        }
        code.power_off()?;
        // As a driver does that leaves the device to user space.
        code.begin_handler(0x60)?;
        code.cmp(dword_ptr(ebp + intx), 0)?;
        code.je(served)?;
        code.store(COMMAND, DECODE | NO_INTX)?;
        code.mov(dword_ptr(ebp + intx), 0)?;
        code.print(b'I')?;
        code.inc(dword_ptr(COUNT))?;
        code.set_label(&mut served)?;
        code.end_handler()
    });
    assert_eq!(output_of(&kernel.unwrap(), &device), "III");
}
