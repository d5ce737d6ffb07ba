//! What is behind the BARs, trapped and mapped.

use std::fs::File;
use std::os::unix::fs::FileExt;

use anyhow::{Result, ensure};
use guest::{
    BAR_SIZES, MAGIC, MAGIC_VALUE, MAPPED, RAM_DATA, RAM_OFFSET, RAM_TRAPS, RESETS, SCRATCH,
};

use super::at;
use crate::dma::PAGE;
use crate::pci::{Device, regs};

/// Trapped registers at every width.
pub(super) fn registers(device: &Device) -> Result<()> {
    device.command(regs::COMMAND_MEMORY, 0)?;
    let registers = device.map(0)?;
    ensure!(
        registers.read::<u32>(at(MAGIC)) == MAGIC_VALUE,
        "BAR 0 does not start with the device's magic"
    );
    println!("FACT resets {}", registers.read::<u32>(at(RESETS)));

    let scratch = at(SCRATCH);
    let value = 0x8899_aabb_ccdd_eeff_u64;
    registers.write(scratch, value);
    ensure!(
        registers.read::<u64>(scratch) == value,
        "a quadword does not come back"
    );
    for (index, byte) in value.to_le_bytes().into_iter().enumerate() {
        ensure!(
            registers.read::<u8>(scratch + index) == byte,
            "byte {index} reads wrong"
        );
    }
    ensure!(
        registers.read::<u16>(scratch + 2) == 0xccdd
            && registers.read::<u32>(scratch + 4) == 0x8899_aabb
    );
    registers.write(scratch + 3, 0x11_u8);
    registers.write(scratch + 6, 0x2233_u16);
    ensure!(
        registers.read::<u64>(scratch) == 0x2233_aabb_11dd_eeff,
        "a partial write went astray"
    );
    registers.write(scratch, 0_u64);
    Ok(())
}

/// BAR 2, whose middle is mapped and whose rest is trapped.
pub(super) fn ram(device: &Device) -> Result<()> {
    device.command(regs::COMMAND_MEMORY, 0)?;
    let (registers, ram) = (device.map(0)?, device.map(2)?);
    let seen = |offset: usize| -> Result<u32> {
        registers.write(at(RAM_OFFSET), u32::try_from(offset)?);
        Ok(registers.read::<u32>(at(RAM_DATA)))
    };
    let traps = || registers.read::<u32>(at(RAM_TRAPS));
    let (start, end) = (at(MAPPED.start), at(MAPPED.end));

    let before = traps();
    for offset in (start..end)
        .step_by(4)
        .filter(|offset| offset % 256 == 0 || offset + 4 == end)
    {
        ram.write(offset, !u32::try_from(offset)?);
    }
    for offset in [start, start + PAGE, end - PAGE, end - 4] {
        let expected = !u32::try_from(offset)?;
        ensure!(
            ram.read::<u32>(offset) == expected,
            "{offset:#x} of the mapped part does not come back"
        );
        ensure!(
            seen(offset)? == expected,
            "the device does not see {offset:#x} of the mapped part"
        );
    }
    ensure!(
        traps() == before,
        "the mapped part is trapped: {} accesses",
        traps() - before
    );

    for (count, offset) in (1..).zip([0, start - 4, end, at(BAR_SIZES[2]) - 4]) {
        ram.write(offset, 0x600d_0000 | u32::try_from(offset)?);
        ensure!(
            seen(offset)? == 0x600d_0000 | u32::try_from(offset)?,
            "{offset:#x} of the trapped part is not stored"
        );
        ensure!(
            ram.read::<u32>(offset) == seen(offset)?,
            "{offset:#x} of the trapped part does not come back"
        );
        ensure!(traps() == before + 2 * count, "{offset:#x} is not trapped");
    }
    Ok(())
}

/// The I/O BAR, at every width.
pub(super) fn io(device: &Device) -> Result<()> {
    device.command(regs::COMMAND_IO, 0)?;
    let ports = device.resource(4)?;
    ports.write_all_at(&0xcafe_f00d_u32.to_le_bytes(), 0)?;
    ports.write_all_at(&0x1234_u16.to_le_bytes(), 30)?;
    ports.write_all_at(&[0x56], 29)?;
    ensure!(
        port(&ports, 0)? == 0xcafe_f00d_u32.to_le_bytes(),
        "a dword does not come back"
    );
    ensure!(
        port(&ports, 2)? == 0xcafe_u16.to_le_bytes(),
        "a word does not come back"
    );
    ensure!(port::<1>(&ports, 3)? == [0xca], "a byte does not come back");
    ensure!(
        port(&ports, 28)? == [0, 0x56, 0x34, 0x12],
        "the last ports do not come back"
    );
    Ok(())
}

fn port<const N: usize>(ports: &File, offset: u64) -> Result<[u8; N]> {
    let mut bytes = [0; N];
    ports.read_exact_at(&mut bytes, offset)?;
    Ok(bytes)
}

/// Memory decode off and on, and two BARs that change places: trapped and mapped memory follow.
pub(super) fn decode(device: &Device) -> Result<()> {
    device.command(regs::COMMAND_MEMORY, 0)?;
    let (registers, table, ram) = (device.map(0)?, device.map(1)?, device.map(2)?);
    let mapped = at(MAPPED.start);
    ram.write(mapped, 0x0dec_0de0_u32);

    device.command(0, regs::COMMAND_MEMORY)?;
    ensure!(
        registers.read::<u32>(at(MAGIC)) == u32::MAX,
        "the registers answer with memory decode off"
    );
    ensure!(
        ram.read::<u32>(mapped) == u32::MAX,
        "the mapped memory answers with memory decode off"
    );
    ram.write(mapped, 0_u32);

    let moved = while_swapped(device, || table.read::<u32>(at(MAGIC)))?;
    ensure!(
        moved == MAGIC_VALUE,
        "BAR 0 did not answer at its new address"
    );
    ensure!(
        registers.read::<u32>(at(MAGIC)) == MAGIC_VALUE,
        "BAR 0 does not answer at its old address again"
    );
    ensure!(
        ram.read::<u32>(mapped) == 0x0dec_0de0,
        "the mapped memory is not what it was"
    );
    Ok(())
}

/// Does something while BARs 0 and 1, which are of one size, have each other's place.
pub(super) fn while_swapped<T>(device: &Device, act: impl FnOnce() -> T) -> Result<T> {
    const SECOND: u16 = regs::BASE_ADDRESS_0 + 4;
    let first = device.config::<4>(regs::BASE_ADDRESS_0)?;
    let second = device.config::<4>(SECOND)?;
    let place = |first, second| {
        device.command(0, regs::COMMAND_MEMORY)?;
        device.set_config(regs::BASE_ADDRESS_0, first)?;
        device.set_config(SECOND, second)?;
        device.command(regs::COMMAND_MEMORY, 0)
    };
    place(&second, &first)?;
    let result = act();
    place(&first, &second)?;
    Ok(result)
}
