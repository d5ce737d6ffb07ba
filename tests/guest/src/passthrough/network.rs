//! A network card, with Linux's driver. The lab answers at the other end of the wire.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use super::{busybox, interrupts};
use crate::interrupts::wait_for;
use crate::mapping::Mapping;
use crate::pci::{Device, regs};

/// This end of the wire, and the other: addresses for documentation (RFC 5737).
const HERE: &str = "192.0.2.2/24";
const THERE: &str = "192.0.2.1";

/// Packets go there and come back, with MSI-X. (With MSI, QEMU's card fails the driver's own test on any machine.)
pub(super) fn msix(device: &Device) -> Result<()> {
    reload("IntMode=2")?;
    exchange(device, "PCI-MSIX-")
}

/// The same with the wired interrupt.
pub(super) fn intx(device: &Device) -> Result<()> {
    reload("IntMode=0")?;
    exchange(device, "IO-APIC")
}

/// Packets go there and come back with a virtual function, whose driver has been loaded already.
pub(super) fn virtual_function(device: &Device) -> Result<()> {
    exchange(device, "PCI-MSIX-")
}

/// A virtual function can be told to be deaf like any other device, though the hardware cannot.
pub(super) fn decode(device: &Device) -> Result<()> {
    let decodes =
        || Ok::<_, anyhow::Error>(device.config16(regs::COMMAND)? & regs::COMMAND_MEMORY != 0);
    device.command(0, regs::COMMAND_MEMORY)?;
    let off = decodes()?;
    device.command(regs::COMMAND_MEMORY, 0)?;
    ensure!((off, decodes()?) == (false, true), "{off}");
    Ok(())
}

/// The I/O BAR shows the same registers as the memory BAR: one port takes a register's offset, the next has its value.
pub(super) fn io(device: &Device) -> Result<()> {
    const STATUS: u32 = 8;
    const FLOW_CONTROL_THRESHOLD: u32 = 0x2160;

    unload()?; // a driver does not share the memory
    device.command(regs::COMMAND_MEMORY | regs::COMMAND_IO, 0)?;
    let memory = Mapping::of(&device.resource(0)?, 1 << 17)?;
    let ports = device.resource(2)?;
    let mut value = [0; 4];
    ports.write_all_at(&STATUS.to_le_bytes(), 0)?;
    ports.read_exact_at(&mut value, 4)?;
    ensure!(u32::from_le_bytes(value) == memory.read(usize::try_from(STATUS)?));

    ports.write_all_at(&FLOW_CONTROL_THRESHOLD.to_le_bytes(), 0)?;
    for value in [0x8000_u32, 0x1230] {
        ports.write_all_at(&value.to_le_bytes(), 4)?;
        ensure!(memory.read::<u32>(usize::try_from(FLOW_CONTROL_THRESHOLD)?) == value);
    }
    Ok(())
}

/// Loads the driver anew so that it uses the interrupts that `mode` says.
fn reload(mode: &str) -> Result<()> {
    unload()?;
    busybox(&["insmod", &module()?, mode])
}

/// Sends and receives, with interrupts of `chip`.
fn exchange(device: &Device, chip: &str) -> Result<()> {
    let name = interface(device)?;
    busybox(&["ip", "address", "add", HERE, "dev", &name])?;
    busybox(&["ip", "link", "set", &name, "up"])?;
    wait_for("the link", || {
        let carrier = fs::read_to_string(format!("/sys/class/net/{name}/carrier"))?;
        Ok(carrier.trim() == "1")
    })?;
    // Small packets and large ones, each answered within a second, or else asked for again.
    for size in ["56", "1400"] {
        busybox(&[
            "ping", "-q", "-c", "3", "-w", "20", "-i", "0.2", "-s", size, THERE,
        ])?;
    }
    let counts = interrupts(&name)?;
    busybox(&["ip", "link", "set", &name, "down"])?;
    ensure!(
        counts.iter().all(|count| count.0.starts_with(chip)),
        "not {chip}: {counts:?}"
    );
    ensure!(
        counts.iter().any(|count| count.1 > 0),
        "no interrupts: {counts:?}"
    );
    Ok(())
}

/// The name of the card's interface.
fn interface(device: &Device) -> Result<String> {
    let entry = fs::read_dir(device.sysfs("net"))
        .context("the driver did not take the card")?
        .next()
        .context("no interface")??;
    Ok(entry.file_name().to_string_lossy().into_owned())
}

fn unload() -> Result<()> {
    if Path::new("/sys/module/e1000e").exists() {
        busybox(&["rmmod", "e1000e"])?;
    }
    Ok(())
}

/// Where the driver is, if it came with the initramfs.
fn module() -> Result<String> {
    for entry in fs::read_dir("/modules")? {
        let path = entry?.path().to_string_lossy().into_owned();
        if path.ends_with("-e1000e.ko") {
            return Ok(path);
        }
    }
    None.context("this guest has no driver for the card")
}
