//! vfio-user servers inside the test's own process.

use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};

use device_servers::{demo, disk};
use tempfile::TempDir;
use vfio_user_server::{Description, Device, Host, Ids, Listener, Options, Server, Stopper};

/// A server that runs until this is dropped.
#[derive(Debug)]
pub struct DeviceThread {
    stopper: Stopper,
    thread: Option<JoinHandle<std::io::Result<()>>>,
    socket: PathBuf,
    // Removed when the server has ended, whose socket is in it.
    _folder: TempDir,
}

impl DeviceThread {
    /// Starts the demo device.
    ///
    /// # Errors
    /// When there is no place for the socket, or the server does not start.
    pub fn demo() -> anyhow::Result<Self> {
        Self::serve(|socket| Ok(demo::server(&demo::Options::new(socket))?))
    }

    /// Starts a disk.
    ///
    /// # Errors
    /// When there is no such image, no place for the socket, or the server does not start.
    pub fn disk(image: &Path) -> anyhow::Result<Self> {
        Self::serve(|_| Ok(disk::server(&disk::Options::new(image))?))
    }

    /// Starts a device of the test's own.
    ///
    /// # Errors
    /// When there is no place for the socket, or the server does not start.
    pub fn custom<D: Device + Send + 'static>(
        description: Description,
        device: impl FnOnce(&Host) -> D,
    ) -> anyhow::Result<Self> {
        Self::serve(|_| Ok(Server::new(description, Options::default(), device)?))
    }

    fn serve<D: Device + Send + 'static>(
        server: impl FnOnce(&Path) -> anyhow::Result<Server<D>>,
    ) -> anyhow::Result<Self> {
        let folder = tempfile::tempdir()?;
        let socket = folder.path().join("device.sock");
        let mut server = server(&socket)?;
        let listener = Listener::bind(&socket)?;
        Ok(Self {
            stopper: server.stopper(),
            thread: Some(thread::spawn(move || server.run(&listener))),
            socket,
            _folder: folder,
        })
    }

    /// The socket that it listens on.
    pub fn socket(&self) -> &Path {
        &self.socket
    }
}

impl Drop for DeviceThread {
    fn drop(&mut self) {
        self.stopper.stop();
        let ended = self.thread.take().map(JoinHandle::join);
        let well = matches!(ended, Some(Ok(Ok(()))));
        assert!(well || thread::panicking(), "the server failed: {ended:?}");
    }
}

/// Who a device of a test's own says that it is.
pub const IDS: Ids = Ids {
    vendor: 0x4f52,
    device: 0x0002,
    subsystem_vendor: 0x4f52,
    subsystem: 0,
    revision: 0,
    class: 0xff_00_00,
};
