//! A server that lives while a test wants it.

use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::thread::{self, JoinHandle};

use tempfile::TempDir;
use vfio_user_server::{Listener, Options, Stopper};

use super::Everything;
use super::raw::Raw;

/// A server of a device with everything, at a path.
pub(crate) struct Served {
    _folder: TempDir,
    pub(crate) path: PathBuf,
    stopper: Stopper,
    thread: Option<JoinHandle<()>>,
}

impl Served {
    pub(crate) fn new(options: Options) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let listener = Listener::bind(&path).unwrap();
        let mut server = Everything::server(options);
        let stopper = server.stopper();
        let thread = thread::spawn(move || server.run(&listener).unwrap());
        Self {
            _folder: folder,
            path,
            stopper,
            thread: Some(thread),
        }
    }

    pub(crate) fn connect(&self) -> Raw {
        Raw::new(UnixStream::connect(&self.path).unwrap())
    }

    pub(crate) fn agreed(&self) -> Raw {
        let mut raw = self.connect();
        raw.agree("\"max_msg_fds\":8");
        raw
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.stopper.stop();
        self.thread.take().unwrap().join().unwrap();
    }
}
