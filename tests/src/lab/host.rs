//! The devices that the lab has to give away (`tests/lab/devices.cfg`), and the one that its kernel makes up.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

const DEVICES: &str = "/sys/bus/pci/devices";

/// A PCI device of the lab. When this is dropped the device is as the lab found it: without a driver.
#[derive(Debug)]
pub struct HostDevice {
    address: String,
    path: PathBuf,
}

impl HostDevice {
    /// The device at an address such as 0000:01:00.0.
    ///
    /// # Errors
    /// When there is none.
    pub fn at(address: &str) -> Result<Self> {
        let path = Path::new(DEVICES).join(address);
        ensure!(path.exists(), "the lab has no device {address}");
        Ok(Self {
            address: address.to_owned(),
            path,
        })
    }

    /// The devices with these ids, in bus order.
    ///
    /// # Errors
    /// When sysfs cannot be read.
    pub fn with_ids(vendor: u16, device: u16) -> Result<Vec<Self>> {
        let ids = (format!("{vendor:#06x}"), format!("{device:#06x}"));
        let mut addresses = Vec::new();
        for entry in fs::read_dir(DEVICES)? {
            let path = entry?.path();
            let read = |file| fs::read_to_string(path.join(file)).map(|id| id.trim().to_owned());
            if (read("vendor")?, read("device")?) == ids {
                let name = path.file_name().unwrap_or_default();
                addresses.push(name.to_string_lossy().into_owned());
            }
        }
        addresses.sort();
        addresses.iter().map(|address| Self::at(address)).collect()
    }

    /// The address on the bus.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// The device's folder in sysfs.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The number of its IOMMU group.
    ///
    /// # Errors
    /// When it has none.
    pub fn group(&self) -> Result<String> {
        self.link("iommu_group").context("it is in no IOMMU group")
    }

    /// The file by which VFIO's users open that group, when VFIO has the device.
    ///
    /// # Errors
    /// When it is in none.
    pub fn group_file(&self) -> Result<PathBuf> {
        Ok(Path::new("/dev/vfio").join(self.group()?))
    }

    /// The driver that has it.
    pub fn driver(&self) -> Option<String> {
        self.link("driver")
    }

    /// Gives it to a driver, by hand as Linux documents it, and away from the one that has it.
    ///
    /// # Errors
    /// When the driver does not take it.
    pub fn bind(&self, driver: &str) -> Result<()> {
        load(driver)?;
        self.unbind()?;
        fs::write(self.path.join("driver_override"), driver)?;
        fs::write("/sys/bus/pci/drivers_probe", &self.address)?;
        ensure!(
            self.driver().as_deref() == Some(driver),
            "{driver} does not take {}",
            self.address
        );
        Ok(())
    }

    /// Takes it from its driver, if it has one.
    ///
    /// # Errors
    /// When the kernel does not.
    pub fn unbind(&self) -> Result<()> {
        fs::write(self.path.join("driver_override"), "\n")?;
        if self.driver().is_some() {
            fs::write(self.path.join("driver/unbind"), &self.address)?;
        }
        Ok(())
    }

    /// Its first virtual function, and no others, with a link if it is a network card and its driver has it.
    ///
    /// # Errors
    /// When the driver makes none.
    pub fn virtual_function(&self) -> Result<Self> {
        fs::write(self.path.join("sriov_numvfs"), "1").context("making a virtual function")?;
        for interface in fs::read_dir(self.path.join("net"))? {
            let name = interface?.file_name().to_string_lossy().into_owned();
            run("busybox", &["ifconfig", &name, "up"])?;
        }
        let name = self.link("virtfn0").context("no virtual function")?;
        Self::at(&name)
    }

    /// Pulls it out of the machine, which waits until whoever uses it has let it go.
    ///
    /// # Errors
    /// When the kernel does not.
    pub fn remove(&self) -> Result<()> {
        Ok(fs::write(self.path.join("remove"), "1")?)
    }

    fn link(&self, name: &str) -> Option<String> {
        let target = fs::read_link(self.path.join(name)).ok()?;
        Some(target.file_name()?.to_string_lossy().into_owned())
    }
}

impl Drop for HostDevice {
    fn drop(&mut self) {
        // Nothing is left to do about an error: a later case finds the device as it is.
        let _ = match self.path.exists() {
            true => self.unbind(),
            false => fs::write("/sys/bus/pci/rescan", "1").map_err(Into::into),
        };
    }
}

/// A mediated device of the lab's kernel: a serial port. It ends when this is dropped.
#[derive(Debug)]
pub struct Mtty {
    path: PathBuf,
}

impl Mtty {
    /// Makes the device with this UUID.
    ///
    /// # Errors
    /// When the kernel does not.
    pub fn create(uuid: &str) -> Result<Self> {
        const CREATE: &str = "/sys/devices/virtual/mtty/mtty/mdev_supported_types/mtty-1/create";
        load("mtty")?;
        fs::write(CREATE, uuid).context("making an mtty")?;
        let path = Path::new("/sys/bus/mdev/devices").join(uuid);
        Ok(Self { path })
    }

    /// The device's folder in sysfs.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Mtty {
    fn drop(&mut self) {
        // Nothing is left to do about an error: the device is the case's own.
        let _ = fs::write(self.path.join("remove"), "1");
    }
}

/// Joins the wire on which the lab's network cards are, as 192.0.2.1.
///
/// # Errors
/// When the lab has no card of its own.
pub fn join_wire() -> Result<()> {
    load("virtio_net")?;
    let name = interface("virtio_net").context("the lab has no card of its own")?;
    let words = [&name, "192.0.2.1", "netmask", "255.255.255.0", "up"];
    run("busybox", &[&["ifconfig"], &words[..]].concat())
}

/// The network interface of a driver.
fn interface(driver: &str) -> Option<String> {
    let interfaces = fs::read_dir("/sys/class/net").ok()?.flatten();
    interfaces
        .filter(|entry| {
            let its = fs::read_link(entry.path().join("device/driver"));
            its.is_ok_and(|path| path.ends_with(driver))
        })
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .next()
}

/// Loads a module with what it needs.
///
/// # Errors
/// When there is none.
pub fn load(module: &str) -> Result<()> {
    run("modprobe", &["-a", module])
}

/// Runs a program that is to succeed.
///
/// # Errors
/// When it does not.
pub fn run(program: &str, words: &[&str]) -> Result<()> {
    let output = Command::new(program).args(words).output();
    let output = output.with_context(|| format!("cannot run {program}"))?;
    ensure!(
        output.status.success(),
        "{program} {}: {}",
        words.join(" "),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(())
}
