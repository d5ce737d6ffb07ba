//! Doorbells.

use std::fs::File;
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, bail, ensure};
use guest::{DOORBELLS, Doorbell, RUNG};

use super::{at, bars};
use crate::interrupts::wait_for;
use crate::mapping::Mapping;
use crate::pci::{Device, regs};

/// Each rings when it is written to with its size and value, wherever its BAR is, and no other does.
pub(super) fn rung(device: &Device) -> Result<()> {
    device.command(regs::COMMAND_MEMORY | regs::COMMAND_IO, 0)?;
    let bells = Bells {
        registers: device.map(0)?,
        ports: device.resource(4)?,
    };
    let mut expected = bells.counts();
    for (number, bell) in DOORBELLS.iter().enumerate() {
        bells.write(&bells.registers, bell, bell.value.unwrap_or(0x5a))?;
        expected[number] += 1;
        bells
            .expect(&expected)
            .with_context(|| format!("{bell:?}"))?;
        if bell.value.is_some() {
            bells.write(&bells.registers, bell, 0x77)?;
            bells.expect(&expected).context("another value")?;
        }
    }

    let elsewhere = device.map(1)?;
    bars::while_swapped(device, || -> Result<()> {
        let in_memory = DOORBELLS.iter().filter(|bell| bell.bar == 0);
        in_memory
            .clone()
            .try_for_each(|bell| bells.write(&elsewhere, bell, bell.value.unwrap_or(1)))?;
        // The registers have moved away from here, and the doorbells too.
        in_memory
            .clone()
            .try_for_each(|bell| bells.write(&bells.registers, bell, bell.value.unwrap_or(1)))
    })??;
    for (count, bell) in expected.iter_mut().zip(DOORBELLS) {
        *count += u32::from(bell.bar == 0);
    }
    bells.expect(&expected).context("after the BAR has moved")
}

struct Bells {
    registers: Mapping,
    ports: File,
}

impl Bells {
    fn counts(&self) -> [u32; DOORBELLS.len()] {
        std::array::from_fn(|number| self.registers.read(at(RUNG) + 4 * number))
    }

    /// Writes to a doorbell. BAR 0 is at `memory`.
    fn write(&self, memory: &Mapping, bell: &Doorbell, value: u64) -> Result<()> {
        let offset = at(bell.offset);
        let bytes = value.to_le_bytes();
        match (bell.bar, bell.size) {
            (0, 1) => memory.write(offset, bytes[0]),
            (0, 2) => memory.write(offset, u16::from_le_bytes([bytes[0], bytes[1]])),
            (0, 4) => memory.write(offset, u32::try_from(value)?),
            (0, 8) => memory.write(offset, value),
            (4, size) => {
                let bytes = bytes.get(..size.into()).context("too many bytes")?;
                self.ports.write_all_at(bytes, bell.offset)?;
            }
            _ => bail!("no such doorbell"),
        }
        Ok(())
    }

    /// Waits until the doorbells have rung so often; more often than expected is an error at once.
    fn expect(&self, expected: &[u32]) -> Result<()> {
        wait_for("a doorbell", || {
            let counts = self.counts();
            let surplus = counts
                .iter()
                .zip(expected)
                .any(|(count, most)| count > most);
            ensure!(!surplus, "they rang {counts:?} times and not {expected:?}");
            Ok(counts == *expected)
        })
    }
}
