//! A tree that looks like a host's `/sys` and `/dev`, for tests. The program's tests of `outrigger vfio` have it, too.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

/// The host, which ends with the value.
#[derive(Debug)]
pub(crate) struct Fake(TempDir);

impl Fake {
    /// A host with an IOMMU, VFIO's drivers, and no devices.
    pub(crate) fn new() -> Self {
        let fake = Self(TempDir::new().unwrap());
        fake.write("sys/class/iommu/dmar0/uevent", "");
        fake.write("sys/bus/pci/drivers_probe", "");
        fake.write("sys/bus/pci/drivers/vfio-pci/unbind", "");
        fake.write("dev/vfio/vfio", "");
        fake.folder("sys/bus/pci/devices");
        fake
    }

    /// The folder that stands for `/`.
    pub(crate) fn root(&self) -> &Path {
        self.0.path()
    }

    /// Adds a PCI device without a driver and a group; `ids` are vendor and device.
    pub(crate) fn pci(&self, name: &str, ids: (u16, u16), class: u32) -> FakeDevice<'_> {
        let directory = format!("sys/devices/pci0000:00/0000:00:1c.0/{name}");
        self.write(&format!("{directory}/vendor"), &format!("{:#06x}\n", ids.0));
        self.write(&format!("{directory}/device"), &format!("{:#06x}\n", ids.1));
        self.write(&format!("{directory}/class"), &format!("{class:#08x}\n"));
        self.write(&format!("{directory}/driver_override"), "(null)\n");
        self.link(&format!("{directory}/subsystem"), "sys/bus/pci");
        self.link(&format!("sys/bus/pci/devices/{name}"), &directory);
        let name = name.to_owned();
        FakeDevice {
            host: self,
            name,
            directory,
        }
    }

    /// Adds a mediated device without a driver and a group.
    pub(crate) fn mdev(&self, uuid: &str) -> FakeDevice<'_> {
        let parent = "sys/devices/virtual/mtty/mtty";
        let directory = format!("{parent}/{uuid}");
        let kind = format!("{parent}/mdev_supported_types/mtty-1");
        self.folder("sys/bus/mdev/drivers");
        self.folder(&directory);
        self.folder(&kind);
        self.link(&format!("{directory}/subsystem"), "sys/bus/mdev");
        self.link(&format!("{directory}/mdev_type"), &kind);
        self.link(&format!("sys/bus/mdev/devices/{uuid}"), &directory);
        let name = uuid.to_owned();
        FakeDevice {
            host: self,
            name,
            directory,
        }
    }

    /// Writes a file.
    pub(crate) fn write(&self, path: &str, text: &str) {
        let path = self.root().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    /// Takes a file or a folder away.
    pub(crate) fn remove(&self, path: &str) {
        let path = self.root().join(path);
        match path.is_dir() {
            true => fs::remove_dir_all(path).unwrap(),
            false => fs::remove_file(path).unwrap(),
        }
    }

    fn folder(&self, path: &str) {
        fs::create_dir_all(self.root().join(path)).unwrap();
    }

    /// Makes a symbolic link that is relative, as those in sysfs are.
    fn link(&self, from: &str, to: &str) {
        let up = "../".repeat(from.matches('/').count());
        let link = self.root().join(from);
        fs::create_dir_all(link.parent().unwrap()).unwrap();
        symlink(PathBuf::from(up).join(to), link).unwrap();
    }
}

/// A device of a host.
#[derive(Debug)]
pub(crate) struct FakeDevice<'a> {
    host: &'a Fake,
    name: String,
    directory: String,
}

impl FakeDevice<'_> {
    /// Puts it into a group.
    pub(crate) fn group(self, number: u32) -> Self {
        let group = format!("sys/kernel/iommu_groups/{number}");
        let member = format!("{group}/devices/{}", self.name);
        self.host.link(&member, &self.directory);
        let link = format!("{}/iommu_group", self.directory);
        self.host.link(&link, &group);
        self
    }

    /// Puts it into a group that VFIO has made.
    pub(crate) fn group_of_vfio(self, number: u32) -> Self {
        let name = format!("sys/kernel/iommu_groups/{number}/name");
        self.host.write(&name, "vfio-noiommu\n");
        self.group(number)
    }

    /// Binds it to a driver of its bus.
    pub(crate) fn driver(self, name: &str) -> Self {
        let bus = fs::read_link(self.path("subsystem")).unwrap();
        let bus = bus.file_name().unwrap().to_str().unwrap().to_owned();
        let driver = format!("sys/bus/{bus}/drivers/{name}");
        self.host.write(&format!("{driver}/unbind"), "");
        let link = format!("{}/driver", self.directory);
        self.host.link(&link, &driver);
        self
    }

    /// Gives it the directory that VFIO's devices have, with a number if it also has a character device.
    pub(crate) fn vfio_dev(self, name: &str, number: Option<&str>) -> Self {
        let folder = format!("{}/vfio-dev/{name}", self.directory);
        self.host.folder(&folder);
        if let Some(number) = number {
            self.host
                .write(&format!("{folder}/dev"), &format!("{number}\n"));
        }
        self
    }

    /// Writes a file in its directory.
    pub(crate) fn file(self, name: &str, text: &str) -> Self {
        let path = format!("{}/{name}", self.directory);
        self.host.write(&path, text);
        self
    }

    /// A file in its directory.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.host.root().join(&self.directory).join(name)
    }
}
