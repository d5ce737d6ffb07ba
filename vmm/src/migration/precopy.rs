//! The part of a migration in which the guest runs: RAM, and what devices give away early, are copied again and again
//! until little is left.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use devices::{DeviceState, MigrationFlags, Passthrough};

use super::brake::Brake;
use super::device_logs::DeviceLogs;
use super::lanes::{Lanes, Load};
use super::policy::{Decision, Goal, OnTimeout, Policy, Round};
use super::source::SendError;
use super::stream::Stream;
use super::wire::{self, Kind, WireError};
use crate::control::{DeviceProgress, SendRequest, Task, TimeoutStrategy};
use crate::layout::PAGE_SIZE;
use crate::machine::device_data::{self, DeviceDataError};
use crate::machine::{Machine, can};
use crate::memory::written::{Pages, WriteLog};

/// How much of one device's state is read in a round, in bytes: others, and RAM, have their turns.
const DEVICE_SHARE: u64 = 64 << 20;
/// How much RAM is sent to know the link's speed, in bytes.
const SAMPLE: u64 = 64 << 20;

/// Everything that tells what has been written to RAM since it was copied.
#[derive(Debug)]
pub(super) struct Tracking<'m> {
    machine: &'m Machine,
    written: WriteLog<'m>,
    devices: DeviceLogs<'m>,
}

impl<'m> Tracking<'m> {
    /// Begins, with all of RAM as written.
    pub(super) fn start(machine: &'m Machine) -> Result<Self, SendError> {
        Ok(Self {
            machine,
            written: WriteLog::start(&machine.memory)?,
            devices: DeviceLogs::start(machine),
        })
    }

    /// What has been written since the last time.
    pub(super) fn take(&mut self) -> Result<Pages, SendError> {
        let mut pages = self.written.take()?;
        self.devices.add_to(&mut pages);
        Ok(pages)
    }

    fn all(&self) -> Pages {
        Pages::all(self.machine.memory.regions().map(|region| region.range))
    }
}

/// Copies until what is left can be sent within the time that the guest may stand still. What has been written meanwhile is
/// still to be taken from `tracking`.
pub(super) fn copy(
    tracking: &mut Tracking<'_>,
    lanes: &mut Lanes<'_>,
    devices: &mut Early<'_>,
    control: &mut Stream,
    request: &SendRequest,
    task: &Task,
) -> Result<Pages, SendError> {
    let goal = Goal {
        downtime: request.downtime,
        timeout: request.timeout,
        on_timeout: match request.on_timeout {
            TimeoutStrategy::Cancel => OnTimeout::Cancel,
            TimeoutStrategy::Ignore => OnTimeout::Move,
        },
    };
    let mut policy = Policy::new(goal);
    let began = Instant::now();
    let mut pages = tracking.all();
    let mut brake = Brake::new(tracking.machine.vcpus.clone());
    let mut fresh = true;
    loop {
        if !tracking.devices.without().is_empty() {
            return sample(tracking, lanes, &mut policy, request, task);
        }
        let round = Instant::now();
        task.update(|progress| {
            progress.rounds += 1;
            progress.remaining_bytes = pages.count() * PAGE_SIZE;
        });
        let load = Load {
            pages: &pages,
            fresh,
            log: Some(&tracking.written),
            limit: u64::MAX,
            awaited: true,
        };
        let sent = lanes.send(&load, task).map_err(SendError::Memory)?;
        let from_devices = devices.read(control, task)?;
        fresh = false;
        pages = tracking.take()?;
        let took = round.elapsed();
        let dirty = pages.count() * PAGE_SIZE;
        let decision = policy.decide(&Round {
            sent: sent.bytes() + from_devices,
            took,
            dirty,
            devices: devices.remaining(),
            elapsed: began.elapsed(),
        });
        task.update(|progress| {
            progress.remaining_bytes = dirty;
            progress.bytes_per_second = policy.bytes_per_second();
            progress.dirty_bytes_per_second = per_second(dirty, took);
            progress.estimated_downtime_us = Some(microseconds(policy.estimate(dirty)));
        });
        log::debug!(
            "{} bytes were copied in {took:?}, {dirty} are left: {decision:?}",
            sent.bytes()
        );
        match decision {
            Decision::Again => {}
            Decision::Slower(percent) => brake.set(percent),
            Decision::Switch => return Ok(pages),
            Decision::GiveUp => return Err(SendError::TooLong),
        }
    }
}

/// Where a device writes at any time to any page, whatever is copied while it runs is copied in vain: all is sent when it
/// stands still. That takes as long as a part of it says, which is sent first.
fn sample(
    tracking: &Tracking<'_>,
    lanes: &mut Lanes<'_>,
    policy: &mut Policy,
    request: &SendRequest,
    task: &Task,
) -> Result<Pages, SendError> {
    let pages = tracking.all();
    let began = Instant::now();
    let load = Load {
        pages: &pages,
        fresh: true,
        log: None,
        limit: SAMPLE,
        awaited: true,
    };
    let sent = lanes.send(&load, task).map_err(SendError::Memory)?;
    policy.measure(sent.bytes(), began.elapsed());
    let counters = tracking.machine.memory.counters();
    let resident = counters.get("resident").copied().unwrap_or_default();
    let estimate = policy.estimate(resident);
    task.update(|progress| {
        progress.rounds = 1;
        progress.bytes_per_second = policy.bytes_per_second();
        progress.remaining_bytes = resident;
        progress.estimated_downtime_us = Some(microseconds(estimate));
    });
    if estimate > request.downtime && !request.unlogged_dma {
        return Err(SendError::UnloggedDma {
            devices: tracking.devices.without().join(", "),
            estimate,
            downtime: request.downtime,
        });
    }
    Ok(pages)
}

/// The devices that give away some of their state while they run. Unless they are stopped, they go on as usual when this
/// is dropped.
#[derive(Debug)]
pub(super) struct Early<'m> {
    devices: Vec<EarlyDevice<'m>>,
}

#[derive(Debug)]
struct EarlyDevice<'m> {
    index: u32,
    device: &'m Arc<Passthrough>,
    /// How much it gave away the last time, in bytes.
    last: u64,
}

impl<'m> Early<'m> {
    /// Has those devices begin that can.
    pub(super) fn start(machine: &'m Machine) -> Result<Self, SendError> {
        let mut early = Self {
            devices: Vec::new(),
        };
        for (index, device) in (0..).zip(machine.pci.devices()) {
            if can(device, MigrationFlags::PRE_COPY) {
                device
                    .change_state(DeviceState::PreCopy)
                    .map_err(|source| DeviceDataError::Begin {
                        id: device.id().to_owned(),
                        source,
                    })?;
                early.devices.push(EarlyDevice {
                    index,
                    device,
                    last: 0,
                });
            }
        }
        Ok(early)
    }

    /// Sends what they have for now, and returns how many bytes that was.
    fn read(&mut self, control: &mut Stream, task: &Task) -> Result<u64, SendError> {
        let mut all = 0;
        for EarlyDevice {
            index,
            device,
            last,
        } in &mut self.devices
        {
            let send = |piece: &[u8]| send_piece(control, *index, piece);
            let (bytes, _) = device_data::read_some(device, DEVICE_SHARE, send)?;
            *last = bytes;
            all += bytes;
            tell_of_device(device, bytes, task);
        }
        Ok(all)
    }

    /// How many bytes they still have. Of one that cannot say, as many as it gave away the last time.
    fn remaining(&self) -> u64 {
        let remaining = |early: &EarlyDevice<'_>| {
            let said = early.device.migration()?.remaining();
            Some(said.unwrap_or(early.last))
        };
        self.devices.iter().filter_map(remaining).sum()
    }
}

impl Drop for Early<'_> {
    fn drop(&mut self) {
        for EarlyDevice { device, .. } in &self.devices {
            let state = device.migration().map(devices::Migration::state);
            if !matches!(state, Some(Ok(DeviceState::PreCopy))) {
                continue;
            }
            if let Err(error) = device.change_state(DeviceState::Running) {
                device.give_up(&format_args!("it does not go on: {error}"));
            }
        }
    }
}

/// Sends a piece of the state of the device with this number.
pub(super) fn send_piece(control: &mut Stream, device: u32, piece: &[u8]) -> io::Result<()> {
    if piece.is_empty() {
        return Ok(());
    }
    wire::send(control, Kind::DeviceData, &[&device.to_le_bytes(), piece])
}

/// Notes that so many bytes of a device's state have been sent.
pub(super) fn tell_of_device(device: &Passthrough, bytes: u64, task: &Task) {
    let migration = device.migration();
    let state = migration.map(devices::Migration::state);
    task.update(|progress| {
        progress.copied_bytes += bytes;
        let id = device.id().to_owned();
        let told: &mut DeviceProgress = progress.devices.entry(id).or_default();
        told.copied_bytes += bytes;
        told.remaining_bytes = migration.and_then(devices::Migration::remaining);
        if let Some(Ok(state)) = state {
            told.state = format!("{state:?}");
        }
    });
}

fn per_second(bytes: u64, time: Duration) -> u64 {
    let bytes = u128::from(bytes) * 1_000_000;
    u64::try_from(bytes / time.as_micros().max(1)).unwrap_or(u64::MAX)
}

/// A time as progress tells it.
pub(super) fn microseconds(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

impl From<WireError> for SendError {
    fn from(error: WireError) -> Self {
        match error {
            WireError::Refused(reason) => Self::Refused(reason),
            error => Self::Wire(error),
        }
    }
}
