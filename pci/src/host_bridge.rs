//! The host bridge as a function on its own bus.

use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use crate::config::ConfigSpace;
use crate::endpoint::{BarIndex, Cause, Endpoint};
use crate::header::{self, Command};
use crate::state::{ConfigSpaceState, StateError};

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

    /// What is to be saved of it.
    pub fn save(&self) -> ConfigSpaceState {
        self.read().save()
    }

    /// Gives it the registers of a saved one.
    pub fn restore(&self, state: &ConfigSpaceState) -> Result<(), StateError> {
        *self.write() = after_reset().restored(state)?;
        Ok(())
    }

    fn read(&self) -> RwLockReadGuard<'_, ConfigSpace> {
        self.config.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, ConfigSpace> {
        self.config.write().unwrap_or_else(PoisonError::into_inner)
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
        self.read().read(offset, data);
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        self.write().write(offset, data);
    }

    fn bar_read(&self, _bar: BarIndex, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn bar_write(&self, _bar: BarIndex, _offset: u64, _data: &[u8]) {}

    fn reset(&self) -> Result<(), Cause> {
        *self.write() = after_reset();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dword(bridge: &HostBridge, offset: u16) -> u32 {
        let mut data = [0; 4];
        bridge.config_read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn it_is_a_host_bridge_without_bars() {
        let bridge = HostBridge::new();
        for offset in (0..0x100).step_by(4) {
            bridge.config_write(offset, &[0xff; 4]);
        }
        assert_eq!(dword(&bridge, 0x00), 0x0008_1b36);
        assert_eq!(dword(&bridge, 0x04), 0x0000_0146);
        assert_eq!(dword(&bridge, 0x08), 0x0600_0000);
        for offset in (0x0c..0x100).step_by(4) {
            assert_eq!(dword(&bridge, offset), 0, "{offset:#x}");
        }
    }

    #[test]
    fn a_reset_undoes_writes() {
        let bridge = HostBridge::new();
        bridge.config_write(header::COMMAND, &[0xff; 2]);
        bridge.reset().unwrap();
        assert_eq!(dword(&bridge, 0x04), 0x0000_0006);
    }
}
