//! The interrupt controllers and the timer that KVM models, and the few devices that are not on PCI.

use std::sync::Arc;

use devices::power::{Power, PowerSwitch};
use devices::{I8042, Serial};
use kvm_ioctls::VmFd;
use pci::Cause;

use crate::bus::Bus;
use crate::chips::ChipsState;
use crate::ending::{Ending, Endings};
use crate::layout;

/// What is on the board, as it was at power-on.
#[derive(Debug)]
pub(crate) struct Platform {
    vm: Arc<VmFd>,
    chips: ChipsState,
    serial: Option<Arc<Serial>>,
}

impl Platform {
    /// Puts the devices on the bus of I/O ports, and remembers the state of KVM's.
    pub(crate) fn new(
        vm: Arc<VmFd>,
        ports: &Bus,
        serial: Option<Arc<Serial>>,
        endings: &Arc<Endings>,
    ) -> Result<Self, Cause> {
        let switch = Switch(endings.clone());
        ports.insert(layout::POWER, Arc::new(Power::new(switch.clone())))?;
        ports.insert(layout::I8042, Arc::new(I8042::new(Box::new(switch))))?;
        if let Some(serial) = &serial {
            ports.insert(layout::COM1, serial.clone())?;
        }
        let chips = ChipsState::save(&vm)?;
        Ok(Self { vm, chips, serial })
    }

    /// The serial port, if there is one.
    pub(crate) fn serial(&self) -> Option<&Serial> {
        self.serial.as_deref()
    }

    /// Puts everything back into its state at power-on. No vCPU runs, and no device has an interrupt.
    pub(crate) fn reset(&self) -> Result<(), Cause> {
        self.chips.restore(&self.vm)?;
        if let Some(serial) = &self.serial {
            serial.reset();
        }
        Ok(())
    }
}

/// What the guest can do to the machine as a whole.
#[derive(Debug, Clone)]
struct Switch(Arc<Endings>);

impl PowerSwitch for Switch {
    fn power_off(&self) {
        self.0.report(Ending::PowerOff);
    }

    fn reset(&self) {
        self.0.report(Ending::Reset);
    }
}
