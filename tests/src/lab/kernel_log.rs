//! What the lab's kernel complains about.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;

use anyhow::{Context, Result, ensure};
use rustix::fs::OFlags;

/// The kernel's log, from some time on.
#[derive(Debug)]
pub(super) struct KernelLog(File);

impl KernelLog {
    /// The log from now on.
    pub(super) fn from_now() -> Result<Self> {
        let flags = OFlags::NONBLOCK.bits().cast_signed();
        let mut log = OpenOptions::new()
            .read(true)
            .custom_flags(flags)
            .open("/dev/kmsg")
            .context("opening the kernel's log")?;
        log.seek(SeekFrom::End(0))?;
        Ok(Self(log))
    }

    /// Checks that the kernel has not found a mistake of its own, as it does when a driver is used in a way that nobody
    /// has thought of.
    pub(super) fn has_no_complaints(&mut self) -> Result<()> {
        const COMPLAINTS: [&str; 4] = ["WARNING: ", "BUG: ", "Oops: ", "INFO: task "];
        for text in self.read()? {
            let is_complaint = COMPLAINTS.iter().any(|complaint| text.contains(complaint));
            ensure!(!is_complaint, "the lab's kernel says: {text}");
        }
        Ok(())
    }

    /// The messages since it was read last, each of which is a line.
    pub(super) fn read(&mut self) -> Result<Vec<String>> {
        let mut records = Vec::new();
        let mut record = [0; 8192];
        loop {
            // Each read returns one record.
            match self.0.read(&mut record) {
                Ok(length) => {
                    let text = String::from_utf8_lossy(record.get(..length).unwrap_or_default());
                    // Numbers are before it, and what it is about comes after it.
                    let text = text.split_once(';').map_or("", |(_, text)| text);
                    records.extend(text.lines().next().map(str::to_owned));
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(records),
                // Older records were lost.
                Err(error) if error.kind() == ErrorKind::BrokenPipe => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}
