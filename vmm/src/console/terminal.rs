//! The user's terminal in raw mode, and back in its own on every way out.

use std::io::{self, IsTerminal, Stdin, stdin};
use std::sync::{Mutex, PoisonError};

use rustix::process::getpgrp;
use rustix::termios::{OptionalActions, OutputModes, Termios, tcgetattr, tcgetpgrp, tcsetattr};

/// The terminal's own mode while it is in raw mode. A panic ends the process without unwinding, so this is not in the
/// guard alone.
static COOKED: Mutex<Option<Termios>> = Mutex::new(None);

/// Standard input. If it is a terminal that this process may read, it is in raw mode while the value lives.
#[derive(Debug)]
pub(super) struct Terminal {
    kind: Kind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// A terminal with a user before it, in raw mode.
    Raw,
    /// A terminal that is somebody else's at the moment: reading from it would stop this process.
    Background,
    /// A pipe, a file or a device.
    Other,
}

impl Terminal {
    /// Puts the terminal, if it is one, into raw mode: keys come one by one, and none of them signals the process.
    pub(super) fn raw() -> io::Result<Self> {
        let stdin = stdin();
        if !stdin.is_terminal() {
            return Ok(Self { kind: Kind::Other });
        }
        if !in_foreground(&stdin) {
            return Ok(Self {
                kind: Kind::Background,
            });
        }
        let cooked = tcgetattr(&stdin)?;
        let mut raw = cooked.clone();
        raw.make_raw();
        // The guest sends carriage returns of its own, but the log does not.
        raw.output_modes |= cooked.output_modes & OutputModes::OPOST;
        restore_on_panic();
        *COOKED.lock().unwrap_or_else(PoisonError::into_inner) = Some(cooked);
        tcsetattr(&stdin, OptionalActions::Now, &raw)?;
        Ok(Self { kind: Kind::Raw })
    }

    /// Whether this is a terminal, with a user before it.
    pub(super) fn is_raw(&self) -> bool {
        self.kind == Kind::Raw
    }

    /// Whether anything may be read from it.
    pub(super) fn is_readable(&self) -> bool {
        self.kind != Kind::Background
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        restore();
    }
}

/// A process in the background would be stopped for touching its terminal.
fn in_foreground(stdin: &Stdin) -> bool {
    // Of a terminal that is not its own, it may do as it likes.
    tcgetpgrp(stdin).map_or(true, |group| group == getpgrp())
}

fn restore() {
    if let Some(cooked) = COOKED.lock().unwrap_or_else(PoisonError::into_inner).take() {
        // Nothing can be done about a terminal that has gone.
        let _ = tcsetattr(stdin(), OptionalActions::Now, &cooked);
    }
}

fn restore_on_panic() {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        restore();
        report(info);
    }));
}
