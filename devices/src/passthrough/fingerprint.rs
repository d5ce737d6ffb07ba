//! What a device must have in common with the one whose state it takes over: all that the guest sees of it and that
//! never changes.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use pci::TreePath;
use serde::{Deserialize, Serialize};
use vfio_user_client::MigrationFlags;

use super::probe::{BarLayout, Probe};
use crate::backend::Doorbell;

/// A device as the guest knows it, to be compared with another before anything of it is moved.
///
/// Of configuration space it has what is the same in all devices of a kind: the identity, what capabilities there are and
/// where, and what they say that the device can. What is in vendors' capabilities is theirs to compare, with the device's
/// state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fingerprint {
    /// The device's name.
    pub id: String,
    /// Where it is.
    pub path: TreePath,
    /// The length of its configuration space in bytes.
    pub config_size: u16,
    /// What of configuration space never changes, by offset, in dwords; those that are not there are zero.
    pub registers: BTreeMap<u16, u32>,
    /// Its BARs, and its expansion ROM as number 6.
    pub bars: BTreeMap<u8, BarFingerprint>,
    /// How many vectors it has of INTx, MSI and MSI-X.
    pub vectors: [u32; 3],
    /// How it can migrate, as of `VFIO_DEVICE_FEATURE_MIGRATION` in linux/vfio.h; 0 if it cannot.
    pub migration: u64,
}

/// A BAR.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BarFingerprint {
    /// Bits 3:0 of its register, which tell its kind.
    pub kind: u32,
    /// Its length in bytes.
    pub size: u64,
    /// Whether writes do anything.
    pub writable: bool,
    /// The offsets and lengths in bytes of what the guest reaches without an exit.
    pub areas: Vec<(u64, u64)>,
    /// Its doorbells.
    pub doorbells: Vec<DoorbellFingerprint>,
}

/// A doorbell.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DoorbellFingerprint {
    /// Its offset in bytes.
    pub offset: u64,
    /// How many bytes a write has that rings it, or 0 for any.
    pub width: u64,
    /// What has to be written, if not just anything.
    pub value: Option<u64>,
}

impl Fingerprint {
    pub(super) fn new(id: &str, path: TreePath, probe: &Probe) -> Self {
        let layouts = (0..).zip(probe.layouts());
        let bars = layouts.filter_map(|(bar, layout)| Some((bar, BarFingerprint::new(&layout?))));
        let migration = probe.backend.migration();
        Self {
            id: id.to_owned(),
            path,
            config_size: probe.config.size(),
            registers: probe.config.constants(),
            bars: bars.collect(),
            vectors: probe.survey.irqs.map(|irq| irq.count),
            migration: migration.map_or(0, |migration| migration.flags().bits()),
        }
    }

    /// What of `saved`, another device's, is not so `here`.
    pub fn compare(saved: &Self, here: &Self) -> Vec<Mismatch> {
        let mut found = Vec::new();
        let mut note = |differ: bool, difference: Difference| {
            if differ {
                found.push(Mismatch {
                    id: here.id.clone(),
                    difference,
                });
            }
        };
        note(
            saved.id != here.id,
            Difference::Name {
                saved: saved.id.clone(),
            },
        );
        note(
            saved.path != here.path,
            Difference::Place {
                saved: saved.path.clone(),
                here: here.path.clone(),
            },
        );
        let (a, b) = (saved.config_size, here.config_size);
        note(a != b, Difference::ConfigSize { saved: a, here: b });
        for offset in keys(&saved.registers, &here.registers) {
            let [a, b] = [saved, here]
                .map(|print| print.registers.get(&offset).copied().unwrap_or_default());
            let difference = Difference::Register {
                offset,
                saved: a,
                here: b,
            };
            note(a != b, difference);
        }
        for bar in keys(&saved.bars, &here.bars) {
            let (a, b) = (saved.bars.get(&bar), here.bars.get(&bar));
            let difference = Difference::Bar {
                bar,
                saved: a.cloned(),
                here: b.cloned(),
            };
            note(a != b, difference);
        }
        let kinds = ["INTx", "MSI", "MSI-X"].into_iter();
        for ((kind, saved), here) in kinds.zip(saved.vectors).zip(here.vectors) {
            note(saved != here, Difference::Vectors { kind, saved, here });
        }
        let can =
            |print: &Self, how| MigrationFlags::from_bits_retain(print.migration).contains(how);
        let ways = [
            (MigrationFlags::STOP_COPY, Difference::NoMigration),
            (MigrationFlags::PRE_COPY, Difference::NoPrecopy),
        ];
        for (how, difference) in ways {
            note(can(saved, how) && !can(here, how), difference);
        }
        found
    }
}

impl BarFingerprint {
    fn new(layout: &BarLayout) -> Self {
        let doorbell = |doorbell: &Doorbell| DoorbellFingerprint {
            offset: doorbell.offset,
            width: doorbell.width,
            value: doorbell.value,
        };
        let areas = layout.areas.iter();
        Self {
            kind: layout.spec.kind.type_bits(),
            size: layout.spec.size,
            writable: layout.writable,
            areas: areas.map(|area| (area.offset, area.size)).collect(),
            doorbells: layout.doorbells.iter().map(doorbell).collect(),
        }
    }
}

fn keys<K: Ord + Copy, V>(a: &BTreeMap<K, V>, b: &BTreeMap<K, V>) -> BTreeSet<K> {
    a.keys().chain(b.keys()).copied().collect()
}

/// Something of a device that is not as it was in the one whose state it should take over.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{id}: {difference}")]
pub struct Mismatch {
    /// The device.
    pub id: String,
    /// What is different.
    pub difference: Difference,
}

/// What can be different.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Difference {
    /// Its name.
    #[error("its name was {saved}")]
    Name {
        /// The name.
        saved: String,
    },
    /// Where it is.
    #[error("it was at {saved}, and is at {here}")]
    Place {
        /// Where it was.
        saved: TreePath,
        /// Where it is.
        here: TreePath,
    },
    /// How much configuration space it has.
    #[error("its configuration space had {saved} bytes, and has {here}")]
    ConfigSize {
        /// How many bytes it had.
        saved: u16,
        /// How many bytes it has.
        here: u16,
    },
    /// A register of configuration space.
    #[error("configuration space at {offset:#x} was {saved:#010x}, and is {here:#010x}")]
    Register {
        /// Which register.
        offset: u16,
        /// What it was.
        saved: u32,
        /// What it is.
        here: u32,
    },
    /// A BAR.
    #[error("BAR{bar} was {}, and is {}", Shown(saved.as_ref()), Shown(here.as_ref()))]
    Bar {
        /// Which BAR.
        bar: u8,
        /// What it was, if there was one.
        saved: Option<BarFingerprint>,
        /// What it is, if there is one.
        here: Option<BarFingerprint>,
    },
    /// How many interrupts it has.
    #[error("it had {saved} vectors of {kind}, and has {here}")]
    Vectors {
        /// Of which kind.
        kind: &'static str,
        /// How many it had.
        saved: u32,
        /// How many it has.
        here: u32,
    },
    /// Its state cannot be put back.
    #[error("its state could be taken out, and cannot be put into this one")]
    NoMigration,
    /// Its state cannot be put back bit by bit.
    #[error("its state could be taken out while it ran, and this one does not take such")]
    NoPrecopy,
}

/// A BAR as a person reads it.
struct Shown<'a>(Option<&'a BarFingerprint>);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(bar) = self.0 else {
            return f.write_str("none");
        };
        write!(f, "{:#x} bytes of kind {:#x}", bar.size, bar.kind)?;
        if !bar.writable {
            f.write_str(", read-only")?;
        }
        for (offset, size) in &bar.areas {
            write!(f, ", {size:#x} mapped at {offset:#x}")?;
        }
        for doorbell in &bar.doorbells {
            write!(f, ", a doorbell at {:#x}", doorbell.offset)?;
            if let Some(value) = doorbell.value {
                write!(f, " for {value:#x}")?;
            }
            if doorbell.width != 0 {
                write!(f, ", {} bytes wide", doorbell.width)?;
            }
        }
        Ok(())
    }
}
