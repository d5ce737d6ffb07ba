//! The device with all that belongs to it, whether or not it has a client.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use vfio_user_protocol::DeviceState;

use crate::description::{BARS, Bar, Layout, Place, WINDOW_SIZE, WindowPlace};
use crate::device::{Device, Host};
use crate::errno::errno;
use crate::eventfd;
use crate::function::{Effect, Function};
use crate::migration::Machine;
use crate::server::Options;

/// A device and its state.
#[derive(Debug)]
pub(crate) struct Core<D> {
    pub(crate) layout: Layout,
    pub(crate) function: Arc<Function>,
    pub(crate) host: Host,
    pub(crate) device: D,
    pub(crate) machine: Machine,
    pub(crate) options: Options,
}

/// Number of the region that is configuration space (`VFIO_PCI_CONFIG_REGION_INDEX` of `linux/vfio.h`).
const CONFIG_REGION: u32 = 7;

impl<D: Device> Core<D> {
    /// Size of a region in bytes; 0 if there is none.
    pub(crate) fn region_size(&self, region: u32) -> u64 {
        if region == CONFIG_REGION {
            return self.layout.config.size() as u64;
        }
        self.bar(region).map_or(0, Bar::size)
    }

    pub(crate) fn bar(&self, region: u32) -> Option<&Bar> {
        self.layout.bar(usize::try_from(region).ok()?)
    }

    pub(crate) fn read_region(
        &mut self,
        region: u32,
        offset: u64,
        data: &mut [u8],
    ) -> Result<(), Errno> {
        self.check(region, offset, data.len())?;
        if data.is_empty() {
            return Ok(());
        }
        if region == CONFIG_REGION {
            self.read_by_window(offset, data.len());
            return self.function.read_config(offset, data).ok_or(Errno::INVAL);
        }
        let bar = bar_index(region)?;
        if self.function.has_msix_at(bar, offset, data.len()) {
            return self
                .function
                .read_msix(bar, offset, data)
                .ok_or(Errno::INVAL);
        }
        self.device
            .read(bar, offset, data)
            .map_err(|error| errno(&error))
    }

    pub(crate) fn write_region(
        &mut self,
        region: u32,
        offset: u64,
        data: &[u8],
    ) -> Result<(), Errno> {
        self.check(region, offset, data.len())?;
        if data.is_empty() {
            return Ok(());
        }
        if region == CONFIG_REGION {
            let effect = self
                .function
                .write_config(offset, data)
                .ok_or(Errno::INVAL)?;
            self.write_by_window(offset, data.len());
            return match effect {
                Effect::None => Ok(()),
                Effect::Reset => self.reset(),
            };
        }
        let bar = bar_index(region)?;
        if self.function.has_msix_at(bar, offset, data.len()) {
            return self
                .function
                .write_msix(bar, offset, data)
                .ok_or(Errno::INVAL);
        }
        if let Some(doorbell) = self.host.doorbells.find(bar, offset, data) {
            self.ring(doorbell);
            return Ok(());
        }
        self.device
            .write(bar, offset, data)
            .map_err(|error| errno(&error))
    }

    /// Resets the device. It runs afterwards.
    pub(crate) fn reset(&mut self) -> Result<(), Errno> {
        self.function.reset();
        self.device.reset();
        let result = self.machine.reset(&mut self.device);
        result.map_err(|error| errno(&error))
    }

    pub(crate) fn set_state(&mut self, state: DeviceState) -> Result<(), Errno> {
        self.machine.set(state, &mut self.device, &self.function)
    }

    pub(crate) fn read_state(&mut self, data: &mut [u8]) -> Result<usize, Errno> {
        self.machine.read(data, &mut self.device, &self.function)
    }

    pub(crate) fn write_state(&mut self, data: &[u8]) -> Result<(), Errno> {
        self.machine.write(data, &mut self.device)
    }

    /// The eventfds of doorbells that are to be waited for. Those of a stopped device are not: what rings then is the
    /// client's to find.
    pub(crate) fn watched_doorbells(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let is_running = self.machine.is_running();
        let watched = self.host.doorbells.watched();
        watched.filter(move |_| is_running).map(|(_, event)| event)
    }

    /// Deals with all events that there are.
    pub(crate) fn poll_events(&mut self) {
        self.function.unmask_event();
        if !self.machine.is_running() {
            return;
        }
        for doorbell in self.rung_doorbells() {
            self.device.doorbell(doorbell);
        }
    }

    /// Forgets all that was the client's. The device's state stays.
    pub(crate) fn disconnect(&mut self) {
        let memory = &self.host.memory;
        memory.set_channel(None);
        memory.log().stop();
        self.function.disconnect();
        self.machine.disconnect();
        match memory.unmap_all() {
            Ok(removed) => {
                self.device.memory_changed();
                let limit = self.options.unmap_deadline;
                if !self.host.memory.await_release(&removed, limit) {
                    log::warn!("the device keeps a view of memory of a client that has gone");
                }
            }
            Err(errno) => log::warn!("memory cannot be unmapped: {errno}"),
        }
    }

    /// Before configuration space is read: if it is the window, that shows what it is on.
    fn read_by_window(&mut self, offset: u64, count: usize) {
        let Some((window, place)) = self.look_at_window(offset, count) else {
            return;
        };
        // What cannot be read reads as nothing does.
        let mut data = [0xff; WINDOW_SIZE];
        let Some(data) = data.get_mut(..place.length) else {
            return;
        };
        if let Err(errno) = self.read_region(place.bar.into(), place.offset, data) {
            log::debug!("nothing is read through the window on {place:x?}: {errno}");
            data.fill(0xff);
        }
        self.function.write_config(window.data.start as u64, data);
    }

    /// After configuration space was written: if it was the window, so is what that is on.
    fn write_by_window(&mut self, offset: u64, count: usize) {
        let Some((window, place)) = self.look_at_window(offset, count) else {
            return;
        };
        let mut data = [0; WINDOW_SIZE];
        self.function
            .read_config(window.data.start as u64, &mut data);
        let Some(data) = data.get(..place.length) else {
            return;
        };
        if let Err(errno) = self.write_region(place.bar.into(), place.offset, data) {
            log::debug!("nothing is written through the window on {place:x?}: {errno}");
        }
    }

    /// The window and what it is on, if such an access to configuration space goes through it.
    fn look_at_window(&self, offset: u64, count: usize) -> Option<(WindowPlace, Place)> {
        let window = self.layout.window.as_ref()?;
        if !window.is_at(offset, count) {
            return None;
        }
        let mut registers = vec![0; window.registers.len()];
        let start = window.registers.start as u64;
        self.function.read_config(start, &mut registers)?;
        let place = (window.place)(&registers)?;
        let is_possible =
            usize::from(place.bar) < BARS && (1..=WINDOW_SIZE).contains(&place.length);
        is_possible.then(|| (window.clone(), place))
    }

    /// Checks that a range is in its region.
    fn check(&self, region: u32, offset: u64, count: usize) -> Result<(), Errno> {
        let end = offset.checked_add(count as u64).ok_or(Errno::INVAL)?;
        if end > self.region_size(region) {
            return Err(Errno::INVAL);
        }
        Ok(())
    }

    /// A doorbell was rung by a message.
    fn ring(&mut self, doorbell: usize) {
        if self.machine.is_running() && self.host.doorbells.is_watched(doorbell) {
            self.device.doorbell(doorbell);
        } else {
            self.host.doorbells.ring(doorbell);
        }
    }

    /// The doorbells that have rung, which are quiet after this.
    fn rung_doorbells(&self) -> Vec<usize> {
        let watched: Vec<_> = self.host.doorbells.watched().collect();
        let mut fds: Vec<_> = watched
            .iter()
            .map(|(_, event)| PollFd::from_borrowed_fd(*event, PollFlags::IN))
            .collect();
        if fds.is_empty() || poll(&mut fds, Some(&Timespec::default())).is_err() {
            return Vec::new();
        }
        let ready = watched
            .iter()
            .zip(&fds)
            .filter(|(_, fd)| !fd.revents().is_empty());
        ready
            .filter(|((_, event), _)| eventfd::drain(event) == Ok(true))
            .map(|((doorbell, _), _)| *doorbell)
            .collect()
    }
}

fn bar_index(region: u32) -> Result<usize, Errno> {
    let bar = usize::try_from(region).ok().filter(|bar| *bar < BARS);
    bar.ok_or(Errno::INVAL)
}
