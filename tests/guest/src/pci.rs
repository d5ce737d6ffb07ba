//! A device in sysfs: its config space and its BARs.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use guest::{DEVICE, VENDOR};

use crate::mapping::Mapping;

/// Config space offsets, named as in the PCI specification and Linux's `pci_regs.h`.
pub(crate) mod regs {
    pub(crate) const COMMAND: u16 = 0x04;
    pub(crate) const CLASS_REVISION: u16 = 0x08;
    pub(crate) const BASE_ADDRESS_0: u16 = 0x10;
    pub(crate) const SUBSYSTEM_VENDOR_ID: u16 = 0x2c;
    pub(crate) const CAPABILITY_LIST: u16 = 0x34;
    pub(crate) const INTERRUPT_LINE: u16 = 0x3c;
    pub(crate) const INTERRUPT_PIN: u16 = 0x3d;

    pub(crate) const COMMAND_IO: u16 = 1 << 0;
    pub(crate) const COMMAND_MEMORY: u16 = 1 << 1;
    pub(crate) const COMMAND_MASTER: u16 = 1 << 2;
    pub(crate) const COMMAND_INTX_DISABLE: u16 = 1 << 10;

    pub(crate) const CAP_PM: u8 = 0x01;
    pub(crate) const CAP_MSI: u8 = 0x05;
    pub(crate) const CAP_EXP: u8 = 0x10;
    pub(crate) const CAP_MSIX: u8 = 0x11;
    pub(crate) const EXT_CAP_VENDOR: u16 = 0x0b;
    pub(crate) const EXT_CAP_DSN: u16 = 0x03;
}

/// One BAR as the kernel sees it: a line of the `resource` file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Bar {
    pub(crate) start: u64,
    pub(crate) size: u64,
    pub(crate) flags: u64,
}

impl Bar {
    // From Linux's ioport.h.
    pub(crate) const IO: u64 = 0x100;
    pub(crate) const MEMORY: u64 = 0x200;
    pub(crate) const PREFETCH: u64 = 0x2000;
    pub(crate) const MEMORY_64: u64 = 0x10_0000;

    fn parse(line: &str) -> Result<Self> {
        let mut fields = line
            .split_whitespace()
            .map(|field| u64::from_str_radix(field.trim_start_matches("0x"), 16));
        let mut next = || {
            fields
                .next()
                .context("a line of the resource file is short")
        };
        let (start, end, flags) = (next()??, next()??, next()??);
        Ok(Self {
            start,
            size: if end == 0 { 0 } else { end - start + 1 },
            flags,
        })
    }
}

/// A device, open for everything.
#[derive(Debug)]
pub(crate) struct Device {
    /// The address on the bus, such as 0000:00:01.0.
    pub(crate) name: String,
    folder: PathBuf,
    config: File,
}

impl Device {
    /// The test devices of this machine, in bus order.
    pub(crate) fn all() -> Result<Vec<Self>> {
        Self::with_ids((VENDOR, DEVICE))
    }

    /// The devices with a vendor id and a device id, in bus order.
    pub(crate) fn with_ids(ids: (u16, u16)) -> Result<Vec<Self>> {
        let mut folders = Vec::new();
        for entry in fs::read_dir("/sys/bus/pci/devices")? {
            let folder = entry?.path();
            if (id(&folder, "vendor")?, id(&folder, "device")?) == ids {
                folders.push(folder);
            }
        }
        folders.sort();
        folders.into_iter().map(Self::open).collect()
    }

    fn open(folder: PathBuf) -> Result<Self> {
        let name = folder
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let config = OpenOptions::new()
            .read(true)
            .write(true)
            .open(folder.join("config"))?;
        Ok(Self {
            name,
            folder,
            config,
        })
    }

    /// Something in the device's folder in sysfs.
    pub(crate) fn sysfs(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// Bytes of config space.
    pub(crate) fn config_len(&self) -> Result<u64> {
        Ok(self.config.metadata()?.len())
    }

    /// One config read of `N` bytes. The kernel does it as one access where it is aligned and `N` is 1, 2 or 4.
    pub(crate) fn config<const N: usize>(&self, offset: u16) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        let read = self.config.read_exact_at(&mut bytes, offset.into());
        read.with_context(|| format!("reading config space at {offset:#x}"))?;
        Ok(bytes)
    }

    pub(crate) fn config8(&self, offset: u16) -> Result<u8> {
        Ok(u8::from_le_bytes(self.config(offset)?))
    }

    pub(crate) fn config16(&self, offset: u16) -> Result<u16> {
        Ok(u16::from_le_bytes(self.config(offset)?))
    }

    pub(crate) fn config32(&self, offset: u16) -> Result<u32> {
        Ok(u32::from_le_bytes(self.config(offset)?))
    }

    /// One config write, of 1, 2 or 4 bytes.
    pub(crate) fn set_config(&self, offset: u16, bytes: &[u8]) -> Result<()> {
        let written = self.config.write_all_at(bytes, offset.into());
        written.with_context(|| format!("writing config space at {offset:#x}"))
    }

    /// Sets and clears bits of the command register.
    pub(crate) fn command(&self, set: u16, clear: u16) -> Result<()> {
        let command = self.config16(regs::COMMAND)? & !clear | set;
        self.set_config(regs::COMMAND, &command.to_le_bytes())
    }

    /// Puts the device into power state D0 or D3, which it has to keep.
    pub(crate) fn set_power_state(&self, state: u16) -> Result<()> {
        const STATE: u16 = 3;
        let register = self.capability(regs::CAP_PM)? + 4;
        let control = self.config16(register)? & !STATE | state;
        self.set_config(register, &control.to_le_bytes())?;
        ensure!(self.config16(register)? & STATE == state);
        Ok(())
    }

    /// The capabilities in list order: id and offset.
    pub(crate) fn capabilities(&self) -> Result<Vec<(u8, u16)>> {
        let mut found = Vec::new();
        let mut offset = u16::from(self.config8(regs::CAPABILITY_LIST)? & 0xfc);
        while offset != 0 {
            ensure!(found.len() < 48, "the capability list does not end");
            let [id, next] = self.config(offset)?;
            found.push((id, offset));
            offset = u16::from(next & 0xfc);
        }
        Ok(found)
    }

    /// Where capability `id` is.
    pub(crate) fn capability(&self, id: u8) -> Result<u16> {
        let found = self.capabilities()?.into_iter().find(|found| found.0 == id);
        Ok(found
            .with_context(|| format!("there is no capability {id:#04x}"))?
            .1)
    }

    /// The extended capabilities in list order: id and offset.
    pub(crate) fn extended_capabilities(&self) -> Result<Vec<(u16, u16)>> {
        let mut found = Vec::new();
        let mut offset = 0x100;
        // Without PCI Express there is no config space for them.
        while offset != 0 && self.config_len()? > 0x100 {
            ensure!(
                found.len() < 960,
                "the extended capability list does not end"
            );
            let header = self.config32(offset)?;
            if header == 0 || header == u32::MAX {
                break;
            }
            let [id_low, id_high, ..] = header.to_le_bytes();
            found.push((u16::from_le_bytes([id_low, id_high]), offset));
            offset = u16::try_from(header >> 20)? & 0xffc;
        }
        Ok(found)
    }

    /// The BARs as the kernel sees them.
    pub(crate) fn bars(&self) -> Result<[Bar; 6]> {
        let text = fs::read_to_string(self.folder.join("resource"))?;
        let bars = text
            .lines()
            .take(6)
            .map(Bar::parse)
            .collect::<Result<Vec<_>>>()?;
        bars.try_into().ok().context("the resource file is short")
    }

    /// The file through which a BAR is mapped, or in case of an I/O BAR read and written.
    pub(crate) fn resource(&self, bar: usize) -> Result<File> {
        let path = self.folder.join(format!("resource{bar}"));
        let file = OpenOptions::new().read(true).write(true).open(&path);
        file.with_context(|| format!("opening {}", path.display()))
    }

    /// A memory BAR, mapped uncached as Linux does it for these files.
    pub(crate) fn map(&self, bar: usize) -> Result<Mapping> {
        let size = self.bars()?.get(bar).map_or(0, |bar| bar.size);
        let mapping = Mapping::of(&self.resource(bar)?, usize::try_from(size)?);
        mapping.with_context(|| format!("mapping BAR {bar}"))
    }

    /// Gives the device to a driver that knows nothing about it.
    pub(crate) fn bind(&self, driver: &str) -> Result<()> {
        fs::write(self.folder.join("driver_override"), driver)?;
        fs::write("/sys/bus/pci/drivers_probe", &self.name)?;
        ensure!(self.is_bound(), "{driver} did not take {}", self.name);
        Ok(())
    }

    /// Takes the device from its driver.
    pub(crate) fn unbind(&self) -> Result<()> {
        fs::write(self.folder.join("driver/unbind"), &self.name)?;
        Ok(())
    }

    /// Whether it has a driver.
    pub(crate) fn is_bound(&self) -> bool {
        self.folder.join("driver").exists()
    }

    /// The number of the UIO device that drives this one.
    pub(crate) fn uio(&self) -> Result<String> {
        let entry = fs::read_dir(self.folder.join("uio"))?
            .next()
            .context("no UIO device")??;
        Ok(entry.file_name().to_string_lossy().into_owned())
    }
}

fn id(folder: &Path, file: &str) -> Result<u16> {
    let text = fs::read_to_string(folder.join(file))?;
    Ok(u16::from_str_radix(
        text.trim().trim_start_matches("0x"),
        16,
    )?)
}
