//! What a guest checks about each test device. A check leaves the device as it found it, but for the memory decode
//! and bus master bits, which stay on.

mod bars;
mod config;
mod dma;
mod doorbells;
mod intx;
mod msi;
mod msix;

use anyhow::Result;

use crate::pci::Device;

/// Something to find out about a device.
pub(crate) struct Check {
    /// What the check's result is called.
    pub(crate) name: &'static str,
    pub(crate) run: fn(&Device) -> Result<()>,
}

/// Every check, in the order in which they run.
pub(crate) const ALL: [Check; 14] = [
    check("config", config::header),
    check("capabilities", config::capabilities),
    check("bars", config::bars),
    check("registers", bars::registers),
    check("ram", bars::ram),
    check("io", bars::io),
    check("decode", bars::decode),
    check("dma", dma::transfers),
    check("dma-later", dma::later),
    check("msix", msix::vectors),
    check("msix-mask", msix::masks),
    check("doorbells", doorbells::rung),
    check("msi", msi::messages),
    check("intx", intx::line),
];

const fn check(name: &'static str, run: fn(&Device) -> Result<()>) -> Check {
    Check { name, run }
}

/// A register's place in a mapping.
pub(crate) fn at(offset: u64) -> usize {
    usize::try_from(offset).unwrap_or(usize::MAX)
}
