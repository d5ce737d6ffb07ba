//! Restoring: the stream of a device's state, as it is written. It comes from another host, and may be anything.

use std::io;

use super::record::{self, Kind, RECORD_HEAD, invalid};
use crate::device::Migration;
use crate::function::{Function, SavedInterrupts};

/// Most bytes that the state of a device with [`Migration::Snapshot`] may have.
pub const MAX_SNAPSHOT: usize = 16 << 20;

/// A stream that is being written.
#[derive(Debug)]
pub(super) struct Loader {
    /// What has been written and not parsed: less than a record.
    input: Vec<u8>,
    /// The record that came last.
    last: Option<Kind>,
    config: Vec<u8>,
    interrupts: SavedInterrupts,
    /// How much of the early state and of the state there was, in bytes.
    early: u64,
    state: u64,
    /// The state of a device that has it in one piece.
    snapshot: Vec<u8>,
    /// Whether the stream cannot be used any more.
    failed: bool,
}

impl Loader {
    pub(super) fn new() -> Self {
        Self {
            input: Vec::new(),
            last: None,
            config: Vec::new(),
            interrupts: SavedInterrupts::default(),
            early: 0,
            state: 0,
            snapshot: Vec::new(),
            failed: false,
        }
    }

    /// Lets nothing more be written, nor be made of what was.
    pub(super) fn fail(&mut self) {
        self.failed = true;
    }

    /// Takes the next of the stream.
    pub(super) fn write(&mut self, data: &[u8], device: Migration<'_>) -> io::Result<()> {
        if self.failed {
            return Err(invalid("more of a stream that has failed"));
        }
        let result = self.parse(data, device);
        self.failed = result.is_err();
        result
    }

    /// Lets the device and its function take over what was written, which has to be all of a state. Nothing at all is
    /// nothing to take over.
    pub(super) fn finish(&mut self, device: Migration<'_>, function: &Function) -> io::Result<()> {
        if self.last.is_none() && self.input.is_empty() && !self.failed {
            return Ok(());
        }
        if self.last != Some(Kind::End) || !self.input.is_empty() || self.failed {
            return Err(invalid("a stream that is not complete"));
        }
        function
            .restore(&self.config, &self.interrupts)
            .ok_or_else(|| invalid("the state of another kind of device"))?;
        match device {
            Migration::None => Ok(()),
            Migration::Snapshot(device) => device.restore(&self.snapshot),
            Migration::Stream(device) => device.state_written(self.state),
        }
    }

    /// Deals with all records that end in `data`, and keeps the rest.
    fn parse(&mut self, mut data: &[u8], mut device: Migration<'_>) -> io::Result<()> {
        loop {
            self.complete(&mut data, RECORD_HEAD);
            let Some(head) = self.input.first_chunk() else {
                return Ok(());
            };
            let (kind, length) = record::parse_head(head)?;
            let size = RECORD_HEAD + length;
            self.complete(&mut data, size);
            if self.input.len() < size {
                return Ok(());
            }
            let record = std::mem::take(&mut self.input);
            self.take(kind, record.get(RECORD_HEAD..).unwrap_or(&[]), &mut device)?;
            self.input = record;
            self.input.clear();
        }
    }

    /// Moves bytes from `data` until there are `size` to parse, or no more.
    fn complete(&mut self, data: &mut &[u8], size: usize) {
        let missing = size.saturating_sub(self.input.len()).min(data.len());
        let (piece, rest) = data.split_at_checked(missing).unwrap_or((data, &[]));
        self.input.extend_from_slice(piece);
        *data = rest;
    }

    fn take(&mut self, kind: Kind, data: &[u8], device: &mut Migration<'_>) -> io::Result<()> {
        let in_order = match self.last {
            None => kind == Kind::Head,
            Some(Kind::Head | Kind::Early) => matches!(kind, Kind::Early | Kind::Config),
            Some(Kind::Config) => kind == Kind::Interrupts,
            Some(Kind::Interrupts | Kind::State) => matches!(kind, Kind::State | Kind::End),
            Some(Kind::End) => false,
        };
        if !in_order {
            return Err(invalid("a record in the wrong place"));
        }
        self.last = Some(kind);
        match kind {
            Kind::Head if data == record::head() => Ok(()),
            Kind::Head => Err(invalid("a stream of another kind or version")),
            Kind::Early => {
                let Migration::Stream(device) = device else {
                    return Err(invalid("early state of a device that has none"));
                };
                device.write_early_state(self.early, data)?;
                self.early += data.len() as u64;
                Ok(())
            }
            Kind::Config => {
                self.config = data.to_vec();
                Ok(())
            }
            Kind::Interrupts => {
                self.interrupts = record::decode_interrupts(data)?;
                Ok(())
            }
            Kind::State => self.take_state(data, device),
            Kind::End if data == record::end(self.early, self.state) => Ok(()),
            Kind::End => Err(invalid("an end after less or more than was saved")),
        }
    }

    fn take_state(&mut self, data: &[u8], device: &mut Migration<'_>) -> io::Result<()> {
        match device {
            Migration::None => return Err(invalid("the state of a device that has none")),
            Migration::Snapshot(_) => {
                if self.snapshot.len() + data.len() > MAX_SNAPSHOT {
                    return Err(invalid("a state that is too large"));
                }
                self.snapshot.extend_from_slice(data);
            }
            Migration::Stream(device) => device.write_state(self.state, data)?,
        }
        self.state += data.len() as u64;
        Ok(())
    }
}
