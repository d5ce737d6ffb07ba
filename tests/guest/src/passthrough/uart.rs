//! mtty, the kernel's sample of a mediated device: a 16550 serial port that sends itself what is sent.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, ensure};

use super::{busybox, interrupts};
use crate::pci::{Device, regs};

/// The registers of a 16550 by their offsets, as in Linux's `serial_reg.h`.
mod regs16550 {
    pub(super) const DATA: u64 = 0;
    pub(super) const INTERRUPT_ENABLE: u64 = 1;
    pub(super) const FIFO_CONTROL: u64 = 2;
    pub(super) const LINE_CONTROL: u64 = 3;
    pub(super) const LINE_STATUS: u64 = 5;
    pub(super) const SCRATCH: u64 = 7;

    pub(super) const FIFO_ENABLE_AND_CLEAR: u8 = 0x07;
    pub(super) const EIGHT_BITS: u8 = 0x03;
    pub(super) const DATA_READY: u8 = 0x01;
}

/// The scratch register, by the I/O BAR.
pub(super) fn io(device: &Device) -> Result<()> {
    use regs16550::SCRATCH;
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
    let mut port = Port::open(device)?;
    for round in 0..10 {
        let echoed = port.echo(round);
        echoed.with_context(|| format!("in round {round}"))?;
    }
    let counts = interrupts(&port.name)?;
    ensure!(
        counts.iter().any(|(_, count)| *count >= 10),
        "interrupts: {counts:?}"
    );
    Ok(())
}

/// As much as goes into its buffer, of 16 bytes, and some room.
const BYTES: usize = 12;

/// A port as Linux's driver has it, with interrupts.
pub(crate) struct Port {
    name: String,
    file: File,
}

impl Port {
    pub(crate) fn open(device: &Device) -> Result<Self> {
        let name = name(device)?;
        let path = format!("/dev/{name}");
        let file = OpenOptions::new().read(true).write(true).open(&path)?;
        // A read gives up after ten seconds without a byte.
        let mode = ["raw", "-echo", "min", "0", "time", "100"];
        busybox(&[&["stty", "-F", &path], &mode[..]].concat())?;
        Ok(Self { name, file })
    }

    /// Sends bytes, and waits until they come back.
    pub(crate) fn echo(&mut self, round: u8) -> Result<()> {
        let sent: [u8; BYTES] =
            std::array::from_fn(|at| (at.to_le_bytes()[0] * 10).wrapping_add(round));
        self.file.write_all(&sent)?;
        let mut read = [0; BYTES];
        let came = self.file.read_exact(&mut read);
        came.context("not everything comes back")?;
        ensure!(read == sent, "{read:?} is not {sent:?}");
        Ok(())
    }
}

/// A port without a driver, whose buffer is never empty: what is in there now is only in the device.
pub(crate) struct Buffer {
    registers: File,
    /// The byte that is put in next. Those in the buffer are the [`BYTES`] before it.
    next: u8,
}

impl Buffer {
    /// Takes the port from its driver, and fills the buffer.
    pub(crate) fn fill(device: &Device) -> Result<Self> {
        use regs16550::{EIGHT_BITS, FIFO_CONTROL, FIFO_ENABLE_AND_CLEAR};
        use regs16550::{INTERRUPT_ENABLE, LINE_CONTROL};
        if device.is_bound() {
            device.unbind()?;
        }
        device.command(regs::COMMAND_IO, 0)?;
        let mut buffer = Self {
            registers: device.resource(0)?,
            next: 0,
        };
        for (register, value) in [
            (LINE_CONTROL, EIGHT_BITS),
            (INTERRUPT_ENABLE, 0),
            (FIFO_CONTROL, FIFO_ENABLE_AND_CLEAR),
        ] {
            buffer.write(register, value)?;
        }
        for _ in 0..BYTES {
            buffer.push()?;
        }
        Ok(buffer)
    }

    /// Takes a byte out, which has to be the oldest, and puts one in. The scratch register says which, and has to say the
    /// same until then.
    pub(crate) fn turn(&mut self) -> Result<()> {
        use regs16550::{DATA, DATA_READY, LINE_STATUS, SCRATCH};
        let newest = self.next.wrapping_sub(1);
        let scratch = self.read(SCRATCH)?;
        ensure!(scratch == newest, "scratch: {scratch} is not {newest}");
        let status = self.read(LINE_STATUS)?;
        ensure!(status & DATA_READY != 0, "it is empty: {status:#x}");
        let byte = self.read(DATA)?;
        let oldest = self.next.wrapping_sub(BYTES.to_le_bytes()[0]);
        ensure!(byte == oldest, "{byte} is not {oldest}");
        self.push()
    }

    fn push(&mut self) -> Result<()> {
        use regs16550::{DATA, SCRATCH};
        self.write(DATA, self.next)?;
        self.write(SCRATCH, self.next)?;
        self.next = self.next.wrapping_add(1);
        Ok(())
    }

    fn read(&self, register: u64) -> Result<u8> {
        let mut value = [0];
        self.registers.read_exact_at(&mut value, register)?;
        Ok(value[0])
    }

    fn write(&self, register: u64, value: u8) -> Result<()> {
        Ok(self.registers.write_all_at(&[value], register)?)
    }
}

/// The name that Linux gave to the port.
fn name(device: &Device) -> Result<String> {
    for entry in fs::read_dir("/sys/class/tty")? {
        let entry = entry?;
        let path = fs::canonicalize(entry.path())?;
        if path.iter().any(|part| *part == *device.name) {
            return Ok(entry.file_name().to_string_lossy().into_owned());
        }
    }
    None.context("no driver took the port")
}
