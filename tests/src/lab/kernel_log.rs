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
    pub(super) fn has_no_complaints(mut self) -> Result<()> {
        const COMPLAINTS: [&str; 4] = ["WARNING: ", "BUG: ", "Oops: ", "INFO: task "];
        let mut record = [0; 8192];
        loop {
            // Each read returns one record.
            match self.0.read(&mut record) {
                Ok(length) => {
                    let text = String::from_utf8_lossy(record.get(..length).unwrap_or_default());
                    let is_complaint = COMPLAINTS.iter().any(|complaint| text.contains(complaint));
                    ensure!(!is_complaint, "the lab's kernel says: {text}");
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                // Older records were lost.
                Err(error) if error.kind() == ErrorKind::BrokenPipe => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}
