//! What the event loop of the user watches.

use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{Timespec, epoll};
use rustix::io::Result;

use crate::socket::Socket;

/// An epoll descriptor around the socket. It is readable, level-triggered, from when what is watched for has happened
/// until [`consume`](Self::consume) is called; then nothing is watched until the next [`set`](Self::set).
///
/// This is what lets whoever reads the socket switch the event loop's interest in it on and off without a word to the
/// event loop.
#[derive(Debug)]
pub(crate) struct Watch(OwnedFd);

/// What is watched for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Interest {
    /// Nothing.
    Nothing,
    /// The end of the connection.
    End,
    /// Something to read, or the end.
    Input,
    /// Something to read, room to write, or the end.
    InputOutput,
}

impl Watch {
    /// Watches `socket` for nothing yet.
    pub(crate) fn new(socket: &Socket) -> Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        epoll::add(
            &epoll,
            socket,
            epoll::EventData::new_u64(0),
            epoll::EventFlags::ONESHOT,
        )?;
        Ok(Self(epoll))
    }

    /// Watches for something else.
    pub(crate) fn set(&self, socket: &Socket, interest: Interest) -> Result<()> {
        use epoll::EventFlags as Flags;
        let flags = match interest {
            Interest::Nothing => Flags::empty(),
            Interest::End => Flags::RDHUP,
            Interest::Input => Flags::RDHUP | Flags::IN,
            Interest::InputOutput => Flags::RDHUP | Flags::IN | Flags::OUT,
        };
        let data = epoll::EventData::new_u64(0);
        epoll::modify(&self.0, socket, data, flags | Flags::ONESHOT)
    }

    /// Takes notice of what has happened.
    pub(crate) fn consume(&self) -> Result<()> {
        let mut events = [MaybeUninit::uninit(); 1];
        let at_once = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        epoll::wait(&self.0, &mut events, Some(&at_once)).map(drop)
    }
}

impl AsFd for Watch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
