//! vfio-user servers inside the test's own process.

use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;

use tempfile::TempDir;
use vfio_user::{IrqInfo, Server, ServerBackend, ServerRegion};

/// A server that serves one client on a socket of its own, and then ends.
#[derive(Debug)]
pub struct DeviceThread {
    // Removed with the socket in it on drop.
    _folder: TempDir,
    socket: PathBuf,
}

impl DeviceThread {
    /// Starts the test device.
    ///
    /// # Errors
    /// When there is no place for the socket, or the server does not start.
    pub fn test_device() -> anyhow::Result<Self> {
        Self::start(crate::device::serve)
    }

    /// Starts a device of the test's own.
    ///
    /// # Errors
    /// When there is no place for the socket, or the server does not start.
    pub fn custom(
        mut device: impl ServerBackend + Send + 'static,
        irqs: Vec<IrqInfo>,
        regions: Vec<ServerRegion>,
    ) -> anyhow::Result<Self> {
        Self::start(move |socket, ready| {
            let server = Server::new(socket, true, irqs, regions)?;
            ready();
            server.run(&mut device)
        })
    }

    fn start(
        serve: impl FnOnce(&Path, Box<dyn FnOnce()>) -> Result<(), vfio_user::Error> + Send + 'static,
    ) -> anyhow::Result<Self> {
        let folder = tempfile::tempdir()?;
        let socket = folder.path().join("device.sock");
        let (ready, is_ready) = mpsc::channel();
        thread::spawn({
            let socket = socket.clone();
            move || {
                serve(
                    &socket,
                    Box::new(move || ready.send(()).unwrap_or_default()),
                )
            }
        });
        is_ready.recv()?;
        Ok(Self {
            _folder: folder,
            socket,
        })
    }

    /// The socket that it listens on.
    pub fn socket(&self) -> &Path {
        &self.socket
    }
}
