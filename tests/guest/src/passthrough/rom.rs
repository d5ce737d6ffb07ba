//! Expansion ROMs.

use std::fs;

use anyhow::{Result, ensure};

use crate::pci::Device;

/// Linux reads a ROM whose images begin with the signature, and say how long they are (PCI Firmware 3.2, 5.1).
pub(super) fn image(device: &Device) -> Result<()> {
    const SIGNATURE: [u8; 2] = [0x55, 0xaa];
    let path = device.sysfs("rom");
    fs::write(&path, "1")?;
    let image = fs::read(&path)?;
    fs::write(&path, "0")?;
    ensure!(image.starts_with(&SIGNATURE), "{:x?}", image.get(..16));
    ensure!(image.len() >= 2048, "it ends after {} bytes", image.len());
    Ok(())
}
