//! `outrigger vfio bind` and `outrigger vfio unbind`.
//!
//! Which driver a device had needs not be remembered: once any driver may have it again, the kernel chooses the same.

use std::fs::File;
use std::io::{self, ErrorKind};

use anyhow::{Context as _, bail};
use devices::host::{HostDevice, Kind, Sysfs};

use super::steps::Steps;

/// The driver that has any PCI device.
const VFIO_PCI: &str = "vfio-pci";

/// Gives devices to VFIO, or writes to `out` how.
pub(super) fn bind(
    sysfs: &Sysfs,
    names: &[String],
    dry_run: bool,
    out: &mut dyn io::Write,
) -> anyhow::Result<()> {
    let devices = plan(sysfs, names, bind_steps)?;
    for (device, steps) in &devices {
        if dry_run {
            write!(out, "{steps}")?;
            continue;
        }
        let before = device.driver();
        steps.perform(device.name())?;
        let after = device.driver();
        let now = spoken(after.as_deref());
        let name = device.name();
        if !device.is_with_vfio() {
            bail!(
                "{VFIO_PCI} has not taken {name}, which is with {now}: `dmesg` says why, and \
                 `outrigger vfio unbind {name}` gives it back"
            );
        }
        if steps.is_empty() {
            writeln!(out, "{name} is with {now} already")?;
        } else {
            writeln!(
                out,
                "{name} is with {now}, and was with {}",
                spoken(before.as_deref())
            )?;
        }
    }
    if !dry_run {
        // Now that all of them are bound: some may be of one group.
        for not_ready in devices
            .iter()
            .filter_map(|(device, _)| device.check(sysfs).err())
        {
            writeln!(out, "{not_ready}")?;
        }
    }
    Ok(())
}

/// Gives devices back to the host, or writes to `out` how.
pub(super) fn unbind(
    sysfs: &Sysfs,
    names: &[String],
    dry_run: bool,
    out: &mut dyn io::Write,
) -> anyhow::Result<()> {
    for (device, steps) in &plan(sysfs, names, unbind_steps)? {
        if dry_run {
            write!(out, "{steps}")?;
            continue;
        }
        steps.perform(device.name())?;
        let driver = device.driver();
        let now = spoken(driver.as_deref());
        let name = device.name();
        if device.is_with_vfio() {
            let (vendor, id) = device.ids().unwrap_or_default();
            bail!(
                "{now} has taken {name} again, as it was told to with `ids=` or new_id: \
                 `echo {vendor:04x} {id:04x} >{}` makes it forget",
                sysfs
                    .pci_bus()
                    .join("drivers")
                    .join(now)
                    .join("remove_id")
                    .display()
            );
        }
        let note = match driver {
            None => ": none that is loaded fits",
            Some(_) if steps.is_empty() => " already",
            Some(_) => "",
        };
        writeln!(out, "{name} is with {now}{note}")?;
    }
    Ok(())
}

/// Finds the devices, each once, and what to do to each. No device is touched if one of them cannot be done.
fn plan(
    sysfs: &Sysfs,
    names: &[String],
    steps: fn(&HostDevice, &Sysfs) -> anyhow::Result<Steps>,
) -> anyhow::Result<Vec<(HostDevice, Steps)>> {
    let mut plan: Vec<(HostDevice, Steps)> = Vec::new();
    for name in names {
        let device = sysfs.find(name)?;
        if device.kind() == Kind::Mdev {
            bail!(
                "{name} is a mediated device, which is with VFIO as long as there is one: writing 1 to {} ends it",
                device.directory().join("remove").display()
            );
        }
        if plan.iter().all(|(other, _)| *other != device) {
            let steps = steps(&device, sysfs)?;
            plan.push((device, steps));
        }
    }
    Ok(plan)
}

fn bind_steps(device: &HostDevice, sysfs: &Sysfs) -> anyhow::Result<Steps> {
    let mut steps = Steps::default();
    if device.is_with_vfio() {
        return Ok(steps);
    }
    // VFIO would not take it, and its own driver would have lost it.
    device.check_isolation(sysfs)?;
    let name = device.name();
    if !sysfs.pci_bus().join("drivers").join(VFIO_PCI).is_dir() {
        bail!("cannot bind {name}: the driver {VFIO_PCI} is not there: run `modprobe {VFIO_PCI}`");
    }
    let functions = device.virtual_functions();
    if functions > 0 {
        bail!(
            "cannot bind {name}: its {functions} virtual functions would vanish: write 0 to {} first",
            device.directory().join("sriov_numvfs").display()
        );
    }
    steps.allow_only(VFIO_PCI, device, sysfs);
    if let Some(driver) = device.driver() {
        steps.take_from(&driver, device, sysfs);
    }
    steps.probe(device, sysfs);
    Ok(steps)
}

fn unbind_steps(device: &HostDevice, sysfs: &Sysfs) -> anyhow::Result<Steps> {
    let mut steps = Steps::default();
    let driver = device.driver();
    let with_vfio = driver.as_ref().filter(|_| device.is_with_vfio());
    if let Some(driver) = with_vfio {
        not_in_use(device, sysfs)?;
        steps.take_from(driver, device, sysfs);
    }
    // Someone else's wish is none of ours.
    if device
        .driver_override()
        .is_some_and(|driver| driver.contains("vfio"))
    {
        steps.allow_only("", device, sysfs);
    }
    if with_vfio.is_some() || driver.is_none() {
        steps.probe(device, sysfs);
    }
    Ok(steps)
}

/// Checks that no VM has the device: the kernel would wait, and we with it, until that VM gives it back. A group can be
/// opened only once, and not while one of its devices is open in another way.
fn not_in_use(device: &HostDevice, sysfs: &Sysfs) -> anyhow::Result<()> {
    let Some(group) = device.group() else {
        return Ok(());
    };
    let path = group.path(sysfs);
    match File::options().read(true).write(true).open(&path) {
        Err(error) if error.kind() == ErrorKind::ResourceBusy => Err(error).with_context(|| {
            let path = path.display();
            format!(
                "{} is in use: end the VM that has its group {} first (`fuser -v {path}` names it)",
                device.name(),
                group.number()
            )
        }),
        _ => Ok(()),
    }
}

fn spoken(driver: Option<&str>) -> &str {
    driver.unwrap_or("no driver")
}
