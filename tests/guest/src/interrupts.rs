//! Counts interrupts with a stock kernel and no module.
//!
//! Linux on x86 has system vectors that KVM uses for posted interrupts. It acknowledges them, counts them per CPU in
//! /proc/interrupts, and otherwise ignores them. A device whose MSI-X table is programmed with those vectors can
//! therefore interrupt any CPU, and how often it did is there to read.

use std::collections::BTreeMap;
use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// The vectors (arch/x86/include/asm/irq_vectors.h) with their names in /proc/interrupts.
pub(crate) const VECTORS: [(u8, &str); 3] = [(0xf0, "NPI"), (0xf1, "PIW"), (0xf2, "PIN")];

/// How long an interrupt or a pending bit may take on a slow machine.
const PATIENCE: Duration = Duration::from_secs(10);

/// A CPU that interrupts can be sent to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cpu {
    pub(crate) number: usize,
    pub(crate) apic_id: u8,
}

/// The CPUs that are online.
pub(crate) fn cpus() -> Result<Vec<Cpu>> {
    let text = fs::read_to_string("/proc/cpuinfo")?;
    let values = |key: &str| {
        let lines = text.lines().filter_map(|line| line.split_once(':'));
        lines
            .filter(|line| line.0.trim() == key)
            .map(|line| line.1.trim().to_owned())
            .collect::<Vec<_>>()
    };
    let numbers = values("processor").into_iter();
    numbers
        .zip(values("apicid"))
        .map(|(n, id)| {
            Ok(Cpu {
                number: n.parse()?,
                apic_id: id.parse()?,
            })
        })
        .collect()
}

/// Interrupts so far, by vector and CPU number.
pub(crate) type Counts = BTreeMap<(u8, usize), u64>;

/// Reads the counters of [`VECTORS`].
pub(crate) fn counts() -> Result<Counts> {
    let text = fs::read_to_string("/proc/interrupts")?;
    let mut counts = Counts::new();
    for (vector, name) in VECTORS {
        let line = text
            .lines()
            .find_map(|line| line.trim_start().strip_prefix(name)?.strip_prefix(':'));
        let line = line.with_context(|| format!("this kernel does not count {name} interrupts"))?;
        for (cpu, count) in line
            .split_whitespace()
            .map_while(|word| word.parse().ok())
            .enumerate()
        {
            counts.insert((vector, cpu), count);
        }
    }
    Ok(counts)
}

/// Waits until the counters are exactly `expected`; more than expected is an error at once.
pub(crate) fn expect(expected: &Counts) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let now = counts()?;
        if now == *expected {
            return Ok(());
        }
        let surplus = now
            .iter()
            .any(|(key, count)| expected.get(key).is_none_or(|expected| count > expected));
        if surplus || Instant::now() > deadline {
            let wrong = now
                .iter()
                .filter(|(key, count)| expected.get(key) != Some(count))
                .map(|((vector, cpu), count)| {
                    let expected = expected.get(&(*vector, *cpu)).copied().unwrap_or_default();
                    format!("vector {vector:#x} on CPU {cpu}: {count} and not {expected}")
                });
            bail!(
                "interrupts since boot: {}",
                wrong.collect::<Vec<_>>().join(", ")
            );
        }
    }
}

/// Waits until `condition` holds.
pub(crate) fn wait_for(what: &str, mut condition: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !condition()? {
        if Instant::now() > deadline {
            bail!("waited in vain for {what}");
        }
    }
    Ok(())
}

/// The address of a message to a CPU: physical destination, fixed delivery.
pub(crate) fn message_address(cpu: Cpu) -> u32 {
    0xfee0_0000 | u32::from(cpu.apic_id) << 12
}
