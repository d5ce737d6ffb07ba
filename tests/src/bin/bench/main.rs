//! `make bench`: what Outrigger costs, beside its peers where they are given.
//!
//! The programs run the same tiny guests, and take turns, so that what else goes on in the machine disturbs all alike.

mod api;
mod disk;
mod program;
mod start;

use std::path::PathBuf;

use clap::Parser;

/// Measures start-up and memory, the control API, and the speed of disks.
#[derive(Debug, Parser)]
struct Arguments {
    /// The release build of outrigger
    #[arg(long)]
    outrigger: PathBuf,
    /// A cloud-hypervisor to compare with
    #[arg(long)]
    cloud_hypervisor: Option<PathBuf>,
    /// A qemu-system-x86_64 to compare with
    #[arg(long)]
    qemu: Option<PathBuf>,
    /// How often each program is started
    #[arg(long, default_value_t = 50)]
    runs: usize,
    /// How often each kind of I/O is measured
    #[arg(long, default_value_t = 11)]
    disk_runs: usize,
    /// Measure only the I/O with this in its name
    #[arg(long)]
    disk: Option<String>,
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    if arguments.runs > 0 {
        start::measure(&arguments)?;
        api::measure(&arguments)?;
    }
    if arguments.disk_runs > 0 {
        disk::measure(&arguments)?;
    }
    Ok(())
}

/// The value below which so many percent of the others are.
fn percentile(mut values: Vec<f64>, percent: usize) -> f64 {
    values.sort_by(f64::total_cmp);
    let index = values.len().saturating_sub(1) * percent / 100;
    values.get(index).copied().unwrap_or(f64::NAN)
}
