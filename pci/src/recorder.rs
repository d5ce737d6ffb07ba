//! An endpoint for tests that remembers how it was accessed.

use std::sync::Mutex;

use crate::endpoint::{BarIndex, Cause, Endpoint};

/// An access to configuration space.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Access {
    /// Offset and length.
    Read(u16, usize),
    /// Offset and data.
    Write(u16, Vec<u8>),
}

/// Each byte of its configuration space is the low byte of its offset.
#[derive(Debug, Default)]
pub(crate) struct Recorder {
    accesses: Mutex<Vec<Access>>,
}

impl Recorder {
    /// The accesses since the last call.
    pub(crate) fn take(&self) -> Vec<Access> {
        std::mem::take(&mut self.accesses.lock().unwrap())
    }
}

impl Endpoint for Recorder {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.accesses
            .lock()
            .unwrap()
            .push(Access::Read(offset, data.len()));
        for (at, byte) in (offset..).zip(data) {
            *byte = (at & 0xff) as u8;
        }
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        self.accesses
            .lock()
            .unwrap()
            .push(Access::Write(offset, data.to_vec()));
    }

    fn bar_read(&self, _bar: BarIndex, _offset: u64, _data: &mut [u8]) {}

    fn bar_write(&self, _bar: BarIndex, _offset: u64, _data: &[u8]) {}

    fn reset(&self) -> Result<(), Cause> {
        Ok(())
    }
}
