//! What the lab's kernel counts about a VM.

use std::fs;
use std::ops::Sub;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::Process;

/// The counters of a VM that runs.
#[derive(Debug)]
pub struct Counters {
    /// What KVM shows in debugfs.
    kvm: PathBuf,
    /// What the kernel says about the VMM's system calls.
    io: PathBuf,
}

/// What it took a VM to run its guest so far.
#[derive(Clone, Copy, Debug)]
pub struct Trips {
    /// Exits from the guest to KVM.
    pub exits: u64,
    /// Of those, how many KVM had the VMM handle (to I/O ports, some went no further than KVM).
    pub to_vmm: u64,
    /// How often the VMM read and wrote, also events: what it takes to forward an access or an interrupt.
    pub system_calls: u64,
}

impl Sub for Trips {
    type Output = Self;

    fn sub(self, before: Self) -> Self {
        Self {
            exits: self.exits - before.exits,
            to_vmm: self.to_vmm - before.to_vmm,
            system_calls: self.system_calls - before.system_calls,
        }
    }
}

impl Counters {
    /// The counters of the VM that `vm` runs.
    ///
    /// # Errors
    /// When there are none.
    pub fn of(vm: &Process) -> Result<Self> {
        let folder = Path::new("/sys/kernel/debug/kvm");
        if !folder.exists() {
            let mount = ["-t", "debugfs", "debugfs", "/sys/kernel/debug"];
            let status = Command::new("mount").args(mount).status()?;
            ensure!(status.success(), "mounting debugfs: {status}");
        }
        let prefix = format!("{}-", vm.id());
        let mut entries = fs::read_dir(folder)?.flatten();
        let of_vm = entries.find(|entry| entry.file_name().to_string_lossy().starts_with(&prefix));
        Ok(Self {
            kvm: of_vm.context("KVM does not know the VM")?.path(),
            io: format!("/proc/{}/io", vm.id()).into(),
        })
    }

    /// What they are now.
    ///
    /// # Errors
    /// When one of them is not there.
    pub fn read(&self) -> Result<Trips> {
        let kvm = |name: &str| -> Result<u64> {
            let text = fs::read_to_string(self.kvm.join(name));
            Ok(text.with_context(|| name.to_owned())?.trim().parse()?)
        };
        let text = fs::read_to_string(&self.io)?;
        let io = |name: &str| -> Result<u64> {
            let value = text.lines().find_map(|line| line.strip_prefix(name));
            Ok(value.with_context(|| name.to_owned())?.parse()?)
        };
        Ok(Trips {
            exits: kvm("exits")?,
            to_vmm: kvm("mmio_exits")? + kvm("io_exits")?,
            system_calls: io("syscr: ")? + io("syscw: ")?,
        })
    }
}
