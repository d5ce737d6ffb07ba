//! Migration: the states that a device goes through, on behalf of it.

mod load;
mod record;
mod save;

use std::io;

use rustix::io::Errno;
use vfio_user_protocol::{DeviceState, MigrationFlags};

use self::load::Loader;
use self::save::Saver;
use crate::device::{Device, Migration};
use crate::errno::errno;
use crate::function::Function;

pub use self::load::MAX_SNAPSHOT;

/// The state of a device, and what of a migration is under way.
#[derive(Debug)]
pub(crate) struct Machine {
    state: DeviceState,
    saver: Option<Saver>,
    loader: Option<Loader>,
}

impl Machine {
    /// The device runs.
    pub(crate) fn new() -> Self {
        Self {
            state: DeviceState::Running,
            saver: None,
            loader: None,
        }
    }

    pub(crate) fn state(&self) -> DeviceState {
        self.state
    }

    /// Whether the device does anything by itself.
    pub(crate) fn is_running(&self) -> bool {
        matches!(self.state, DeviceState::Running | DeviceState::PreCopy)
    }

    /// Brings the device into a state, by way of others if need be. If that fails, it stays where it got.
    pub(crate) fn set(
        &mut self,
        target: DeviceState,
        device: &mut dyn Device,
        function: &Function,
    ) -> Result<(), Errno> {
        check_target(target, device)?;
        while self.state != target {
            let next = next_step(self.state, target).ok_or(Errno::INVAL)?;
            self.step(next, device, function).map_err(|error| {
                log::warn!(
                    "the device cannot go from {:?} to {next:?}: {error}",
                    self.state
                );
                errno(&error)
            })?;
            self.state = next;
        }
        Ok(())
    }

    /// The device has been reset, which ends any migration. It is to run.
    pub(crate) fn reset(&mut self, device: &mut dyn Device) -> io::Result<()> {
        if !self.is_running() {
            device.start()?;
        }
        *self = Self::new();
        Ok(())
    }

    /// The client has gone, and with it the other end of the device's data. A device that runs goes on; a stopped one
    /// stays so, because it may run somewhere else by now.
    pub(crate) fn disconnect(&mut self) {
        self.saver = None;
        match (self.state, &mut self.loader) {
            (DeviceState::PreCopy, _) => self.state = DeviceState::Running,
            (DeviceState::StopCopy, _) => self.state = DeviceState::Stop,
            (DeviceState::Resuming, Some(loader)) => loader.fail(),
            _ => {}
        }
    }

    /// Reads the device's data, and returns how many bytes there were: fewer than `data` has, if there are no more, or
    /// none for now.
    pub(crate) fn read(
        &mut self,
        data: &mut [u8],
        device: &mut dyn Device,
        function: &Function,
    ) -> Result<usize, Errno> {
        let is_running = self.is_running();
        let saver = self.saver.as_mut().ok_or(Errno::INVAL)?;
        let result = saver.read(data, is_running, device.migration(), function);
        result.map_err(|error| {
            log::warn!("the device's state cannot be saved: {error}");
            errno(&error)
        })
    }

    /// Writes the device's data.
    pub(crate) fn write(&mut self, data: &[u8], device: &mut dyn Device) -> Result<(), Errno> {
        let loader = self.loader.as_mut().ok_or(Errno::INVAL)?;
        loader.write(data, device.migration()).map_err(|error| {
            log::warn!("the device's state cannot be restored: {error}");
            errno(&error)
        })
    }

    /// Goes over one arc.
    fn step(
        &mut self,
        next: DeviceState,
        device: &mut dyn Device,
        function: &Function,
    ) -> io::Result<()> {
        use DeviceState::{PreCopy, Resuming, Running, Stop, StopCopy};
        match (self.state, next) {
            (Running, Stop) | (PreCopy, StopCopy) => device.stop()?,
            (Stop, Running) => device.start()?,
            (Running, PreCopy) | (Stop, StopCopy) => self.saver = Some(Saver::new()),
            (PreCopy, Running) | (StopCopy, Stop) => self.saver = None,
            (Stop, Resuming) => self.loader = Some(Loader::new()),
            (Resuming, Stop) => {
                if let Some(loader) = &mut self.loader {
                    loader.finish(device.migration(), function)?;
                }
                self.loader = None;
            }
            _ => return Err(io::ErrorKind::InvalidInput.into()),
        }
        Ok(())
    }
}

/// How the device can migrate, if it can.
pub(crate) fn flags(device: &mut dyn Device) -> Option<MigrationFlags> {
    match device.migration() {
        Migration::None => None,
        Migration::Stream(stream) if stream.has_early_state() => {
            Some(MigrationFlags::STOP_COPY | MigrationFlags::PRE_COPY)
        }
        _ => Some(MigrationFlags::STOP_COPY),
    }
}

/// Checks that the device can be brought into a state at all.
fn check_target(target: DeviceState, device: &mut dyn Device) -> Result<(), Errno> {
    let flags = flags(device).ok_or(Errno::NOTTY)?;
    let possible = match target {
        DeviceState::Stop
        | DeviceState::Running
        | DeviceState::StopCopy
        | DeviceState::Resuming => true,
        DeviceState::PreCopy => flags.contains(MigrationFlags::PRE_COPY),
        // The protocol does not use the P2P states, and nobody asks for an error.
        DeviceState::Error | DeviceState::RunningP2p | DeviceState::PreCopyP2p => false,
    };
    possible.then_some(()).ok_or(Errno::INVAL)
}

/// The first step of the shortest way between two states that saves nothing in between (`linux/vfio.h`, "Device
/// migration", without the P2P states). `None` if there is no such way.
fn next_step(from: DeviceState, to: DeviceState) -> Option<DeviceState> {
    use DeviceState::{PreCopy, Resuming, Running, Stop, StopCopy};
    Some(match (from, to) {
        (StopCopy, PreCopy) => return None,
        (Running, PreCopy) => PreCopy,
        (PreCopy, StopCopy) => StopCopy,
        (PreCopy, _) => Running,
        (Stop, StopCopy | Resuming) => to,
        (Stop, _) => Running,
        (Running | StopCopy | Resuming, _) => Stop,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use DeviceState::{PreCopy, Resuming, Running, Stop, StopCopy};

    use super::*;

    const STATES: [DeviceState; 5] = [Stop, Running, StopCopy, Resuming, PreCopy];

    /// The arcs of the specification.
    const ARCS: [(DeviceState, DeviceState); 9] = [
        (Running, Stop),
        (Stop, Running),
        (Running, PreCopy),
        (PreCopy, Running),
        (PreCopy, StopCopy),
        (Stop, StopCopy),
        (StopCopy, Stop),
        (Stop, Resuming),
        (Resuming, Stop),
    ];

    /// The naive model: a search in all directions for the shortest way that goes through no state that saves.
    fn shortest(from: DeviceState, to: DeviceState) -> Option<Vec<DeviceState>> {
        let mut ways = VecDeque::from([vec![from]]);
        while let Some(way) = ways.pop_front() {
            let last = *way.last().unwrap();
            if last == to {
                return Some(way);
            }
            let saves = matches!(last, PreCopy | StopCopy | Resuming);
            for (start, end) in ARCS {
                let goes_through = saves && way.len() > 1;
                if start == last && !goes_through && !way.contains(&end) {
                    ways.push_back([&way[..], &[end]].concat());
                }
            }
        }
        None
    }

    #[test]
    fn the_way_is_the_shortest_that_saves_nothing_in_between() {
        for from in STATES {
            for to in STATES {
                let mut way = vec![from];
                while let Some(state) = next_step(*way.last().unwrap(), to) {
                    if *way.last().unwrap() == to {
                        break;
                    }
                    way.push(state);
                }
                // The specification forbids this one, though there is a way.
                let expected = if (from, to) == (StopCopy, PreCopy) {
                    vec![from]
                } else {
                    shortest(from, to).unwrap()
                };
                assert_eq!(way, expected);
            }
        }
    }
}
