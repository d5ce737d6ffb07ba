//! The host bridge as a function on its own bus.

use std::sync::{PoisonError, RwLock};

use crate::config::ConfigSpace;
use crate::endpoint::{BarIndex, Cause, Endpoint};
use crate::header::{self, Command};

/// Red Hat.
const VENDOR: u16 = 0x1b36;
/// Its generic PCI Express host bridge, which guests know from QEMU.
const DEVICE: u16 = 0x0008;
/// Base class 06h, bridge; sub-class 00h, host (PCI Code and ID Assignment Specification 1.11, 1.7).
const CLASS: [u8; 3] = [0x00, 0x00, 0x06];

/// Function 00:00.0, by which a guest identifies the platform. It decodes and does nothing.
#[derive(Debug)]
pub struct HostBridge {
    config: RwLock<ConfigSpace>,
}

impl HostBridge {
    /// A host bridge in its state after a reset.
    pub fn new() -> Self {
        Self {
            config: RwLock::new(after_reset()),
        }
    }
}

fn after_reset() -> ConfigSpace {
    // A host bridge always answers and always forwards DMA, so as on real ones these bits are hardwired.
    let command = Command::MEMORY_SPACE | Command::BUS_MASTER;
    let writable = Command::PARITY_ERROR_RESPONSE | Command::SERR;

    let mut config = ConfigSpace::new();
    config.set(header::VENDOR_ID, &VENDOR.to_le_bytes());
    config.set(header::DEVICE_ID, &DEVICE.to_le_bytes());
    config.set(header::CLASS_CODE, &CLASS);
    config.set(header::COMMAND, &command.bits().to_le_bytes());
    config.set_writable(header::COMMAND, &writable.bits().to_le_bytes());
    config
}

impl Default for HostBridge {
    fn default() -> Self {
        Self::new()
    }
}

impl Endpoint for HostBridge {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.config
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .read(offset, data);
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        self.config
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .write(offset, data);
    }

    fn bar_read(&self, _bar: BarIndex, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn bar_write(&self, _bar: BarIndex, _offset: u64, _data: &[u8]) {}

    fn reset(&self) -> Result<(), Cause> {
        *self.config.write().unwrap_or_else(PoisonError::into_inner) = after_reset();
        Ok(())
    }
}
