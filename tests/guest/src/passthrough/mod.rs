//! What a guest checks about devices that the host has given to it: with the drivers that Linux has for them, and
//! `edu`, which has none, by hand. `RESULT address.check` says how it went, with the device's address on the bus.

pub(crate) mod edu;
mod network;
pub(crate) mod nvme;
mod rom;
pub(crate) mod uart;

use std::fs;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::pci::Device;

/// Something to find out about devices with these ids.
pub(crate) struct Check {
    name: &'static str,
    ids: (u16, u16),
    run: fn(&Device) -> Result<()>,
}

pub(crate) const EDU: (u16, u16) = (0x1234, 0x11e8);
pub(crate) const NVME: (u16, u16) = (0x1b36, 0x0010);
pub(crate) const E1000E: (u16, u16) = (0x8086, 0x10d3);
const IGBVF: (u16, u16) = (0x8086, 0x10ca);
pub(crate) const MTTY: (u16, u16) = (0x4348, 0x3253);

/// Every check, in the order in which they run.
pub(crate) const ALL: &[Check] = &[
    check("edu", EDU, edu::registers),
    check("edu-dma", EDU, edu::dma),
    check("edu-msi", EDU, edu::msi),
    check("edu-intx", EDU, edu::intx),
    check("edu-decode", EDU, edu::decode),
    check("nvme-sleep", NVME, nvme::sleep),
    check("nvme", NVME, nvme::file_system),
    check("e1000e-rom", E1000E, rom::image),
    check("e1000e-io", E1000E, network::io),
    check("e1000e-msix", E1000E, network::msix),
    check("e1000e-intx", E1000E, network::intx),
    check("igbvf-decode", IGBVF, network::decode),
    check("igbvf-msix", IGBVF, network::virtual_function),
    check("mtty-io", MTTY, uart::io),
    check("mtty-loop", MTTY, uart::echo),
];

pub(crate) const fn check(
    name: &'static str,
    ids: (u16, u16),
    run: fn(&Device) -> Result<()>,
) -> Check {
    Check { name, ids, run }
}

/// Runs those of the checks that are selected on each device that they are for.
pub(crate) fn run(checks: &[Check], selected: impl Fn(&str) -> bool) -> Result<()> {
    for check in checks.iter().filter(|check| selected(check.name)) {
        for device in Device::with_ids(check.ids)? {
            match (check.run)(&device) {
                Ok(()) => println!("RESULT {}.{} ok", device.name, check.name),
                Err(error) => println!("RESULT {}.{} FAILED {error:#}", device.name, check.name),
            }
        }
    }
    Ok(())
}

/// Runs a program of busybox.
pub(crate) fn busybox(words: &[&str]) -> Result<()> {
    let output = Command::new("busybox").args(words).output()?;
    ensure!(
        output.status.success(),
        "{}: {}",
        words.join(" "),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(())
}

/// The interrupts that a driver has asked for under a name that begins with `name`: the kind of each, and how often it
/// came.
pub(crate) fn interrupts(name: &str) -> Result<Vec<(String, u64)>> {
    let text = fs::read_to_string("/proc/interrupts")?;
    let lines = text.lines().map(|line| line.split_whitespace().skip(1));
    let ours = lines.filter(|words| words.clone().any(|word| word.starts_with(name)));
    ours.map(|mut words| {
        let mut count = 0;
        for word in words.by_ref() {
            match word.parse::<u64>() {
                Ok(number) => count += number,
                Err(_) => return Ok((word.to_owned(), count)),
            }
        }
        None.context("a line of /proc/interrupts names no chip")
    })
    .collect()
}
