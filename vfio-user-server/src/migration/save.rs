//! Saving: the stream of a device's state, as it is read.

use std::io;

use super::load::MAX_SNAPSHOT;
use super::record::{self, Kind, MAX_RECORD};
use crate::device::Migration;
use crate::function::Function;

/// A stream that is being read.
#[derive(Debug)]
pub(super) struct Saver {
    /// What comes next in the stream.
    next: Kind,
    /// Whether all of it has been made.
    is_done: bool,
    /// What has been made and not read, from `read` on.
    made: Vec<u8>,
    read: usize,
    /// How far the device's early state and its state have been read, in bytes.
    early: u64,
    state: u64,
    /// The state of a device that has it in one piece.
    snapshot: Option<Vec<u8>>,
}

impl Saver {
    pub(super) fn new() -> Self {
        Self {
            next: Kind::Head,
            is_done: false,
            made: Vec::new(),
            read: 0,
            early: 0,
            state: 0,
            snapshot: None,
        }
    }

    /// Reads the next of the stream, and returns how many bytes that were: fewer than `data` has, if there are no more,
    /// or, while the device runs, none for now.
    pub(super) fn read(
        &mut self,
        data: &mut [u8],
        is_running: bool,
        mut device: Migration<'_>,
        function: &Function,
    ) -> io::Result<usize> {
        let mut total = 0;
        loop {
            let made = self.made.get(self.read..).unwrap_or(&[]);
            let rest = data.get_mut(total..).unwrap_or(&mut []);
            let count = made.len().min(rest.len());
            for (to, from) in rest.iter_mut().zip(made) {
                *to = *from;
            }
            self.read += count;
            total += count;
            if total == data.len() {
                return Ok(total);
            }
            self.made.clear();
            self.read = 0;
            if !self.make(is_running, &mut device, function)? {
                return Ok(total);
            }
        }
    }

    /// Makes the next of the stream, if there is any.
    fn make(
        &mut self,
        is_running: bool,
        device: &mut Migration<'_>,
        function: &Function,
    ) -> io::Result<bool> {
        match self.next {
            _ if self.is_done => return Ok(false),
            Kind::Head => {
                record::push(&mut self.made, Kind::Head, &record::head());
                self.next = Kind::Early;
            }
            Kind::Early if is_running => return self.make_early(device),
            Kind::Early => self.next = Kind::Config,
            Kind::Config | Kind::Interrupts => {
                let (config, interrupts) = function.save();
                record::push(&mut self.made, Kind::Config, &config);
                let interrupts = record::encode_interrupts(&interrupts);
                record::push(&mut self.made, Kind::Interrupts, &interrupts);
                self.next = Kind::State;
            }
            Kind::State => self.make_state(device)?,
            Kind::End => {
                record::push(
                    &mut self.made,
                    Kind::End,
                    &record::end(self.early, self.state),
                );
                self.is_done = true;
            }
        }
        Ok(true)
    }

    fn make_early(&mut self, device: &mut Migration<'_>) -> io::Result<bool> {
        let Migration::Stream(stream) = device else {
            return Ok(false);
        };
        let mut piece = vec![0; MAX_RECORD];
        let count = stream.read_early_state(self.early, &mut piece)?;
        let piece = piece.get(..count).ok_or(io::ErrorKind::InvalidData)?;
        if piece.is_empty() {
            return Ok(false);
        }
        record::push(&mut self.made, Kind::Early, piece);
        self.early += piece.len() as u64;
        Ok(true)
    }

    fn make_state(&mut self, device: &mut Migration<'_>) -> io::Result<()> {
        let mut piece = vec![0; MAX_RECORD];
        let count = match device {
            Migration::None => 0,
            Migration::Snapshot(device) => {
                let snapshot = match &mut self.snapshot {
                    Some(snapshot) => snapshot,
                    none => none.insert(checked(device.save()?)?),
                };
                let start = usize::try_from(self.state).unwrap_or(usize::MAX);
                let rest = snapshot.get(start..).unwrap_or(&[]);
                piece
                    .iter_mut()
                    .zip(rest)
                    .map(|(to, from)| *to = *from)
                    .count()
            }
            Migration::Stream(device) => device.read_state(self.state, &mut piece)?,
        };
        let is_last = count < piece.len();
        let piece = piece.get(..count).ok_or(io::ErrorKind::InvalidData)?;
        if !piece.is_empty() {
            record::push(&mut self.made, Kind::State, piece);
            self.state += piece.len() as u64;
        }
        if is_last {
            self.next = Kind::End;
        }
        Ok(())
    }
}

/// Checks that a state can be restored.
fn checked(snapshot: Vec<u8>) -> io::Result<Vec<u8>> {
    if snapshot.len() > MAX_SNAPSHOT {
        return Err(io::ErrorKind::InvalidData.into());
    }
    Ok(snapshot)
}
