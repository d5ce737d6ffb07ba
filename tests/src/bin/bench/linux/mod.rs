//! What a Linux guest has of it, where KVM can run one: how long it takes to boot, and how fast its disk and its network
//! card are with Linux's own drivers.
//!
//! The guest is the lab's: a Debian kernel, and the initramfs with the guest program (`tests/guest`), which does the I/O.

mod boot;
mod disk;
mod jobs;
mod net;

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use vmm::only_emulates;

use crate::Bench;
use crate::programs::{Guest, QEMU};

/// How long a guest may take to boot: one that cannot is to be left behind. The lab is what takes long.
const PATIENCE: Duration = Duration::from_secs(120);

/// A kernel, and an initramfs with its modules and the guest program.
#[derive(Clone, Debug)]
pub(crate) struct Linux {
    pub(crate) kernel: PathBuf,
    pub(crate) initramfs: PathBuf,
}

impl Linux {
    /// Such a guest, with one CPU.
    fn guest(&self) -> Guest<'_> {
        Guest {
            kernel: &self.kernel,
            mebibytes: 512,
            cpus: 1,
            devices: &[],
        }
    }

    /// Tells a program how to boot it.
    fn add(&self, name: &str, command: &mut Command, parameters: &str) {
        let line = format!("console=ttyS0 quiet panic=-1 {parameters}");
        let [initramfs, parameters] = match name {
            QEMU => ["-initrd", "-append"],
            _ => ["--initramfs", "--cmdline"],
        };
        command.arg(initramfs).arg(&self.initramfs);
        command.arg(parameters).arg(line);
        if name == QEMU {
            command.args(["-cpu", "host"]);
        }
    }
}

pub(crate) fn measure(bench: &mut Bench) -> anyhow::Result<()> {
    let reason = match bench.linux.clone() {
        _ if only_emulates() => "this KVM only emulates, and no Linux boots on it",
        Some(linux) => {
            boot::measure(bench, &linux)?;
            disk::measure(bench, &linux)?;
            return net::measure(bench, &linux);
        }
        None => {
            "the guest's kernel and initramfs were not given (LINUX_KERNEL=PATH, LINUX_INITRAMFS=PATH), \
             such as `make setup` makes"
        }
    };
    bench.report.skipped.push(format!(
        "`linux_boot_ms`, `linux_disk_*`, `linux_net_*`: {reason}"
    ));
    Ok(())
}
