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

use std::io;

use devices::host::Sysfs;

use crate::cli::Vfio;

/// Does what is asked for on this host, as long as somebody reads what it says.
pub(crate) fn run(command: &Vfio) -> anyhow::Result<()> {
    let result = run_to(command, &mut io::stdout().lock());
    result.or_else(|error| match error.downcast_ref::<io::Error>() {
        Some(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        _ => Err(error),
    })
}

fn run_to(command: &Vfio, out: &mut impl io::Write) -> anyhow::Result<()> {
    let sysfs = Sysfs::default();
    match command {
        Vfio::List { all } => write!(out, "{}", list::table(&sysfs, *all)?)?,
        Vfio::Bind { devices, dry_run } => bind::bind(&sysfs, devices, *dry_run, out)?,
        Vfio::Unbind { devices, dry_run } => bind::unbind(&sysfs, devices, *dry_run, out)?,
    }
    Ok(out.flush()?)
}
