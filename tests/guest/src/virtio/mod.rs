//! What a guest does with disks and network cards that are virtio devices, with the drivers that Linux has for them.

pub(crate) mod block;
pub(crate) mod cards;
pub(crate) mod counted;
pub(crate) mod disks;

use anyhow::Result;

use crate::passthrough::{self, Check, check};

/// The ids of a network card and a disk (virtio 1.2, 4.1.2.1).
pub(crate) const CARD: (u16, u16) = (0x1af4, 0x1041);
pub(crate) const DISK: (u16, u16) = (0x1af4, 0x1042);

/// Every check, in the order in which they run.
const ALL: &[Check] = &[
    check("disk-facts", DISK, block::facts),
    check("disk-zeroes", DISK, block::zeroes),
    check("card-facts", CARD, cards::facts),
    check("card-ping", CARD, cards::ping),
    check("card-bulk", CARD, cards::bulk),
    check("card-datagrams", CARD, cards::datagrams),
    check("card-queues", CARD, cards::queues),
];

/// Runs the selected checks on each device that they are for.
pub(crate) fn run(selected: impl Fn(&str) -> bool) -> Result<()> {
    passthrough::run(ALL, selected)
}
