//! MSI-X.

use anyhow::{Context, Result, ensure};
use guest::{PBA_OFFSET, RAISE};

use super::at;
use crate::interrupts::{self, Cpu, VECTORS};
use crate::mapping::Mapping;
use crate::pci::{Device, regs};

/// A device's MSI-X table and pending bits, enabled with every vector masked.
struct Msix<'a> {
    device: &'a Device,
    control: u16,
    vectors: u16,
    registers: Mapping,
    table: Mapping,
}

impl<'a> Msix<'a> {
    const ENABLE: u16 = 1 << 15;
    const FUNCTION_MASK: u16 = 1 << 14;

    fn enable(device: &'a Device) -> Result<Self> {
        device.command(regs::COMMAND_MEMORY | regs::COMMAND_MASTER, 0)?;
        let control = device.capability(regs::CAP_MSIX)? + 2;
        let registers = device.map(0)?;
        let msix = Self {
            device,
            control,
            vectors: u16::try_from(registers.read::<u32>(at(guest::VECTORS)))?,
            registers,
            table: device.map(1)?,
        };
        msix.set_control(Self::ENABLE)?;
        Ok(msix)
    }

    fn set_control(&self, bits: u16) -> Result<()> {
        self.device.set_config(self.control, &bits.to_le_bytes())
    }

    fn program(&self, entry: u16, cpu: Cpu, vector: u8) {
        let at = 16 * usize::from(entry);
        self.table.write(at, interrupts::message_address(cpu));
        self.table.write(at + 4, 0_u32);
        self.table.write(at + 8, u32::from(vector));
    }

    fn mask(&self, entry: u16, masked: bool) {
        self.table
            .write(16 * usize::from(entry) + 12, u32::from(masked));
    }

    fn raise(&self, entry: u16) {
        self.registers.write(at(RAISE), u32::from(entry));
    }

    fn pending(&self) -> u64 {
        self.table.read(at(PBA_OFFSET))
    }

    fn await_pending(&self, bits: u64) -> Result<()> {
        interrupts::wait_for("a pending bit", || Ok(self.pending() == bits))
    }
}

impl Drop for Msix<'_> {
    fn drop(&mut self) {
        (0..self.vectors).for_each(|entry| self.mask(entry, true));
        // Nothing is left to do about an error, and the next check meets it.
        let _ = self.set_control(0);
    }
}

/// Every vector at several CPUs, counted one by one.
pub(super) fn vectors(device: &Device) -> Result<()> {
    let cpus = interrupts::cpus()?;
    let msix = Msix::enable(device)?;
    let mut expected = interrupts::counts()?;
    for round in 0..2 {
        let targets = cpus.iter().cycle().skip(round);
        let vectors = VECTORS.iter().cycle().skip(round);
        for (entry, (cpu, (vector, _))) in (0..msix.vectors).zip(targets.zip(vectors)) {
            msix.mask(entry, true);
            msix.program(entry, *cpu, *vector);
            msix.mask(entry, false);
            for _ in 0..=entry % 3 {
                msix.raise(entry);
                *expected.entry((*vector, cpu.number)).or_default() += 1;
                interrupts::expect(&expected).with_context(|| format!("MSI-X vector {entry}"))?;
            }
        }
    }
    Ok(())
}

/// Masks and pending bits: nothing is lost, nothing arrives twice.
pub(super) fn masks(device: &Device) -> Result<()> {
    let cpu = *interrupts::cpus()?.last().context("no CPU")?;
    let msix = Msix::enable(device)?;
    let mut expected = interrupts::counts()?;
    // An interrupt that must not come is not waited for. It would come before the one of vector 3 that is sent after it.
    let mut settle = |deliveries: &[u8]| -> Result<()> {
        msix.raise(3);
        for vector in [VECTORS[0].0].iter().chain(deliveries) {
            *expected.entry((*vector, cpu.number)).or_default() += 1;
        }
        interrupts::expect(&expected)
    };
    for entry in 0..4 {
        msix.program(entry, cpu, VECTORS[[1, 2, 1, 0][usize::from(entry)]].0);
    }
    msix.mask(3, false);
    settle(&[]).context("without a mask")?;
    ensure!(
        msix.pending() == 0,
        "bits are pending at the start: {:#x}",
        msix.pending()
    );

    // A device is given a vector when that is first unmasked.
    msix.mask(0, false);
    msix.mask(0, true);
    msix.raise(0);
    msix.await_pending(1)?;
    msix.raise(0);
    settle(&[]).context("masked")?;
    msix.mask(0, false);
    settle(&[VECTORS[1].0]).context("unmasked: one interrupt, however often the device asked")?;
    msix.await_pending(0)?;
    msix.mask(0, true);
    msix.mask(0, false);
    settle(&[]).context("masked and unmasked again: the interrupt came back")?;

    for entry in 1..3 {
        msix.mask(entry, false);
    }
    msix.set_control(Msix::ENABLE | Msix::FUNCTION_MASK)?;
    msix.raise(1);
    msix.raise(2);
    msix.await_pending(0b110)?;
    msix.set_control(Msix::ENABLE)?;
    settle(&[VECTORS[1].0, VECTORS[2].0]).context("function mask taken away")?;
    msix.await_pending(0)?;

    msix.mask(1, true);
    msix.raise(1);
    msix.await_pending(0b10)?;
    msix.program(1, cpu, VECTORS[1].0);
    msix.mask(1, false);
    settle(&[VECTORS[1].0]).context("the message was changed while it was pending")
}
