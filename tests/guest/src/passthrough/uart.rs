//! mtty, the kernel's sample of a mediated device: a 16550 serial port that sends itself what is sent.

use std::fs::{self, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, ensure};

use super::{busybox, interrupts};
use crate::pci::{Device, regs};

/// The scratch register, by the I/O BAR.
pub(super) fn io(device: &Device) -> Result<()> {
    const SCRATCH: u64 = 7;
    device.command(regs::COMMAND_IO, 0)?;
    let ports = device.resource(0)?;
    for value in [0x5a, 0xa5] {
        let mut read = [0];
        ports.write_all_at(&[value], SCRATCH)?;
        ports.read_exact_at(&mut read, SCRATCH)?;
        ensure!(read == [value], "{read:x?} is not {value:#x}");
    }
    Ok(())
}

/// What is sent by Linux's driver comes back, with interrupts.
pub(super) fn echo(device: &Device) -> Result<()> {
    let name = port(device)?;
    let path = format!("/dev/{name}");
    let mut port = OpenOptions::new().read(true).write(true).open(&path)?;
    // A read gives up after ten seconds without a byte.
    let mode = ["raw", "-echo", "min", "0", "time", "100"];
    busybox(&[&["stty", "-F", &path], &mode[..]].concat())?;
    for round in 0..10_u8 {
        // As much as goes into its buffer, of 16 bytes.
        let sent: [u8; 12] = std::array::from_fn(|at| at.to_le_bytes()[0] * 10 + round);
        port.write_all(&sent)?;
        let mut read = [0; 12];
        port.read_exact(&mut read)
            .with_context(|| format!("nothing comes back in round {round}"))?;
        ensure!(read == sent, "{read:?} is not {sent:?}");
    }
    let counts = interrupts(&name)?;
    ensure!(
        counts.iter().any(|(_, count)| *count >= 10),
        "interrupts: {counts:?}"
    );
    Ok(())
}

/// The name that Linux gave to the port.
fn port(device: &Device) -> Result<String> {
    for entry in fs::read_dir("/sys/class/tty")? {
        let entry = entry?;
        let path = fs::canonicalize(entry.path())?;
        if path.iter().any(|part| *part == *device.name) {
            return Ok(entry.file_name().to_string_lossy().into_owned());
        }
    }
    None.context("no driver took the port")
}
