//! MSI.

use anyhow::{Context, Result, ensure};
use guest::{MSI_VECTORS, RAISE};

use super::at;
use crate::interrupts::{self, VECTORS};
use crate::pci::{Device, regs};

/// Several messages of MSI, and its mask bits.
pub(super) fn messages(device: &Device) -> Result<()> {
    device.command(regs::COMMAND_MEMORY | regs::COMMAND_MASTER, 0)?;
    let capability = device.capability(regs::CAP_MSI)?;
    let result = count_msi(device, capability);
    device.set_config(capability + 2, &[0; 2])?;
    result
}

fn count_msi(device: &Device, capability: u16) -> Result<()> {
    const ENABLE: u16 = 1;
    const FOUR_MESSAGES: u16 = 2 << 4;

    let control = device.config16(capability + 2)?;
    ensure!(
        control & 0x18e == 0x184,
        "not {MSI_VECTORS} messages, 64 bits, maskable: {control:#x}"
    );
    let (mask, pending) = (capability + 0x10, capability + 0x14);

    let registers = device.map(0)?;
    let cpu = *interrupts::cpus()?.last().context("no CPU")?;
    let mut expected = interrupts::counts()?;
    device.set_config(
        capability + 4,
        &interrupts::message_address(cpu).to_le_bytes(),
    )?;
    device.set_config(capability + 8, &[0; 4])?;
    device.set_config(capability + 0x0c, &u16::from(VECTORS[0].0).to_le_bytes())?;
    device.set_config(mask, &[0; 4])?;
    device.set_config(capability + 2, &(ENABLE | FOUR_MESSAGES).to_le_bytes())?;
    for (message, (vector, _)) in (0_u32..).zip(VECTORS) {
        for _ in 0..=message {
            registers.write(at(RAISE), message);
            *expected.entry((vector, cpu.number)).or_default() += 1;
            interrupts::expect(&expected).with_context(|| format!("message {message}"))?;
        }
    }

    device.set_config(mask, &0b10_u32.to_le_bytes())?;
    registers.write(at(RAISE), 1_u32);
    interrupts::wait_for("a pending bit", || Ok(device.config32(pending)? == 0b10))?;
    interrupts::expect(&expected).context("masked")?;
    device.set_config(mask, &[0; 4])?;
    *expected.entry((VECTORS[1].0, cpu.number)).or_default() += 1;
    interrupts::expect(&expected).context("unmasked")
}
