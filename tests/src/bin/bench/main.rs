//! `make bench`: where Outrigger stands, in one table, beside its peers where they are given.
//!
//! Every claim of speed is a ratio measured in one run: against a peer that runs the same tiny guest, or against the
//! limit that the kernel sets. Whoever is compared takes turns with the others, so that what else goes on in the machine
//! disturbs all alike. There is a module for each family of measurements.

mod accesses;
mod api;
mod bare;
mod client;
mod device;
mod disk;
mod driver;
mod full_guest;
mod http;
mod linux;
mod measurement;
mod migration;
mod placement;
mod plain_copy;
mod program;
mod programs;
mod report;
mod scaling;
mod snapshot;
mod start;
mod turns;
mod vfio;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::ensure;
use clap::Parser;

use self::linux::Linux;
use self::measurement::Measurement;
use self::programs::Programs;
use self::report::{Machine, Report};

/// Measures Outrigger beside its peers.
#[derive(Debug, Parser)]
enum Arguments {
    /// Measures, and writes a report
    Run(Run),
    /// Is the least that a VMM can be, with a tiny guest and the bench's own device
    #[command(hide = true)]
    BareVmm { kernel: PathBuf, socket: PathBuf },
}

#[derive(Debug, clap::Args)]
struct Run {
    /// The release build of outrigger
    #[arg(long)]
    outrigger: PathBuf,
    /// A cloud-hypervisor to compare with
    #[arg(long)]
    cloud_hypervisor: Option<PathBuf>,
    /// A qemu-system-x86_64 to compare with: 11.1 for vfio-user, any for the rest
    #[arg(long)]
    qemu: Option<PathBuf>,
    /// A kernel to boot, where KVM can run Linux
    #[arg(long, requires = "linux_initramfs")]
    linux_kernel: Option<PathBuf>,
    /// The lab's initramfs for that kernel
    #[arg(long, requires = "linux_kernel")]
    linux_initramfs: Option<PathBuf>,
    /// A device of the host that vfio-pci has: its folder in sysfs
    #[arg(long)]
    vfio_device: Option<PathBuf>,
    /// Measure a few times only, which takes less than three minutes
    #[arg(long)]
    quick: bool,
    /// Measure only this family; may be repeated
    #[arg(long)]
    only: Vec<String>,
    /// The folder for the report
    #[arg(long, default_value = "target/bench")]
    report: PathBuf,
}

/// What is measured, in the order of the report.
const FAMILIES: [(&str, Family); 10] = [
    ("start", start::measure),
    ("accesses", accesses::measure),
    ("client", client::measure),
    ("api", api::measure),
    ("scaling", scaling::measure),
    ("snapshot", snapshot::measure),
    ("migration", migration::measure),
    ("disk", disk::measure),
    ("linux", linux::measure),
    ("vfio", vfio::measure),
];

type Family = fn(&mut Bench) -> anyhow::Result<()>;

/// What measures need: the programs, and where to leave the results.
struct Bench {
    programs: Programs,
    linux: Option<Linux>,
    vfio_device: Option<PathBuf>,
    quick: bool,
    report: Report,
}

impl Bench {
    /// How often to do what is otherwise done so many times.
    fn rounds(&self, many: usize) -> usize {
        if self.quick {
            many.div_ceil(8).max(3)
        } else {
            many
        }
    }

    fn add(&mut self, measurement: Measurement) {
        self.report.measurements.push(measurement);
    }

    /// Notes the peers that could not be measured.
    fn failed(&mut self, key: &str, failures: Vec<(&'static str, anyhow::Error)>) {
        for (peer, error) in failures {
            self.report
                .skipped
                .push(format!("`{key}` of {peer}: {error:#}"));
        }
    }
}

fn main() -> anyhow::Result<ExitCode> {
    let arguments = match Arguments::parse() {
        Arguments::BareVmm { kernel, socket } => {
            bare::run(&kernel, &socket)?;
            return Ok(ExitCode::SUCCESS);
        }
        Arguments::Run(arguments) => arguments,
    };
    for only in &arguments.only {
        let names = FAMILIES.map(|(name, _)| name);
        ensure!(
            names.contains(&only.as_str()),
            "--only: there is no `{only}`, but {}",
            names.join(", ")
        );
    }
    let programs = Programs::new(
        arguments.outrigger,
        arguments.cloud_hypervisor,
        arguments.qemu,
    )?;
    let mut machine = Machine::this(arguments.quick)?;
    let skipped = programs.describe(&mut machine)?;
    let linux = arguments.linux_kernel.zip(arguments.linux_initramfs);
    let mut bench = Bench {
        programs,
        linux: linux.map(|(kernel, initramfs)| Linux { kernel, initramfs }),
        vfio_device: arguments.vfio_device,
        quick: arguments.quick,
        report: Report {
            machine,
            measurements: Vec::new(),
            skipped,
        },
    };
    let mut status = ExitCode::SUCCESS;
    for (name, measure) in FAMILIES {
        if !arguments.only.is_empty() && !arguments.only.iter().any(|only| only == name) {
            continue;
        }
        eprintln!("measuring: {name}");
        if let Err(error) = measure(&mut bench) {
            eprintln!("cannot measure {name}: {error:#}");
            bench.report.skipped.push(format!("{name}: {error:#}"));
            status = ExitCode::FAILURE;
        }
    }
    bench.report.machine.finish()?;
    bench.report.write(&arguments.report)?;
    println!("{}", bench.report.table());
    Ok(status)
}
