//! Standard output as the other end of the serial port.

use std::io::{self, Write};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::stdio::stdout;

/// How long the guest waits for whoever reads the output, before output is lost.
const PATIENCE: Timespec = Timespec {
    tv_sec: 1,
    tv_nsec: 0,
};

/// Standard output, without a buffer. A reader that does not read holds the guest up once, for a second; then output is
/// dropped until it reads again.
#[derive(Debug)]
pub(super) struct Stdout {
    stalled: bool,
}

impl Stdout {
    pub(super) fn new() -> Self {
        Self { stalled: false }
    }
}

impl Write for Stdout {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let stdout = stdout();
        let mut fds = [PollFd::from_borrowed_fd(stdout, PollFlags::OUT)];
        let patience = if self.stalled {
            Timespec::default()
        } else {
            PATIENCE
        };
        if poll(&mut fds, Some(&patience))? == 0 {
            self.stalled = true;
            return Ok(bytes.len());
        }
        self.stalled = false;
        Ok(rustix::io::write(stdout, bytes)?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
