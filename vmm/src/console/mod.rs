//! The other end of the serial port: the terminal, a file or a socket.

mod escape;
mod input;
mod output;
mod socket;
mod terminal;

use std::fs::File;
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::Arc;

use devices::Serial;
use event_manager::MutEventSubscriber;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use self::input::Keyboard;
use self::output::Stdout;
use self::socket::{Listener, SocketOutput};
use self::terminal::Terminal;
use crate::config::SerialConfig;
use crate::ending::Endings;

/// Why the serial port cannot be connected.
#[derive(Debug, thiserror::Error)]
pub enum ConsoleError {
    /// The file cannot be written to.
    #[error("--serial file={}: cannot create it", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the kernel says.
        #[source]
        source: io::Error,
    },
    /// The socket cannot be listened on.
    #[error("--serial socket={}: cannot listen on it", path.display())]
    Socket {
        /// The socket.
        path: PathBuf,
        /// What the kernel says.
        #[source]
        source: io::Error,
    },
    /// The terminal cannot be set up.
    #[error("--serial tty: cannot set the terminal up")]
    Terminal(#[source] io::Error),
    /// An event could not be made.
    #[error("cannot make an event (too many open files? see `ulimit -n`)")]
    Event(#[source] io::Error),
}

/// A serial port, and what has to be watched for its input.
pub(crate) struct Console {
    pub(crate) port: Arc<Serial>,
    pub(crate) input: Option<Box<dyn MutEventSubscriber + Send>>,
}

impl Console {
    /// Connects a serial port that raises its interrupt by `interrupt`. None if there shall be no port. What the guest has
    /// said before `goes_on` in a file.
    pub(crate) fn open(
        config: &SerialConfig,
        goes_on: bool,
        interrupt: EventFd,
        endings: &Arc<Endings>,
    ) -> Result<Option<Self>, ConsoleError> {
        let input_empty = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).map_err(ConsoleError::Event)?;
        let watched = input_empty.try_clone().map_err(ConsoleError::Event)?;
        let port =
            |output: Box<dyn Write + Send>| Arc::new(Serial::new(interrupt, input_empty, output));
        Ok(match config {
            SerialConfig::Off => None,
            SerialConfig::File(path) => {
                let error = |source| ConsoleError::File {
                    path: path.clone(),
                    source,
                };
                let file = File::options()
                    .create(true)
                    .write(true)
                    .append(goes_on)
                    .truncate(!goes_on)
                    .open(path)
                    .map_err(error)?;
                Some(Self {
                    port: port(Box::new(file)),
                    input: None,
                })
            }
            SerialConfig::Socket(path) => {
                let error = |source| ConsoleError::Socket {
                    path: path.clone(),
                    source,
                };
                let output = SocketOutput::default();
                let port = port(Box::new(output.clone()));
                let listener =
                    Listener::bind(path, port.clone(), watched, output).map_err(error)?;
                Some(Self {
                    port,
                    input: Some(Box::new(listener)),
                })
            }
            SerialConfig::Tty => {
                let terminal = Terminal::raw().map_err(ConsoleError::Terminal)?;
                let port = port(Box::new(Stdout::new()));
                let keyboard = Keyboard::new(terminal, port.clone(), watched, endings.clone());
                Some(Self {
                    port,
                    input: Some(Box::new(keyboard)),
                })
            }
        })
    }
}
