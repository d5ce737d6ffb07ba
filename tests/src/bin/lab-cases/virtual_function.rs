//! A virtual function of a network card, which the lab has in `make vf` only.

use anyhow::{Context, Result};
use tests::lab::{BOOT, Case, HostDevice, Report, SOON, join_wire};

/// The cards in the lab that have virtual functions.
fn cards() -> Result<Vec<HostDevice>> {
    HostDevice::with_ids(0x8086, 0x10c9)
}

/// Whether there is one.
pub(crate) fn is_there() -> bool {
    cards().is_ok_and(|cards| !cards.is_empty())
}

/// The guest knows it by its ids, which the hardware does not tell, and sends packets to the lab.
pub(crate) fn given(case: &mut Case<'_>) -> Result<()> {
    let card = cards()?.pop().context("no card with virtual functions")?;
    card.bind("igb")?;
    join_wire()?;
    let function = card.virtual_function()?;
    function.bind("vfio-pci")?;
    let mut command = case.linux("host", "");
    command.arg("--device");
    command.arg(format!("path={}", function.address()));
    let mut vm = case.start(&mut command)?;
    Report::wait(&mut vm, BOOT)?.passed(1, &["igbvf-decode", "igbvf-msix"])?;
    vm.wait(SOON)?;
    Ok(())
}
