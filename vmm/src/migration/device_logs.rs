//! What the devices write to guest RAM while it is copied, as far as they log it.

use std::ops::Range;
use std::sync::Arc;

use devices::{Migration, Passthrough};

use crate::layout::PAGE_SIZE;
use crate::machine::Machine;
use crate::memory::written::Pages;

/// The logs of all devices, until it is dropped.
#[derive(Debug)]
pub(super) struct DeviceLogs<'m> {
    ram: Vec<Range<u64>>,
    logs: Vec<DeviceLog<'m>>,
    /// The ids of the devices that log nothing: all RAM counts as written by them, always.
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
        let mut started = Self {
            ram: machine
                .memory
                .regions()
                .map(|region| region.range)
                .collect(),
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
        started
    }

    /// The devices without a log.
    pub(super) fn without(&self) -> &[String] {
        &self.without
    }

    /// Adds what they have written since the last time.
    pub(super) fn add_to(&self, pages: &mut Pages) {
        for range in &self.ram {
            if !self.without.is_empty() {
                pages.add(range);
                continue;
            }
            for DeviceLog {
                device,
                migration,
                page_size,
            } in &self.logs
            {
                match migration.dirty(range.clone(), *page_size) {
                    Ok(log) => pages.add_log(range.start, *page_size, &log),
                    Err(error) => {
                        log::warn!(
                            "{}: its log of what it wrote to memory is lost, and all of it is copied: {error}",
                            device.id()
                        );
                        pages.add(range);
                    }
                }
            }
        }
    }
}

impl Drop for DeviceLogs<'_> {
    fn drop(&mut self) {
        for DeviceLog {
            device, migration, ..
        } in &self.logs
        {
            if let Err(error) = migration.stop_dirty() {
                log::warn!(
                    "{}: it goes on to log what it writes to memory: {error}",
                    device.id()
                );
            }
        }
    }
}
