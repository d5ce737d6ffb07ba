//! The stream socket: one `sendmsg` or `recvmsg` at a time, with descriptors.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, Result};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, Shutdown, SocketAddrUnix, SocketFlags,
    SocketType, connect, recvmsg, sendmsg, shutdown, socket_with,
};

/// Most descriptors that one message can carry (`SCM_MAX_FD` of the kernel's `net/scm.h`).
pub(crate) const MAX_FDS: usize = 253;

/// A connected stream socket. Sending never blocks; receiving does when told to.
#[derive(Debug)]
pub(crate) struct Socket(OwnedFd);

impl Socket {
    /// Takes a connected socket. A blocking receive returns after `slice` with nothing, if there is one.
    pub(crate) fn new(socket: OwnedFd, slice: Option<Duration>) -> std::io::Result<Self> {
        let stream = UnixStream::from(socket);
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(slice)?;
        Ok(Self(stream.into()))
    }

    /// Connects to the socket at `path`, waiting at most `limit` for the server to have room for one more.
    pub(crate) fn connect(path: &Path, limit: Duration) -> Result<UnixStream> {
        let address = SocketAddrUnix::new(path)?;
        let socket = socket_with(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC,
            None,
        )?;
        // The timeout for sending is what bounds connect(2) on a Unix socket.
        set_socket_timeout(&socket, Timeout::Send, Some(limit))?;
        connect(&socket, &address)?;
        Ok(UnixStream::from(socket))
    }

    /// Sends as many of the bytes as there is room for, with `fds` on the first of them, and returns how many.
    pub(crate) fn send(&self, bytes: &[IoSlice<'_>], fds: &[BorrowedFd<'_>]) -> Result<usize> {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        if fds.is_empty() {
            return sendmsg(&self.0, bytes, &mut SendAncillaryBuffer::default(), flags);
        }
        let mut space = [MaybeUninit::uninit(); CONTROL_SPACE];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(Errno::TOOMANYREFS);
        }
        sendmsg(&self.0, bytes, &mut control, flags)
    }

    /// Receives into `buffer`, and descriptors, which close on exec, into `fds`.
    pub(crate) fn receive(
        &self,
        buffer: &mut [u8],
        fds: &mut Vec<OwnedFd>,
        wait: Wait,
    ) -> Result<Received> {
        let mut flags = RecvFlags::CMSG_CLOEXEC;
        if wait == Wait::No {
            flags |= RecvFlags::DONTWAIT;
        }
        let mut space = [MaybeUninit::uninit(); CONTROL_SPACE];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let message = recvmsg(&self.0, &mut [IoSliceMut::new(buffer)], &mut control, flags)?;
        for control in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = control {
                fds.extend(rights);
            }
        }
        Ok(Received {
            bytes: message.bytes,
            fds_lost: message.flags.contains(ReturnFlags::CTRUNC),
        })
    }

    /// Waits at most `limit` for one of `events`, or for the connection to break, and returns what there is.
    pub(crate) fn poll(&self, events: PollFlags, limit: Duration) -> Result<PollFlags> {
        let timeout = Timespec::try_from(limit).map_err(|_| Errno::INVAL)?;
        let mut fds = [PollFd::new(&self.0, events)];
        poll(&mut fds, Some(&timeout))?;
        let [fd] = fds;
        Ok(fd.revents())
    }

    /// Ends the connection, so that whoever waits for it, on either side, sees that.
    pub(crate) fn shutdown(&self) {
        // It fails only if the connection has ended already.
        let _ = shutdown(&self.0, Shutdown::Both);
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Whether to wait for something to receive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wait {
    /// Until something comes, or the socket's slice of time has passed.
    Yes,
    /// Not at all.
    No,
}

/// What a receive brought.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Received {
    /// Number of bytes; 0 if the peer will send no more.
    pub(crate) bytes: usize,
    /// Whether there were more descriptors than there was room for, here or in the process.
    pub(crate) fds_lost: bool,
}

/// Room for the control data of as many descriptors as a message can carry, in bytes.
const CONTROL_SPACE: usize = rustix::cmsg_space!(ScmRights(MAX_FDS));
