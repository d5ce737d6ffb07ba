//! The state of KVM's interrupt controllers and timer: taken out of a VM, put into another, and at a reset put back as it
//! was at power-on.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_irqchip, kvm_pit_state2,
};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};

use crate::saved::Raw;

/// Why the state could not be read or written.
#[derive(Debug, thiserror::Error)]
#[error("KVM does not {step}")]
pub(crate) struct ChipsError {
    step: &'static str,
    source: kvm_ioctls::Error,
}

/// The state of the two 8259s, the I/O APIC and the 8254. (The local APICs are parts of the vCPUs.)
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ChipsState {
    pic_master: Raw<kvm_irqchip>,
    pic_slave: Raw<kvm_irqchip>,
    io_apic: Raw<kvm_irqchip>,
    pit: Raw<kvm_pit_state2>,
}

impl ChipsState {
    /// Reads the state. No vCPU may run, and what could still raise an interrupt must have been stopped.
    pub(crate) fn save(vm: &VmFd) -> Result<Self, ChipsError> {
        let chip = |chip_id, step| {
            let mut chip = kvm_irqchip {
                chip_id,
                ..Default::default()
            };
            vm.get_irqchip(&mut chip)
                .map_err(|source| ChipsError { step, source })?;
            Ok(Raw(chip))
        };
        let step = "tell the timer's state";
        Ok(Self {
            pic_master: chip(KVM_IRQCHIP_PIC_MASTER, "tell the first 8259's state")?,
            pic_slave: chip(KVM_IRQCHIP_PIC_SLAVE, "tell the second 8259's state")?,
            io_apic: chip(KVM_IRQCHIP_IOAPIC, "tell the I/O APIC's state")?,
            pit: Raw(vm
                .get_pit2()
                .map_err(|source| ChipsError { step, source })?),
        })
    }

    /// Writes the state into a VM whose vCPUs do not run and have theirs already: what the chips have still to deliver goes
    /// to the local APICs at once.
    pub(crate) fn restore(&self, vm: &VmFd) -> Result<(), ChipsError> {
        let Self {
            pic_master,
            pic_slave,
            io_apic,
            pit,
        } = self;
        for (chip, chip_id, step) in [
            (
                pic_master,
                KVM_IRQCHIP_PIC_MASTER,
                "take the first 8259's state",
            ),
            (
                pic_slave,
                KVM_IRQCHIP_PIC_SLAVE,
                "take the second 8259's state",
            ),
            (io_apic, KVM_IRQCHIP_IOAPIC, "take the I/O APIC's state"),
        ] {
            // Whatever a saved state says, each goes to its own chip.
            let chip = kvm_irqchip { chip_id, ..chip.0 };
            vm.set_irqchip(&chip)
                .map_err(|source| ChipsError { step, source })?;
        }
        let step = "take the timer's state";
        vm.set_pit2(pit)
            .map_err(|source| ChipsError { step, source })
    }
}

#[cfg(test)]
impl ChipsState {
    /// Whether no chip is in the same state.
    pub(crate) fn differs_everywhere(&self, other: &Self) -> bool {
        self.pic_master != other.pic_master
            && self.pic_slave != other.pic_slave
            && self.io_apic != other.io_apic
            && self.pit != other.pit
    }
}
