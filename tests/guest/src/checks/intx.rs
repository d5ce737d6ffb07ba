//! The wired interrupt.

use std::fs::File;
use std::io::Read;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use guest::INTX;

use super::at;
use crate::pci::{Device, regs};

/// The wired interrupt, through Linux's own driver for devices that it knows nothing about.
pub(super) fn line(device: &Device) -> Result<()> {
    device.command(regs::COMMAND_MEMORY, regs::COMMAND_INTX_DISABLE)?;
    device.bind("uio_pci_generic")?;
    let result = count_intx(device);
    device.unbind()?;
    result
}

fn count_intx(device: &Device) -> Result<()> {
    let registers = device.map(0)?;
    let mut uio = File::open(format!("/dev/{}", device.uio()?))?;
    let (sender, events) = mpsc::channel();
    // Ends with the program: nothing but an interrupt can end the read.
    thread::spawn(move || {
        let mut count = [0; 4];
        while uio.read_exact(&mut count).is_ok() && sender.send(u32::from_le_bytes(count)).is_ok() {
        }
    });
    let mut next = 1;
    let mut expect = |when: &str| -> Result<()> {
        let count = events
            .recv_timeout(Duration::from_secs(10))
            .with_context(|| format!("no interrupt {when}"))?;
        ensure!(count == next, "{count} interrupts and not {next} {when}");
        next += 1;
        Ok(())
    };

    // The driver disables INTx when it gets an interrupt, and it is for us to enable it again.
    let enable = || device.command(0, regs::COMMAND_INTX_DISABLE);
    let line = |level: u32| registers.write(at(INTX), level);
    for _ in 0..3 {
        line(1);
        expect("when the line rose")?;
        line(0);
        enable()?;
    }
    line(1);
    expect("when the line rose for the last time")?;
    enable()?;
    expect("while the line was high")?;
    line(0);
    enable()?;
    ensure!(
        events.try_recv().is_err(),
        "an interrupt while the line was low"
    );
    Ok(())
}
