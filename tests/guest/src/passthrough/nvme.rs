//! A disk, with Linux's driver.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use super::{busybox, interrupts};
use crate::interrupts::wait_for;
use crate::pci::{Device, regs};

const DISK: &str = "/dev/nvme0n1";
const FOLDER: &str = "/disk";
const FILE: &str = "/disk/file";

/// Makes a file system, writes a file, and reads it back from the disk. A guest that finds the file system of an earlier
/// boot expects the file on it. `FACT nvme-kept` says whether it did.
pub(super) fn file_system(_: &Device) -> Result<()> {
    disk()?;
    fs::create_dir_all(FOLDER)?;
    let contents: Vec<u8> = (0..2_u32 << 20)
        .flat_map(|number| number.wrapping_mul(0x9e37_79b1).to_le_bytes())
        .collect();
    let is_kept = mount().is_ok();
    println!("FACT nvme-kept {is_kept}");
    if !is_kept {
        busybox(&["mke2fs", DISK])?;
        mount()?;
        fs::write(FILE, &contents)?;
        busybox(&["umount", FOLDER])?; // what is read is going to come from the disk
        mount()?;
    }
    let read = fs::read(FILE).context("the file is lost")?;
    busybox(&["umount", FOLDER])?;
    ensure!(read == contents, "the file has changed");
    ensure!(
        interrupts("nvme0q")?
            .iter()
            .any(|(chip, count)| chip.starts_with("PCI-MSI") && *count > 0),
        "no interrupts"
    );
    Ok(())
}

/// Its registers are gone while it sleeps, and the driver takes it when it is awake again.
pub(super) fn sleep(device: &Device) -> Result<()> {
    const VERSION: usize = 8;
    disk()?;
    device.unbind()?;
    device.command(regs::COMMAND_MEMORY, 0)?;
    let registers = device.map(0)?;
    let version: u32 = registers.read(VERSION);
    for _ in 0..2 {
        device.set_power_state(3)?;
        ensure!(registers.read::<u32>(VERSION) == u32::MAX, "it answers");
        device.set_power_state(0)?;
        ensure!(registers.read::<u32>(VERSION) == version, "not {version:x}");
    }
    ensure!(version != u32::MAX, "it has no registers");
    device.bind("nvme")?;
    disk()
}

/// The disk, to be read past all caches.
pub(crate) fn open() -> Result<File> {
    disk()?;
    let direct = rustix::fs::OFlags::DIRECT.bits().cast_signed();
    let mut options = OpenOptions::new();
    Ok(options.read(true).custom_flags(direct).open(DISK)?)
}

/// Waits until the disk is there.
fn disk() -> Result<()> {
    wait_for("the disk", || Ok(Path::new(DISK).exists()))
}

fn mount() -> Result<()> {
    busybox(&["mount", "-t", "ext4", DISK, FOLDER])
}
