//! Config space.

use anyhow::{Result, ensure};
use guest::{
    BAR_SIZES, CLASS_REVISION, DEVICE, PBA_OFFSET, SERIAL_NUMBER, SUBSYSTEM, VECTORS, VENDOR,
};

use super::at;
use crate::pci::{Bar, Device, regs};

/// Identity, access widths and write masks of the header.
pub(super) fn header(device: &Device) -> Result<()> {
    ensure!(
        device.config_len()? == 4096,
        "config space has {} bytes",
        device.config_len()?
    );
    ensure!(device.config32(0)? == u32::from(DEVICE) << 16 | u32::from(VENDOR));
    ensure!(device.config32(regs::CLASS_REVISION)? == CLASS_REVISION);
    let subsystem = u32::from(SUBSYSTEM) << 16 | u32::from(VENDOR);
    ensure!(device.config32(regs::SUBSYSTEM_VENDOR_ID)? == subsystem);
    ensure!(
        device.config8(regs::INTERRUPT_PIN)? == 1,
        "the interrupt pin is not INTA"
    );

    for offset in (0..0x100).step_by(4) {
        let dword = device.config::<4>(offset)?;
        let words = [device.config::<2>(offset)?, device.config::<2>(offset + 2)?];
        let [a, b, c, d] = [0, 1, 2, 3].map(|byte| device.config8(offset + byte));
        let bytes = [a?, b?, c?, d?];
        ensure!(
            words.concat() == dword && bytes == dword,
            "{offset:#x}: {dword:x?}, {words:x?}, {bytes:x?}"
        );
    }

    device.set_config(0, &[0xff; 4])?;
    device.set_config(regs::CLASS_REVISION, &[0xff; 4])?;
    ensure!(
        device.config32(0)? == u32::from(DEVICE) << 16 | u32::from(VENDOR),
        "the ids can be overwritten"
    );
    ensure!(
        device.config32(regs::CLASS_REVISION)? == CLASS_REVISION,
        "the class can be overwritten"
    );

    let line = device.config8(regs::INTERRUPT_LINE)?;
    device.set_config(regs::INTERRUPT_LINE, &[0x5a])?;
    ensure!(
        device.config8(regs::INTERRUPT_LINE)? == 0x5a,
        "the interrupt line register keeps nothing"
    );
    device.set_config(regs::INTERRUPT_LINE, &[line])
}

/// Both capability lists, and what is in them.
pub(super) fn capabilities(device: &Device) -> Result<()> {
    let ids = device
        .capabilities()?
        .iter()
        .map(|found| found.0)
        .collect::<Vec<_>>();
    let expected = [regs::CAP_PM, regs::CAP_MSI, regs::CAP_EXP, regs::CAP_MSIX];
    ensure!(ids == expected, "the capabilities are {ids:02x?}");

    let express = device.capability(regs::CAP_EXP)?;
    let kind = device.config16(express + 2)? >> 4 & 0xf;
    ensure!(
        kind == 9,
        "on bus 0 it must be a root complex integrated endpoint (9) and is a {kind}"
    );
    ensure!(
        device.config32(express + 0x0c)? == 0,
        "an integrated endpoint has no link"
    );

    let msix = device.capability(regs::CAP_MSIX)?;
    device.command(regs::COMMAND_MEMORY, 0)?;
    let vectors = device.map(0)?.read::<u32>(at(VECTORS));
    ensure!(
        u32::from(device.config16(msix + 2)? & 0x7ff) + 1 == vectors,
        "not {vectors} MSI-X vectors"
    );
    ensure!(
        device.config32(msix + 4)? == 1,
        "the MSI-X table is elsewhere"
    );
    ensure!(
        u64::from(device.config32(msix + 8)?) == PBA_OFFSET | 1,
        "the pending bits are elsewhere"
    );

    let ids = device
        .extended_capabilities()?
        .iter()
        .map(|found| found.0)
        .collect::<Vec<_>>();
    ensure!(
        ids == [regs::EXT_CAP_DSN, regs::EXT_CAP_VENDOR],
        "the extended capabilities are {ids:04x?}"
    );
    let number = [device.config32(0x104)?, device.config32(0x108)?];
    ensure!(number == SERIAL_NUMBER, "the serial number is {number:x?}");
    Ok(())
}

/// Kind, size, placement and sizing of the BARs.
pub(super) fn bars(device: &Device) -> Result<()> {
    let kinds = [
        Bar::MEMORY,
        Bar::MEMORY,
        Bar::MEMORY | Bar::MEMORY_64 | Bar::PREFETCH,
        0,
        Bar::IO,
        0,
    ];
    let mask = Bar::IO | Bar::MEMORY | Bar::MEMORY_64 | Bar::PREFETCH;
    let bars = device.bars()?;
    for (index, (bar, (kind, size))) in bars
        .iter()
        .zip(kinds.into_iter().zip(BAR_SIZES))
        .enumerate()
    {
        ensure!(
            bar.flags & mask == kind && bar.size == size,
            "BAR {index} is {bar:x?}"
        );
        ensure!(
            size == 0 || bar.start != 0 && bar.start.is_multiple_of(size),
            "BAR {index} is badly placed: {bar:x?}"
        );
    }

    device.command(0, regs::COMMAND_MEMORY | regs::COMMAND_IO)?;
    for (index, masked) in [
        (0, 0xffff_f000),
        (2, 0xffff_000c),
        (3, 0xffff_ffff),
        (4, 0xffff_ffe1),
        (5, 0),
    ] {
        let register = regs::BASE_ADDRESS_0 + 4 * index;
        let saved = device.config::<4>(register)?;
        device.set_config(register, &[0xff; 4])?;
        let sized = device.config32(register)?;
        device.set_config(register, &saved)?;
        // Of an I/O BAR's upper half a device may implement nothing.
        ensure!(
            sized == masked || index == 4 && sized == masked & 0xffff,
            "BAR {index} sizes as {sized:#x}"
        );
        ensure!(
            device.config::<4>(register)? == saved,
            "BAR {index} forgot its address"
        );
    }
    device.command(regs::COMMAND_MEMORY | regs::COMMAND_IO, 0)
}
