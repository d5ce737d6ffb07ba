//! A Unix socket between a client and a server, which counts what goes through it.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use tempfile::TempDir;

/// A socket that passes everything on to another one, for one client.
#[derive(Debug)]
pub struct TappedSocket {
    path: PathBuf,
    bytes: Arc<AtomicU64>,
    _folder: TempDir,
}

impl TappedSocket {
    /// A socket before the one of a server. What goes through it ends with either end of the connection.
    ///
    /// # Errors
    /// When there is no place for it.
    pub fn before(server: &Path) -> io::Result<Self> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("tapped.sock");
        let listener = UnixListener::bind(&path)?;
        let bytes = Arc::new(AtomicU64::new(0));
        let (server, counter) = (server.to_owned(), Arc::clone(&bytes));
        thread::spawn(move || -> io::Result<()> {
            let (client, _) = listener.accept()?;
            let server = UnixStream::connect(server)?;
            let back = (server.try_clone()?, client.try_clone()?);
            let its_counter = Arc::clone(&counter);
            thread::spawn(move || pass(&back.0, &back.1, &its_counter));
            pass(&client, &server, &counter);
            Ok(())
        });
        Ok(Self {
            path,
            bytes,
            _folder: folder,
        })
    }

    /// Where clients find it.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// How many bytes have gone through it, both ways.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::SeqCst)
    }
}

/// Passes everything on, until there is nothing more.
fn pass(from: &UnixStream, to: &UnixStream, counter: &AtomicU64) {
    while let Ok(count @ 1..) = pass_some(from, to) {
        counter.fetch_add(count, Ordering::SeqCst);
    }
    for end in [from, to] {
        // It fails only if that has happened already.
        let _ = end.shutdown(Shutdown::Both);
    }
}

/// Passes on what there is, with its descriptors, and returns how many bytes that were.
fn pass_some(from: &UnixStream, to: &UnixStream) -> io::Result<u64> {
    const SPACE: usize = rustix::cmsg_space!(ScmRights(64));
    let mut buffer = [0; 1 << 16];
    let mut space = [MaybeUninit::uninit(); SPACE];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut buffers = [IoSliceMut::new(&mut buffer)];
    let received = recvmsg(from, &mut buffers, &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let mut files = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            files.extend(rights);
        }
    }
    let mut rest = buffer.get(..received.bytes).unwrap_or(&[]);
    while !rest.is_empty() {
        let files: Vec<_> = std::mem::take(&mut files);
        let fds: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        let mut space = [MaybeUninit::uninit(); SPACE];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&fds)) {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let sent = sendmsg(to, &[IoSlice::new(rest)], &mut control, SendFlags::NOSIGNAL)?;
        rest = rest.get(sent..).unwrap_or(&[]);
    }
    Ok(received.bytes as u64)
}
