//! The stream socket: one `sendmsg` or `recvmsg` at a time, with descriptors.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, Result};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, Shutdown, recvmsg, sendmsg, shutdown,
};

/// Most descriptors that one message can carry (`SCM_MAX_FD` of the kernel's `net/scm.h`).
pub(crate) const MAX_FDS: usize = 253;

/// A connected stream socket.
#[derive(Debug)]
pub(crate) struct Socket(OwnedFd);

impl Socket {
    pub(crate) fn new(stream: UnixStream) -> std::io::Result<Self> {
        stream.set_nonblocking(false)?;
        Ok(Self(stream.into()))
    }

    /// Sends `head` and then `data`, with `fds` on the first byte, unless that takes longer than until `deadline`.
    pub(crate) fn send(
        &self,
        mut head: &[u8],
        mut data: &[u8],
        fds: &[BorrowedFd<'_>],
        deadline: Instant,
    ) -> Result<()> {
        let mut fds = fds;
        while !(head.is_empty() && data.is_empty()) {
            match self.send_some(&[IoSlice::new(head), IoSlice::new(data)], fds) {
                Ok(sent) => {
                    fds = &[];
                    let of_data = sent.saturating_sub(head.len());
                    head = head.get(sent..).unwrap_or(&[]);
                    data = data.get(of_data..).unwrap_or(&[]);
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => self.wait(PollFlags::OUT, deadline)?,
                Err(errno) => return Err(errno),
            }
        }
        Ok(())
    }

    /// Sends as many of the bytes as there is room for, and returns how many.
    fn send_some(&self, bytes: &[IoSlice<'_>], fds: &[BorrowedFd<'_>]) -> Result<usize> {
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

    /// Waits until `deadline` for one of `events`, or for the connection to break.
    pub(crate) fn wait(&self, events: PollFlags, deadline: Instant) -> Result<()> {
        let limit = deadline.saturating_duration_since(Instant::now());
        if limit.is_zero() {
            return Err(Errno::TIMEDOUT);
        }
        let limit = Timespec::try_from(limit).map_err(|_| Errno::INVAL)?;
        match poll(&mut [PollFd::new(&self.0, events)], Some(&limit)) {
            // If the time has passed, the next wait says so.
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(errno) => Err(errno),
        }
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
    /// Until something comes.
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
