//! A Unix socket as the other end of the serial port. One client at a time; without one, output is lost.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use devices::Serial;
use event_manager::{EventOps, Events, MutEventSubscriber};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::input::Queue;

/// The guest's output, for the client that there is. One that does not keep up loses some of it.
#[derive(Clone, Default)]
pub(super) struct SocketOutput(Arc<Mutex<Option<UnixStream>>>);

impl SocketOutput {
    fn client(&self) -> MutexGuard<'_, Option<UnixStream>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Write for SocketOutput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Some(client) = self.client().as_mut() {
            // The event loop sees a client that has gone.
            let _ = client.write(bytes);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The listening socket and its client.
pub(super) struct Listener {
    path: PathBuf,
    listener: UnixListener,
    client: Option<UnixStream>,
    output: SocketOutput,
    queue: Queue,
    /// Signalled when the guest has read what the port held.
    input_empty: EventFd,
}

const CONNECTED: u32 = 0;
const INPUT: u32 = 1;
const INPUT_EMPTY: u32 = 2;

impl Listener {
    pub(super) fn bind(
        path: &Path,
        port: Arc<Serial>,
        input_empty: EventFd,
        output: SocketOutput,
    ) -> io::Result<Self> {
        remove_stale(path)?;
        let listener = UnixListener::bind(path)?;
        listener.set_nonblocking(true)?;
        let queue = Queue::new(port);
        Ok(Self {
            path: path.to_owned(),
            listener,
            client: None,
            output,
            queue,
            input_empty,
        })
    }

    /// Takes the next client if there is none, and turns it away if there is one.
    fn accept(&mut self, ops: &mut EventOps<'_>) -> io::Result<()> {
        let (client, _) = self.listener.accept()?;
        if self.client.is_some() {
            return Ok(());
        }
        client.set_nonblocking(true)?;
        let output = client.try_clone()?;
        ops.add(Events::with_data(&client, INPUT, EventSet::IN))
            .map_err(io::Error::other)?;
        *self.output.client() = Some(output);
        self.client = Some(client);
        Ok(())
    }

    fn read(&mut self, ops: &mut EventOps<'_>) {
        let Some(mut client) = self.client.as_ref() else {
            return;
        };
        let mut bytes = [0; 256];
        match client.read(&mut bytes) {
            Ok(length) if length > 0 => {
                bytes
                    .iter()
                    .take(length)
                    .for_each(|&byte| self.queue.push(byte));
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            _ => self.disconnect(ops),
        }
    }

    fn disconnect(&mut self, ops: &mut EventOps<'_>) {
        if let Some(client) = self.client.take()
            && let Err(error) = ops.remove(Events::with_data(&client, INPUT, EventSet::IN))
        {
            log::debug!("serial port: {error}");
        }
        *self.output.client() = None;
    }
}

impl MutEventSubscriber for Listener {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        let fds = [
            (self.listener.as_fd().as_raw_fd(), CONNECTED),
            (self.input_empty.as_raw_fd(), INPUT_EMPTY),
        ];
        for (fd, data) in fds {
            if let Err(error) = ops.add(Events::with_data_raw(fd, data, EventSet::IN)) {
                log::error!("serial port: no input: {error}");
            }
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        match events.data() {
            CONNECTED => {
                if let Err(error) = self.accept(ops) {
                    log::warn!("serial port: no connection: {error}");
                }
            }
            INPUT => self.read(ops),
            _ => {
                let _ = self.input_empty.read();
            }
        }
        self.queue.flush();
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.path) {
            log::debug!("{}: {error}", self.path.display());
        }
    }
}

/// Removes a socket that nobody listens on any more; a process that was killed leaves one behind.
fn remove_stale(path: &Path) -> io::Result<()> {
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path)
        }
        _ => Ok(()),
    }
}
