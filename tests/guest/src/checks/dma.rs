//! DMA.

use anyhow::{Context, Result, ensure};
use guest::{
    DMA_ADDRESS, DMA_BUSY, DMA_COMMAND, DMA_LATER, DMA_LENGTH, DMA_READ, DMA_SEED, DMA_STATUS,
    DMA_SUM, DMA_WRITE, checksum, pattern,
};

use super::at;
use crate::dma::{Buffer, PAGE};
use crate::interrupts::wait_for;
use crate::pci::{Device, regs};

/// The device writes and reads guest memory, wherever it is.
pub(super) fn transfers(device: &Device) -> Result<()> {
    all(device, 0)
}

/// The same, beside what the guest does.
pub(super) fn later(device: &Device) -> Result<()> {
    all(device, DMA_LATER)
}

fn all(device: &Device, when: u32) -> Result<()> {
    device.command(regs::COMMAND_MEMORY | regs::COMMAND_MASTER, 0)?;
    let registers = device.map(0)?;
    let transfer = |command: u32, address: u64, length: usize, seed: u32| -> Result<bool> {
        registers.write(at(DMA_ADDRESS), address);
        registers.write(at(DMA_LENGTH), u32::try_from(length)?);
        registers.write(at(DMA_SEED), seed);
        registers.write(at(DMA_COMMAND), command | when);
        let status = || registers.read::<u32>(at(DMA_STATUS));
        if when == DMA_LATER {
            wait_for("a transfer", || Ok(status() != DMA_BUSY))?;
        }
        Ok(status() == 0)
    };
    let bytes = |seed: u32, len: usize| {
        (0..)
            .map(|index| pattern(seed, index))
            .take(len)
            .collect::<Vec<_>>()
    };

    let buffer = Buffer::new(64)?;
    for (page, (address, seed)) in buffer.pages().iter().zip(1..).enumerate() {
        buffer.fill(page, |_| 0xee);
        ensure!(
            transfer(DMA_WRITE, *address, PAGE, seed)?,
            "the device could not write to {address:#x}"
        );
        ensure!(
            buffer.contents(page) == bytes(seed, PAGE),
            "not what the device wrote to {address:#x}"
        );
        buffer.fill(page, |offset| {
            offset.to_le_bytes()[0] ^ address.to_le_bytes()[1]
        });
        ensure!(
            transfer(DMA_READ, *address, PAGE, 0)?,
            "the device could not read {address:#x}"
        );
        let sum = registers.read::<u32>(at(DMA_SUM));
        ensure!(
            sum == checksum(&buffer.contents(page)),
            "the device read something else at {address:#x}"
        );
    }

    let address = buffer.pages().first().context("no pages")?;
    buffer.fill(0, |_| 0xee);
    ensure!(
        transfer(DMA_WRITE, address + 17, 1001, 99)?,
        "the device could not write 1001 bytes"
    );
    let around = [
        vec![0xee; 17],
        bytes(99, 1001),
        vec![0xee; PAGE - 17 - 1001],
    ]
    .concat();
    ensure!(
        buffer.contents(0) == around,
        "1001 unaligned bytes went wrong"
    );

    let registers_at = device.bars()?[0].start;
    for (what, address) in [("nowhere", 1 << 46), ("a BAR", registers_at)] {
        ensure!(
            !transfer(DMA_WRITE, address, 4, 0)?,
            "the device says it wrote to {what}"
        );
    }
    device.command(0, regs::COMMAND_MASTER)?;
    ensure!(
        !transfer(DMA_WRITE, *address, 4, 0)?,
        "the device does DMA without being bus master"
    );
    device.command(regs::COMMAND_MASTER, 0)?;

    let high = buffer
        .pages()
        .iter()
        .filter(|page| **page >= 1 << 32)
        .count();
    println!("FACT dma-pages-above-4g {high}");
    Ok(())
}
