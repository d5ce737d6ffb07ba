//! `outrigger vfio`: shows the host's devices, gives them to VFIO, and gives them back.

mod bind;
mod class;
mod list;
mod steps;

#[cfg(test)]
#[path = "../../../devices/src/host/fake.rs"]
mod fake;
#[cfg(test)]
mod tests;

use std::io::{self, Write as _};

use devices::host::Sysfs;

use crate::cli::Vfio;

/// Does what is asked for on this host.
pub(crate) fn run(command: &Vfio) -> anyhow::Result<()> {
    let sysfs = Sysfs::default();
    let mut out = io::stdout().lock();
    match command {
        Vfio::List { all } => write!(out, "{}", list::table(&sysfs, *all)?)?,
        Vfio::Bind { devices, dry_run } => bind::bind(&sysfs, devices, *dry_run, &mut out)?,
        Vfio::Unbind { devices, dry_run } => bind::unbind(&sysfs, devices, *dry_run, &mut out)?,
    }
    Ok(out.flush()?)
}
