//! The programs that are measured, and how each is told to run the same guest.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context;

use crate::report::Machine;

pub(crate) const CLOUD_HYPERVISOR: &str = "Cloud Hypervisor";
pub(crate) const QEMU: &str = "QEMU";

/// Where the programs are.
#[derive(Debug)]
pub(crate) struct Programs {
    pub(crate) outrigger: PathBuf,
    pub(crate) cloud_hypervisor: Option<PathBuf>,
    pub(crate) qemu: Option<Qemu>,
}

#[derive(Debug)]
pub(crate) struct Qemu {
    pub(crate) path: PathBuf,
    /// Whether it is new enough to be a vfio-user client.
    pub(crate) knows_vfio_user: bool,
}

/// What all of them can run: a tiny guest with vfio-user devices.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Guest<'a> {
    pub(crate) kernel: &'a Path,
    pub(crate) mebibytes: u32,
    pub(crate) cpus: u32,
    /// The sockets of its devices' servers.
    pub(crate) devices: &'a [PathBuf],
}

impl<'a> Guest<'a> {
    /// With one CPU and 64 MiB of memory.
    pub(crate) fn small(kernel: &'a Path, devices: &'a [PathBuf]) -> Self {
        Self {
            kernel,
            mebibytes: 64,
            cpus: 1,
            devices,
        }
    }
}

impl Programs {
    /// Finds out what QEMU can do.
    ///
    /// # Errors
    /// When it does not run.
    pub(crate) fn new(
        outrigger: PathBuf,
        cloud_hypervisor: Option<PathBuf>,
        qemu: Option<PathBuf>,
    ) -> anyhow::Result<Self> {
        Ok(Self {
            outrigger,
            cloud_hypervisor,
            qemu: qemu.map(Qemu::at).transpose()?,
        })
    }

    /// Notes in the report which programs there are. Returns why others are not compared with.
    ///
    /// # Errors
    /// When one does not say its version.
    pub(crate) fn describe(&self, machine: &mut Machine) -> anyhow::Result<Vec<String>> {
        let mut skipped = Vec::new();
        machine.add_program("outrigger", &self.outrigger)?;
        match &self.cloud_hypervisor {
            Some(path) => machine.add_program(CLOUD_HYPERVISOR, path)?,
            None => skipped.push(format!(
                "{CLOUD_HYPERVISOR}: its path was not given (PEER_CLOUD_HYPERVISOR=PATH)"
            )),
        }
        match &self.qemu {
            Some(qemu) => machine.add_program(QEMU, &qemu.path)?,
            None => skipped.push(format!("{QEMU}: its path was not given (PEER_QEMU=PATH)")),
        }
        if self.qemu.as_ref().is_some_and(|qemu| !qemu.knows_vfio_user) {
            skipped.push(format!(
                "{QEMU} with vfio-user devices: it is too old; `tests/lab/qemu-peer.sh` fetches one that is not"
            ));
        }
        Ok(skipped)
    }

    /// Outrigger with such a guest.
    pub(crate) fn outrigger(&self, guest: &Guest<'_>) -> Command {
        let mut command = Command::new(&self.outrigger);
        command.arg("--kernel").arg(guest.kernel);
        command.arg("--memory");
        command.arg(format!("size={}M", guest.mebibytes));
        command.args(["--cpus", &guest.cpus.to_string(), "--serial", "tty"]);
        user_devices(&mut command, guest);
        command
    }

    /// Cloud Hypervisor with such a guest, if it is given.
    pub(crate) fn cloud_hypervisor(&self, guest: &Guest<'_>) -> Option<Command> {
        let mut command = Command::new(self.cloud_hypervisor.as_ref()?);
        command.arg("--kernel").arg(guest.kernel);
        command.arg("--memory");
        command.arg(format!("size={}M,shared=on", guest.mebibytes));
        command.args(["--cpus", &format!("boot={}", guest.cpus)]);
        command.args(["--serial", "tty", "--console", "off"]);
        user_devices(&mut command, guest);
        Some(command)
    }

    /// QEMU with such a guest on its smallest machine, which has no PCI and so no devices, if it is given.
    pub(crate) fn qemu_microvm(&self, guest: &Guest<'_>) -> Option<Command> {
        let mut command = Command::new(&self.qemu.as_ref()?.path);
        command.args(["-M", "microvm,accel=kvm", "-bios", "qboot.rom", "-m"]);
        command.arg(format!("{}M", guest.mebibytes));
        command.args("-nodefaults -no-user-config -nographic -serial stdio".split(' '));
        command.arg("-kernel").arg(guest.kernel);
        Some(command)
    }

    /// QEMU with such a guest on a machine with PCI, if it is given and can.
    pub(crate) fn qemu(&self, guest: &Guest<'_>) -> Option<Command> {
        let qemu = self.qemu.as_ref()?;
        if !guest.devices.is_empty() && !qemu.knows_vfio_user {
            return None;
        }
        let mut command = Command::new(&qemu.path);
        command.args("-M q35 -accel kvm -bios qboot.rom".split(' '));
        command.args("-nodefaults -no-user-config -display none -serial stdio".split(' '));
        let size = guest.mebibytes;
        command.args(["-m", &format!("{size}M"), "-smp", &guest.cpus.to_string()]);
        if !guest.devices.is_empty() {
            // Their servers are to reach guest memory.
            command.args(["-machine", "memory-backend=ram", "-object"]);
            command.arg(format!("memory-backend-memfd,id=ram,size={size}M,share=on"));
        }
        command.arg("-kernel").arg(guest.kernel);
        for socket in guest.devices {
            command.arg("-device").arg(format!(
                r#"{{"driver":"vfio-user-pci","socket":{{"type":"unix","path":"{}"}}}}"#,
                socket.display()
            ));
        }
        Some(command)
    }
}

/// Outrigger's and Cloud Hypervisor's flags for a guest's devices.
fn user_devices(command: &mut Command, guest: &Guest<'_>) {
    if guest.devices.is_empty() {
        return;
    }
    command.arg("--user-device");
    for socket in guest.devices {
        command.arg(format!("socket={}", socket.display()));
    }
}

impl Qemu {
    fn at(path: PathBuf) -> anyhow::Result<Self> {
        let options = Command::new(&path)
            .args(["-device", "vfio-user-pci,help"])
            .output();
        let options = options.with_context(|| format!("cannot run {}", path.display()))?;
        Ok(Self {
            knows_vfio_user: options.status.success(),
            path,
        })
    }
}
