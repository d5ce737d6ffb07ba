//! A client that sends what it likes.

use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use vfio_user_protocol::{Command, Header, RegionAccess, take};
use zerocopy::IntoBytes;

use super::LONG;

/// The client's end of a connection.
pub(crate) struct Raw(pub(crate) UnixStream);

/// A message of the server.
#[derive(Debug)]
pub(crate) struct Message {
    pub(crate) header: Header,
    pub(crate) payload: Vec<u8>,
    pub(crate) fds: Vec<OwnedFd>,
}

impl Message {
    /// The errno of a refusal, which has no payload; 0 of another reply.
    pub(crate) fn errno(&self) -> u32 {
        assert!(self.header.is_reply());
        if self.header.is_error() {
            assert!(self.payload.is_empty() && self.header.error != 0);
        }
        self.header.error
    }
}

impl Raw {
    pub(crate) fn new(stream: UnixStream) -> Self {
        stream.set_read_timeout(Some(LONG)).unwrap();
        Self(stream)
    }

    /// Agrees on a version, with these capabilities: JSON without the outer braces.
    pub(crate) fn agree(&mut self, capabilities: &str) -> Message {
        let answer = self.call(Command::Version as u16, &version(0, 2, capabilities), &[]);
        assert_eq!(answer.errno(), 0);
        answer
    }

    /// Sends a command and receives the answer to it.
    pub(crate) fn call(&mut self, command: u16, payload: &[u8], fds: &[BorrowedFd<'_>]) -> Message {
        self.send(&message(command, payload), fds);
        self.receive().unwrap()
    }

    pub(crate) fn send(&mut self, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(fds.is_empty() || control.push(SendAncillaryMessage::ScmRights(fds)));
        let first = sendmsg(
            &self.0,
            &[IoSlice::new(bytes)],
            &mut control,
            SendFlags::NOSIGNAL,
        );
        self.0.write_all(&bytes[first.unwrap()..]).unwrap();
    }

    /// Receives the next message; `None` if the server has closed the connection.
    pub(crate) fn receive(&mut self) -> Option<Message> {
        let mut header = [0; Header::SIZE];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = recvmsg(
            &self.0,
            &mut [IoSliceMut::new(&mut header)],
            &mut control,
            RecvFlags::CMSG_CLOEXEC,
        );
        match received {
            Ok(received) if received.bytes == Header::SIZE => {}
            Ok(received) => {
                assert_eq!(received.bytes, 0);
                return None;
            }
            Err(errno) => {
                assert_eq!(errno, rustix::io::Errno::CONNRESET);
                return None;
            }
        }
        let fds = control
            .drain()
            .filter_map(|message| match message {
                RecvAncillaryMessage::ScmRights(fds) => Some(fds),
                _ => None,
            })
            .flatten()
            .collect();
        let (header, _) = take::<Header>(&header).unwrap();
        let mut payload = vec![0; header.payload_size()];
        self.0.read_exact(&mut payload).unwrap();
        Some(Message {
            header,
            payload,
            fds,
        })
    }

    /// Checks that the device answers.
    pub(crate) fn check_alive(&mut self) {
        let answer = self.call(Command::RegionRead as u16, &access(7, 0, 2), &[]);
        assert_eq!(answer.payload[16..], [0x52, 0x4f]);
    }
}

/// The bytes of a command.
pub(crate) fn message(command: u16, payload: &[u8]) -> Vec<u8> {
    let mut header = Header::command(7, Command::Version, payload.len());
    header.command = command;
    [header.as_bytes(), payload].concat()
}

/// The payload of a `VERSION` message.
pub(crate) fn version(major: u16, minor: u16, capabilities: &str) -> Vec<u8> {
    let mut payload = [major.to_ne_bytes(), minor.to_ne_bytes()].concat();
    write!(payload, "{{\"capabilities\":{{{capabilities}}}}}\0").unwrap();
    payload
}

/// The payload of `REGION_READ`, or the head of the one of `REGION_WRITE`.
pub(crate) fn access(region: u32, offset: u64, count: u32) -> Vec<u8> {
    let access = RegionAccess {
        offset,
        region,
        count,
    };
    access.as_bytes().to_vec()
}

/// Words of 32 bits, as a payload.
pub(crate) fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// Words of 64 bits, as a payload.
pub(crate) fn longs(longs: &[u64]) -> Vec<u8> {
    longs.iter().flat_map(|long| long.to_ne_bytes()).collect()
}
