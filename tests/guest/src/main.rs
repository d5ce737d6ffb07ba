//! What a test guest runs: shows the devices that it finds, checks them, and prints what a test reads:
//!
//! * `FACT name value`: something that the test knows better than the guest what to think of;
//! * `RESULT N.check ok` or `RESULT N.check FAILED why`, for check `check` of test device `N`;
//! * the same for devices that the host has given to the guest, with the device's address for `N`;
//! * `GUEST DONE`, the last line.
//!
//! With the argument `work`, `load` or `bench` it does what [`work`], [`load`] or [`bench`] says instead; with `disks`,
//! `cards` and `counted`, what the modules of these names in [`virtio`] say. With `first-word` it is a guest's first program.
//!
//! `outrigger.checks=a,b` on the kernel command line selects checks; without it all of them run.

mod bench;
mod checks;
mod dma;
mod interrupts;
mod load;
mod mapping;
mod passthrough;
mod pci;
mod virtio;
mod work;

use std::{env, fs};

use anyhow::Result;

use crate::pci::Device;

fn main() -> Result<()> {
    match env::args().nth(1).as_deref() {
        Some("work") => return work::until_button(),
        Some("load") => return load::until_button(),
        Some("disks") => return virtio::disks::until_button(),
        Some("cards") => return virtio::cards::until_button(),
        Some("bench") => return bench::all(),
        Some("first-word") => bench::first_word(),
        Some("counted") => return virtio::counted::all(),
        _ => {}
    }
    facts()?;
    let selected = parameter("outrigger.checks")?;
    let selected = |name: &str| {
        selected
            .as_deref()
            .is_none_or(|list| list.split(',').any(|check| check == name))
    };
    let devices = Device::all()?;
    println!("FACT devices {}", devices.len());
    for (index, device) in devices.iter().enumerate() {
        show(device)?;
        for check in checks::ALL.iter().filter(|check| selected(check.name)) {
            match (check.run)(device) {
                Ok(()) => println!("RESULT {index}.{} ok", check.name),
                Err(error) => println!("RESULT {index}.{} FAILED {error:#}", check.name),
            }
        }
    }
    passthrough::run(passthrough::ALL, selected)?;
    virtio::run(selected)?;
    println!("GUEST DONE");
    Ok(())
}

/// The value of a parameter on the kernel command line.
fn parameter(name: &str) -> Result<Option<String>> {
    let line = fs::read_to_string("/proc/cmdline")?;
    let mut words = line
        .split_whitespace()
        .filter_map(|word| word.split_once('='));
    Ok(words
        .find(|word| word.0 == name)
        .map(|word| word.1.to_owned()))
}

/// The machine, as this kernel sees it.
fn facts() -> Result<()> {
    println!(
        "FACT kernel {}",
        fs::read_to_string("/proc/sys/kernel/osrelease")?.trim()
    );
    println!("FACT cpus {}", interrupts::cpus()?.len());
    let cpus = fs::read_to_string("/proc/cpuinfo")?;
    let can_nest = cpus
        .split_whitespace()
        .any(|flag| ["vmx", "svm"].contains(&flag));
    println!("FACT nested {}", u8::from(can_nest));
    let memory = fs::read_to_string("/proc/meminfo")?;
    println!(
        "FACT memory-kib {}",
        memory.split_whitespace().nth(1).unwrap_or_default()
    );
    let clock =
        fs::read_to_string("/sys/devices/system/clocksource/clocksource0/current_clocksource")?;
    println!("FACT clock {}", clock.trim());
    let mut ranges = Vec::new();
    for entry in fs::read_dir("/sys/firmware/memmap")? {
        let folder = entry?.path();
        let read = |file| {
            fs::read_to_string(folder.join(file))
                .map(|text| text.trim().trim_start_matches("0x").to_owned())
        };
        ranges.push((
            u64::from_str_radix(&read("start")?, 16)?,
            u64::from_str_radix(&read("end")?, 16)?,
            read("type")?,
        ));
    }
    ranges.sort();
    for (start, end, kind) in ranges {
        println!("FACT e820 {start:#x}-{end:#x} {kind}");
    }
    Ok(())
}

/// What `lspci -v` would say about a device.
fn show(device: &Device) -> Result<()> {
    println!(
        "{}: {:04x}:{:04x} class {:06x} revision {:02x}",
        device.name,
        device.config16(0)?,
        device.config16(2)?,
        device.config32(pci::regs::CLASS_REVISION)? >> 8,
        device.config8(pci::regs::CLASS_REVISION)?
    );
    for (index, bar) in device
        .bars()?
        .iter()
        .enumerate()
        .filter(|(_, bar)| bar.size != 0)
    {
        let kind = if bar.flags & pci::Bar::IO != 0 {
            "I/O ports"
        } else {
            "memory"
        };
        println!(
            "  BAR {index}: {kind} at {:#x}, {} bytes",
            bar.start, bar.size
        );
    }
    let list = device.capabilities()?;
    println!(
        "  capabilities: {}",
        list.iter()
            .map(|(id, at)| format!("{id:02x}@{at:02x} "))
            .collect::<String>()
    );
    let list = device.extended_capabilities()?;
    println!(
        "  extended: {}",
        list.iter()
            .map(|(id, at)| format!("{id:04x}@{at:03x} "))
            .collect::<String>()
    );
    Ok(())
}
