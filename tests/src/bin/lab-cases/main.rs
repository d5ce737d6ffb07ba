//! The cases that need real kernels. Runs inside the lab; `tests/lab/README.md` says how to add one.

mod api;
mod at_work;
mod backend;
mod bench;
mod boot;
mod card;
mod cost;
mod debian;
mod disk;
mod endings;
mod iommufd;
mod migrate;
mod no_kvm;
mod passthrough;
mod ping;
mod refusals;
mod serial;
mod servers;
mod snapshot;
mod terminal;
mod vcpu_state;
mod vfio_command;
mod virtual_function;
mod work;

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use tests::lab::{Images, Suite};

/// Runs the lab's cases.
#[derive(Debug, Parser)]
struct Options {
    /// The folder that tests/lab/setup.sh has filled
    #[arg(long, default_value = "target/lab")]
    lab: PathBuf,

    /// What cases do by chance follows from this number
    #[arg(long, default_value_t = 1)]
    seed: u64,

    /// Kill this many servers of disks, and run nothing else
    #[arg(long)]
    soak: Option<usize>,

    /// Run what `make bench` measures with Linux guests, and nothing else
    #[arg(long)]
    bench: bool,

    /// Run only cases with one of these texts in their name
    names: Vec<String>,
}

fn main() -> ExitCode {
    let options = Options::parse();
    let mut suite = Suite::new(Images::new(options.lab), options.names, options.seed);
    if let Some(kills) = options.soak {
        suite.run("soak-disks", |case| disk::soak(case, kills));
        return suite.close();
    }
    if options.bench {
        suite.run("bench-with-linux", bench::with_linux);
        return suite.close();
    }
    suite.run("no-kvm", no_kvm::refused);
    suite.run("vfio-there-and-back", vfio_command::there_and_back);
    suite.run("vfio-shared-group", vfio_command::shared_group);
    suite.run("refusals", refusals::all);
    // In labs of their own: see `make lab`.
    if has_parameter("intel_iommu=off") {
        suite.run("no-iommu", refusals::no_iommu);
    }
    if has_parameter("nointremap") {
        suite.run("no-remapping", refusals::no_remapping);
    }
    suite.run("backend-contract", backend::contract);
    suite.run("backend-migration", backend::migration);
    suite.run("vcpu-state", vcpu_state::unit_tests);
    suite.run("truncated-bar", servers::truncated_bar);
    suite.run("foreign-device", servers::foreign_device);
    suite.run("killed-and-stopped", servers::killed_and_stopped);
    suite.run("linux-6.12", boot::linux_6_12);
    suite.run("linux-6.1-huge-pages", boot::linux_6_1_huge_pages);
    suite.run("four-cpus-4g-two-devices", boot::four_cpus_4g_two_devices);
    suite.run("elf-kernel-pvh", boot::elf_kernel_pvh);
    suite.run("reset-restarts", endings::reset_restarts);
    suite.run("no-reboot", endings::no_reboot);
    suite.run("panic-resets", endings::panic_resets);
    suite.run("sigterm", endings::sigterm);
    suite.run("power-button", endings::power_button);
    suite.run("serial-file", serial::file);
    suite.run("serial-socket", serial::socket);
    suite.run("terminal-poweroff", serial::terminal_poweroff);
    suite.run("terminal-sigterm", serial::terminal_sigterm);
    suite.run("terminal-escape", serial::terminal_escape);
    suite.run("debian-disk", debian::with_initramfs);
    suite.run("passthrough-all", passthrough::all_kinds);
    suite.run("passthrough-group", passthrough::shared_group);
    suite.run("passthrough-lost", at_work::lost);
    suite.run("disks", disk::all);
    suite.run("cards", card::all);
    suite.run("snapshot", snapshot::under_load);
    suite.run("snapshot-host-devices", snapshot::of_host_devices);
    suite.run("migrate", migrate::there_and_back);
    suite.run("migrate-host-devices", migrate::host_devices);
    suite.run("cost-beside-qemu", cost::beside_qemu);
    // Debian's kernels have none: see `make test-iommufd`.
    if iommufd::is_there() {
        suite.run("iommufd-contract", backend::contract_by_iommufd);
        suite.run("iommufd-migration", backend::migration_by_iommufd);
        suite.run("iommufd-descriptors", iommufd::descriptors);
        suite.run("iommufd-off-and-on", iommufd::off_and_on);
        suite.run("debian-disk-no-initramfs", debian::without_initramfs);
    }
    if virtual_function::is_there() {
        suite.run("virtual-function", virtual_function::given);
    }
    suite.close()
}

/// Whether the lab's kernel was started with this parameter.
fn has_parameter(parameter: &str) -> bool {
    let line = fs::read_to_string("/proc/cmdline").unwrap_or_default();
    line.split_whitespace().any(|word| word == parameter)
}
