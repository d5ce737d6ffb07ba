//! The parts of `make bench` that need a KVM that can run Linux, or a device of the host.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tests::lab::{Case, HostDevice, Process, load};

use crate::passthrough::EDU;

/// How long all of it may take.
const PATIENCE: Duration = Duration::from_secs(2000);

/// What it has to measure, of us and of these peers.
const KEYS: [(&str, &[&str]); 12] = [
    ("linux_boot_ms", QEMU),
    ("linux_disk_read_4k_1_kiops", QEMU),
    ("linux_disk_read_4k_32_kiops", QEMU),
    ("linux_disk_write_4k_1_kiops", QEMU),
    ("linux_disk_write_4k_32_kiops", QEMU),
    ("linux_disk_read_1m_mib_s", QEMU),
    ("linux_disk_write_1m_mib_s", QEMU),
    ("linux_disk_cpu_us", QEMU),
    ("linux_net_round_trips_khz", BOTH),
    ("linux_net_upload_mib_s", BOTH),
    ("linux_net_download_mib_s", BOTH),
    ("vfio_attach_ms", QEMU),
];
const QEMU: &[&str] = &["QEMU"];
const BOTH: &[&str] = &["QEMU", "QEMU with vhost"];

/// It measures all of it, in a hurry. What it finds means nothing here, and is a number nevertheless.
pub(crate) fn with_linux(case: &mut Case<'_>) -> Result<()> {
    let device = HostDevice::at(EDU)?;
    device.bind("vfio-pci")?;
    load("vhost_net")?;
    let report = case.path("report");
    let mut command = Process::command(&case.program("bench"));
    command.args("run --quick --only linux --only vfio --qemu qemu-system-x86_64".split(' '));
    let (kernel, initramfs) = (
        case.images().kernel("6.12"),
        case.images().initramfs("6.12"),
    );
    let paths: [(&str, &Path); 5] = [
        ("--outrigger", &case.program("outrigger")),
        ("--linux-kernel", &kernel),
        ("--linux-initramfs", &initramfs),
        ("--vfio-device", device.path()),
        ("--report", &report),
    ];
    for (flag, path) in paths {
        command.arg(flag).arg(path);
    }
    let mut bench = case.start(&mut command)?;
    let exit = bench.wait(PATIENCE)?;
    ensure!(exit.status.success(), "the bench: {}", exit.status);
    let text = fs::read(report.join("report.json"))?;
    let document: Value = serde_json::from_slice(&text)?;
    for (key, peers) in KEYS {
        is_measured(&document[key], peers).with_context(|| key.to_owned())?;
    }
    println!("{}", fs::read_to_string(report.join("report.md"))?);
    Ok(())
}

/// Whether it is a number of us and of each peer, in each of its cases if it has any.
fn is_measured(number: &Value, peers: &[&str]) -> Result<()> {
    if let Some(cases) = number["cases"].as_object() {
        let mut cases = cases.values();
        return cases.try_for_each(|case| is_measured(case, peers));
    }
    let theirs = peers.iter().map(|peer| (*peer, &number["peers"][*peer]));
    for (who, series) in [("ours", &number["ours"])].into_iter().chain(theirs) {
        // What JSON has no number for is null.
        let median = series["median"].as_f64();
        let median = median.with_context(|| format!("no median of {who}"))?;
        ensure!(median >= 0.0, "{median} of {who}");
    }
    Ok(())
}
