//! A disk, as Linux's driver has it.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use guest::ledger::{PLAN, Plan};
use rustix::fs::{FallocateFlags, fallocate};

use crate::interrupts::wait_for;
use crate::passthrough::{busybox, interrupts};
use crate::pci::Device;

/// A disk that has a name.
pub(crate) struct Block {
    /// Such as vda.
    pub(crate) name: String,
    virtio: String,
}

impl Block {
    /// The disk that a device is.
    pub(crate) fn of(device: &Device) -> Result<Self> {
        let mut found = None;
        wait_for("the disk", || {
            found = entries(&device.sysfs(""))?.into_iter().find_map(|virtio| {
                let name = entries(&device.sysfs(&format!("{virtio}/block")))
                    .ok()?
                    .pop()?;
                Some((name, virtio))
            });
            Ok(found.is_some())
        })?;
        let (name, virtio) = found.context("no disk")?;
        Ok(Self { name, virtio })
    }

    /// What sysfs says about it.
    pub(crate) fn attribute(&self, name: &str) -> Result<String> {
        let path = self.folder().join(name);
        let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        Ok(text.trim().to_owned())
    }

    /// Opens it to be read and written past all caches, or not.
    pub(crate) fn open(&self, is_direct: bool) -> Result<File> {
        let direct = rustix::fs::OFlags::DIRECT.bits().cast_signed();
        let mut options = OpenOptions::new();
        options.read(true).write(self.attribute("ro")? == "0");
        let flags = if is_direct { direct } else { 0 };
        Ok(options.custom_flags(flags).open(self.path())?)
    }

    /// Whether a file system on it, or in a partition of it, is in use.
    fn is_mounted(&self) -> Result<bool> {
        let mounts = fs::read_to_string("/proc/mounts")?;
        let path = self.path().display().to_string();
        Ok(mounts.lines().any(|mount| mount.starts_with(&path)))
    }

    pub(crate) fn path(&self) -> PathBuf {
        Path::new("/dev").join(&self.name)
    }

    fn folder(&self) -> PathBuf {
        Path::new("/sys/block").join(&self.name)
    }
}

/// Says what the disk is like.
pub(super) fn facts(device: &Device) -> Result<()> {
    let block = Block::of(device)?;
    let queues = entries(&block.folder().join("mq"))?.len();
    let mut words = vec![format!("queues={queues}")];
    for attribute in [
        "serial",
        "size",
        "ro",
        "cache_type",
        "queue/logical_block_size",
        "queue/discard_max_bytes",
        "queue/write_zeroes_max_bytes",
    ] {
        let name = attribute.trim_start_matches("queue/");
        words.push(format!(
            "{name}={}",
            block.attribute(attribute)?.replace(' ', "-")
        ));
    }
    println!("FACT disk {} {}", block.name, words.join(" "));
    Ok(())
}

/// Writes, and then has some of it become zeroes and some of it discarded. A disk that cannot be written refuses that. One
/// that has a plan, or a file system in use, is left alone.
pub(super) fn zeroes(device: &Device) -> Result<()> {
    const SIZE: usize = 4 << 20;
    let block = Block::of(device)?;
    if block.is_mounted()? {
        println!("FACT disk {} is in use, and left as it is", block.name);
        return Ok(());
    }
    let disk = block.open(true)?;
    let mut memory = Aligned::new(SIZE);
    disk.read_exact_at(memory.bytes_mut(), 0)?;
    if memory.bytes().get(..PLAN).and_then(Plan::parse).is_some() {
        return Ok(());
    }
    if block.attribute("ro")? == "1" {
        let options = OpenOptions::new().write(true).open(block.path());
        let written = options.and_then(|disk| disk.write_all_at(&[0xa5; 4096], 0));
        ensure!(written.is_err(), "it can be written");
        return Ok(());
    }
    memory.bytes_mut().fill(0xa5);
    disk.write_all_at(memory.bytes(), 0)?;
    let mut expected = memory.bytes().to_vec();
    let mut clear = |from: usize, to: usize| -> Result<()> {
        expected.get_mut(from..to).context("a part")?.fill(0);
        Ok(())
    };
    let zeroed = (512, 1 << 20);
    let flags = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
    fallocate(&disk, flags, zeroed.0, zeroed.1)?;
    clear(512, 512 + (1 << 20))?;
    let punched = (2 << 20, 3 * 512);
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(&disk, flags, punched.0, punched.1)?;
    clear(2 << 20, (2 << 20) + 3 * 512)?;
    let path = block.path();
    let words = ["blkdiscard", "-o", "3145728", "-l", "524288"];
    busybox(&[&words[..], &[&path.to_string_lossy()]].concat())?;
    clear(3 << 20, (3 << 20) + (1 << 19))?;
    disk.read_exact_at(memory.bytes_mut(), 0)?;
    let wrong = memory
        .bytes()
        .iter()
        .zip(&expected)
        .position(|(is, was)| is != was);
    ensure!(wrong.is_none(), "byte {wrong:?} is not what it should be");
    let counts = interrupts(&format!("{}-req", block.virtio))?;
    let is_msix = |(chip, count): &(String, u64)| chip.starts_with("PCI-MSIX") && *count > 0;
    ensure!(counts.iter().any(is_msix), "no interrupts: {counts:?}");
    Ok(())
}

/// Memory that can be read into past all caches.
pub(crate) struct Aligned {
    bytes: Vec<u8>,
    start: usize,
    length: usize,
}

impl Aligned {
    pub(crate) fn new(length: usize) -> Self {
        const PAGE: usize = 4096;
        let bytes = vec![0; length + PAGE];
        let start = bytes.as_ptr().align_offset(PAGE).min(PAGE);
        Self {
            bytes,
            start,
            length,
        }
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        let end = self.start + self.length;
        self.bytes.get(self.start..end).unwrap_or_default()
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        let end = self.start + self.length;
        self.bytes.get_mut(self.start..end).unwrap_or_default()
    }
}

/// The names in a folder, in order.
pub(super) fn entries(folder: &Path) -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(folder)? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}
