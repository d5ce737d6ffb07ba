//! What the devices write to guest RAM while it is copied, as far as they log it.

use std::ops::Range;
use std::sync::Arc;

use devices::{BackendError, Migration, Passthrough};

use crate::layout::PAGE_SIZE;
use crate::machine::Machine;
use crate::memory::written::Pages;

/// The logs of all devices, until it is dropped.
#[derive(Debug)]
pub(super) struct DeviceLogs<'m> {
    ram: Vec<Range<u64>>,
    logs: Vec<DeviceLog<'m>>,
    /// The ids of the devices whose log there is not, or not any more: all RAM counts as written by them, always.
    without: Vec<String>,
}

#[derive(Debug)]
struct DeviceLog<'m> {
    device: &'m Arc<Passthrough>,
    migration: &'m dyn Migration,
    /// How many bytes a bit stands for.
    page_size: u64,
}

impl<'m> DeviceLogs<'m> {
    /// Has every device log what it writes from now on.
    pub(super) fn start(machine: &'m Machine) -> Self {
        let ranges = || machine.memory.regions().map(|region| region.range);
        let mut started = Self {
            ram: ranges().collect(),
            logs: Vec::new(),
            without: Vec::new(),
        };
        for device in machine.pci.devices() {
            let Some(migration) = device.migration() else {
                continue;
            };
            match migration.start_dirty(PAGE_SIZE, &started.ram) {
                Ok(page_size) => started.logs.push(DeviceLog {
                    device,
                    migration,
                    page_size,
                }),
                Err(error) => {
                    log::info!(
                        "{}: it does not log what it writes to memory: {error}",
                        device.id()
                    );
                    started.without.push(device.id().to_owned());
                }
            }
        }
        // Some kernels log for a device and cannot tell what (they lack CONFIG_IOMMUFD_DRIVER).
        started.add_to(&mut Pages::none(ranges()));
        started
    }

    /// The devices without a log.
    pub(super) fn without(&self) -> &[String] {
        &self.without
    }

    /// Adds what they have written since the last time. A device whose log cannot be had is one without from then on.
    pub(super) fn add_to(&mut self, pages: &mut Pages) {
        let Self { ram, logs, without } = self;
        logs.retain(|log| match log.add_to(ram, pages) {
            Ok(()) => true,
            Err(error) => {
                let id = log.device.id();
                log::warn!("{id}: its log of what it writes to memory is lost: {error}");
                log.stop();
                without.push(id.to_owned());
                false
            }
        });
        if !without.is_empty() {
            ram.iter().for_each(|range| pages.add(range));
        }
    }
}

impl DeviceLog<'_> {
    fn add_to(&self, ram: &[Range<u64>], pages: &mut Pages) -> Result<(), BackendError> {
        for range in ram {
            let log = self.migration.dirty(range.clone(), self.page_size)?;
            pages.add_log(range.start, self.page_size, &log);
        }
        Ok(())
    }

    fn stop(&self) {
        if let Err(error) = self.migration.stop_dirty() {
            let id = self.device.id();
            log::warn!("{id}: it goes on to log what it writes to memory: {error}");
        }
    }
}

impl Drop for DeviceLogs<'_> {
    fn drop(&mut self) {
        self.logs.iter().for_each(DeviceLog::stop);
    }
}
