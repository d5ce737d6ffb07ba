//! QEMU's device for education (docs/specs/edu.rst of QEMU), by its registers.

use std::fs::File;
use std::io::Read;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::dma::{Buffer, PAGE};
use crate::interrupts::{self, VECTORS};
use crate::mapping::Mapping;
use crate::pci::{Device, regs};

const ID: usize = 0x00;
/// Reads as the inverse of what was written.
pub(crate) const INVERTED: usize = 0x04;
const FACTORIAL: usize = 0x08;
const STATUS: usize = 0x20;
const INTERRUPT_STATUS: usize = 0x24;
const INTERRUPT_RAISE: usize = 0x60;
const INTERRUPT_ACKNOWLEDGE: usize = 0x64;
const DMA_SOURCE: usize = 0x80;
const DMA_DESTINATION: usize = 0x88;
const DMA_LENGTH: usize = 0x90;
const DMA_COMMAND: usize = 0x98;

const STATUS_COMPUTING: u32 = 1;
const STATUS_INTERRUPT: u32 = 0x80;
const DMA_START: u64 = 1;
const DMA_TO_RAM: u64 = 2;
/// Where the device has its memory.
const DMA_BUFFER: u64 = 0x4_0000;
/// Bytes in a transfer. Versions of QEMU end themselves when all of the device's memory is asked for.
const DMA_BYTES: usize = PAGE / 2;

/// It is an edu of version 1.0, it inverts, and it calculates.
pub(super) fn registers(device: &Device) -> Result<()> {
    let registers = map(device)?;
    ensure!(registers.read::<u32>(ID) == 0x0100_00ed);
    for value in [0_u32, 0x1234_5678, u32::MAX] {
        registers.write(INVERTED, value);
        ensure!(registers.read::<u32>(INVERTED) == !value);
    }
    registers.write(STATUS, 0_u32);
    registers.write(FACTORIAL, 10_u32);
    interrupts::wait_for("the factorial", || Ok(!is_computing(&registers)))?;
    ensure!(registers.read::<u32>(FACTORIAL) == 3_628_800);
    Ok(())
}

/// Its registers are there while memory decode is on, and keep what they hold.
pub(super) fn decode(device: &Device) -> Result<()> {
    let registers = map(device)?;
    for value in [0x600d_u32, 0xcafe] {
        registers.write(INVERTED, value);
        device.command(0, regs::COMMAND_MEMORY)?;
        ensure!(registers.read::<u32>(INVERTED) == u32::MAX, "it answers");
        registers.write(INVERTED, 0_u32);
        device.command(regs::COMMAND_MEMORY, 0)?;
        ensure!(registers.read::<u32>(INVERTED) == !value, "it has changed");
    }
    Ok(())
}

/// It reads guest memory, and writes it to other pages.
pub(super) fn dma(device: &Device) -> Result<()> {
    let registers = map(device)?;
    let buffer = Buffer::new(8)?;
    let transfer = |source: u64, destination: u64, direction: u64| {
        registers.write(DMA_SOURCE, source);
        registers.write(DMA_DESTINATION, destination);
        registers.write(DMA_LENGTH, u64::try_from(DMA_BYTES)?);
        registers.write(DMA_COMMAND, DMA_START | direction);
        interrupts::wait_for("the end of a transfer", || {
            Ok(registers.read::<u64>(DMA_COMMAND) & DMA_START == 0)
        })
    };
    for (page, pair) in buffer.pages().chunks_exact(2).enumerate() {
        let &[from, to] = pair else { continue };
        let byte = |offset: usize| offset.wrapping_mul(7).wrapping_add(page).to_le_bytes()[0];
        buffer.fill(2 * page, byte);
        buffer.fill(2 * page + 1, |_| 0xee);
        transfer(from, DMA_BUFFER, 0)?;
        transfer(DMA_BUFFER, to, DMA_TO_RAM)?;
        let contents = buffer.contents(2 * page + 1);
        let (written, rest) = contents.split_at(DMA_BYTES);
        ensure!(
            written.iter().enumerate().all(|(at, is)| *is == byte(at)),
            "not what {from:#x} holds at {to:#x}"
        );
        ensure!(rest.iter().all(|is| *is == 0xee), "too much at {to:#x}");
    }
    Ok(())
}

/// Its one message.
pub(super) fn msi(device: &Device) -> Result<()> {
    let registers = map(device)?;
    let capability = device.capability(regs::CAP_MSI)?;
    let cpu = *interrupts::cpus()?.last().context("no CPU")?;
    let [(vector, _), ..] = VECTORS;
    let mut expected = interrupts::counts()?;
    let address = interrupts::message_address(cpu);
    device.set_config(capability + 4, &address.to_le_bytes())?;
    device.set_config(capability + 8, &[0; 4])?;
    device.set_config(capability + 0x0c, &u16::from(vector).to_le_bytes())?;
    device.set_config(capability + 2, &[1, 0])?;
    let result = (0..3).try_for_each(|_| {
        *expected.entry((vector, cpu.number)).or_default() += 1;
        raise_and_acknowledge(&registers, || interrupts::expect(&expected))
    });
    device.set_config(capability + 2, &[0; 2])?;
    result
}

/// Its wired interrupt, raised by hand and by a calculation that is finished, through Linux's own driver for devices that
/// it knows nothing about.
pub(super) fn intx(device: &Device) -> Result<()> {
    let registers = map(device)?;
    device.command(0, regs::COMMAND_INTX_DISABLE)?;
    device.bind("uio_pci_generic")?;
    let result = count_intx(device, &registers);
    device.unbind()?;
    result
}

fn count_intx(device: &Device, registers: &Mapping) -> Result<()> {
    let mut uio = File::open(format!("/dev/{}", device.uio()?))?;
    let (sender, events) = mpsc::channel();
    // Ends with the program: nothing but an interrupt can end the read.
    thread::spawn(
        move || {
            while uio.read_exact(&mut [0; 4]).is_ok() && sender.send(()).is_ok() {}
        },
    );
    let interrupt = || {
        let event = events.recv_timeout(Duration::from_secs(10));
        event.context("no interrupt")
    };
    // The driver disables INTx when it gets an interrupt, and it is for us to enable it again.
    let enable = || device.command(0, regs::COMMAND_INTX_DISABLE);

    for _ in 0..3 {
        raise_and_acknowledge(registers, interrupt)?;
        enable()?;
    }
    registers.write(STATUS, STATUS_INTERRUPT);
    registers.write(FACTORIAL, 5_u32);
    interrupt().context("when the factorial is done")?;
    ensure!(!is_computing(registers) && registers.read::<u32>(FACTORIAL) == 120);
    registers.write(STATUS, 0_u32);
    acknowledge(registers);
    enable()?;
    ensure!(
        events.recv_timeout(Duration::from_millis(200)).is_err(),
        "an interrupt that nobody raised"
    );
    Ok(())
}

fn raise_and_acknowledge(registers: &Mapping, came: impl FnOnce() -> Result<()>) -> Result<()> {
    registers.write(INTERRUPT_RAISE, 0x42_u32);
    let result = came();
    ensure!(registers.read::<u32>(INTERRUPT_STATUS) == 0x42);
    acknowledge(registers);
    ensure!(registers.read::<u32>(INTERRUPT_STATUS) == 0);
    result
}

fn acknowledge(registers: &Mapping) {
    let status: u32 = registers.read(INTERRUPT_STATUS);
    registers.write(INTERRUPT_ACKNOWLEDGE, status);
}

fn is_computing(registers: &Mapping) -> bool {
    registers.read::<u32>(STATUS) & STATUS_COMPUTING != 0
}

fn map(device: &Device) -> Result<Mapping> {
    device.command(regs::COMMAND_MEMORY | regs::COMMAND_MASTER, 0)?;
    device.map(0)
}
