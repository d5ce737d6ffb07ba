//! The other end of a connection, to do with as a test likes.

#![allow(dead_code, reason = "not every test needs everything")]

use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use vfio_user_client::{Client, ConnError, Deadlines, DmaError, GuestDma, Options};
use vfio_user_protocol::{Command, DmaAccess, Header, take};
use zerocopy::IntoBytes;

/// The server's end of a connection.
pub(crate) struct Peer {
    pub(crate) stream: UnixStream,
}

/// A message from the client.
#[derive(Debug)]
pub(crate) struct Message {
    pub(crate) header: Header,
    pub(crate) payload: Vec<u8>,
    pub(crate) fds: Vec<OwnedFd>,
}

impl Message {
    pub(crate) fn command(&self) -> Command {
        Command::try_from(self.header.command).unwrap()
    }
}

impl Peer {
    /// Receives the next message; `None` if there is none.
    pub(crate) fn try_receive(&mut self) -> Option<Message> {
        let mut header = [0; Header::SIZE];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = recvmsg(
            &self.stream,
            &mut [IoSliceMut::new(&mut header)],
            &mut control,
            RecvFlags::CMSG_CLOEXEC,
        );
        if received.ok()?.bytes != Header::SIZE {
            return None;
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
        self.stream.read_exact(&mut payload).ok()?;
        Some(Message {
            header,
            payload,
            fds,
        })
    }

    /// Receives the next message.
    pub(crate) fn receive(&mut self) -> Message {
        self.try_receive().unwrap()
    }

    /// Receives the next message, which must be this command.
    pub(crate) fn expect(&mut self, command: Command) -> Message {
        let message = self.receive();
        assert_eq!(message.command(), command);
        message
    }

    /// Sends bytes as they are.
    pub(crate) fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    /// Sends bytes with descriptors.
    pub(crate) fn send_with(&mut self, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(fds.is_empty() || control.push(SendAncillaryMessage::ScmRights(fds)));
        let sent = sendmsg(
            &self.stream,
            &[IoSlice::new(bytes)],
            &mut control,
            SendFlags::NOSIGNAL,
        );
        assert_eq!(sent.unwrap(), bytes.len());
    }

    /// Replies to a command.
    pub(crate) fn reply(&mut self, command: &Message, payload: &[u8]) {
        self.send(&reply(command, payload));
    }

    /// Agrees on a version, with these capabilities and descriptors.
    pub(crate) fn agree(&mut self, capabilities: &str, fds: &[BorrowedFd<'_>]) {
        let proposal = self.expect(Command::Version);
        let answer = reply(&proposal, &version(capabilities));
        self.send_with(&answer, fds);
    }

    /// Answers register accesses for as long as there are any: what is read is the low byte of each offset.
    pub(crate) fn serve(&mut self) {
        while let Some(message) = self.try_receive() {
            if !message.header.is_reply() && !message.header.is_posted() {
                let payload = good_payload(&message);
                self.reply(&message, &payload);
            }
        }
    }
}

/// The bytes of a reply.
pub(crate) fn reply(command: &Message, payload: &[u8]) -> Vec<u8> {
    let header = command.header.reply(payload.len());
    [header.as_bytes(), payload].concat()
}

/// The payload of a `VERSION` message with these capabilities, of which the text is JSON without the outer braces.
pub(crate) fn version(capabilities: &str) -> Vec<u8> {
    let mut payload = vec![0, 0, 0, 0];
    write!(payload, "{{\"capabilities\":{{{capabilities}}}}}\0").unwrap();
    payload
}

/// The payload of a proper reply to a command.
pub(crate) fn good_payload(message: &Message) -> Vec<u8> {
    let payload = &message.payload;
    match message.command() {
        Command::Version => version(""),
        Command::DmaUnmap
        | Command::DeviceGetInfo
        | Command::DeviceGetIrqInfo
        | Command::DeviceGetRegionIoFds
        | Command::DeviceFeature => payload.clone(),
        Command::DeviceGetRegionInfo => {
            let mut info = payload.clone();
            info[..4].copy_from_slice(&32u32.to_ne_bytes());
            info
        }
        Command::RegionRead => {
            let offset = payload[0];
            let count = payload[12] as usize + payload[13] as usize * 256;
            let data = (0..count).map(|i| offset.wrapping_add(i.to_le_bytes()[0]));
            payload.iter().copied().chain(data).collect()
        }
        Command::RegionWrite => payload[..16].to_vec(),
        Command::RegionWriteMulti => payload[..8].to_vec(),
        Command::MigDataRead => {
            let count = payload[4] as usize + payload[5] as usize * 256;
            payload.iter().copied().chain(vec![0; count]).collect()
        }
        _ => Vec::new(),
    }
}

/// The bytes of a command of the server: an access of `count` bytes, with data if it is a write.
pub(crate) fn dma(id: u16, command: Command, address: u64, count: u64, data: &[u8]) -> Vec<u8> {
    let access = DmaAccess { address, count };
    let header = Header::command(id, command, size_of_val(&access) + data.len());
    [header.as_bytes(), access.as_bytes(), data].concat()
}

/// Guest memory: one range.
#[derive(Debug)]
pub(crate) struct Memory {
    pub(crate) start: u64,
    pub(crate) bytes: Mutex<Vec<u8>>,
}

impl Memory {
    /// So many bytes at 0x1000, with the low byte of each address in it.
    pub(crate) fn new(size: usize) -> Arc<Self> {
        Arc::new(Self {
            start: 0x1000,
            bytes: Mutex::new((0..=255).cycle().take(size).collect()),
        })
    }

    fn range(&self, address: u64, count: usize) -> Result<std::ops::Range<usize>, DmaError> {
        let start = address.checked_sub(self.start).ok_or(DmaError)?;
        let start = usize::try_from(start).map_err(|_| DmaError)?;
        Ok(start..start.checked_add(count).ok_or(DmaError)?)
    }
}

impl GuestDma for Memory {
    fn read(&self, address: u64, data: &mut [u8]) -> Result<(), DmaError> {
        let range = self.range(address, data.len())?;
        let bytes = self.bytes.lock().unwrap();
        data.copy_from_slice(bytes.get(range).ok_or(DmaError)?);
        Ok(())
    }

    fn write(&self, address: u64, data: &[u8]) -> Result<(), DmaError> {
        let range = self.range(address, data.len())?;
        let mut bytes = self.bytes.lock().unwrap();
        bytes.get_mut(range).ok_or(DmaError)?.copy_from_slice(data);
        Ok(())
    }
}

/// Options whose every deadline is `limit`.
pub(crate) fn options(limit: Duration) -> Options {
    Options {
        deadlines: Deadlines {
            handshake: limit,
            region_io: limit,
            control: limit,
            reset: limit,
            dma_map: limit,
            migration: limit,
        },
        ..Options::default()
    }
}

/// Long enough never to pass in a test that succeeds.
pub(crate) const LONG: Duration = Duration::from_secs(20);

/// Starts a server that does as `script` says.
pub(crate) fn start<T: Send + 'static>(
    script: impl FnOnce(Peer) -> T + Send + 'static,
) -> (UnixStream, JoinHandle<T>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let server = thread::spawn(move || script(Peer { stream: theirs }));
    (ours, server)
}

/// Starts a server that agrees on a version and then does as `script` says, and a client of it.
pub(crate) fn connect<T: Send + 'static>(
    capabilities: &'static str,
    options: &Options,
    memory: Arc<Memory>,
    script: impl FnOnce(Peer) -> T + Send + 'static,
) -> (Client, JoinHandle<T>) {
    let (stream, server) = start(move |mut peer| {
        peer.agree(capabilities, &[]);
        script(peer)
    });
    let client = Client::handshake(stream, memory, options).unwrap();
    (client, server)
}

/// Reads the register at 0x10, which must work.
pub(crate) fn check_alive(client: &Client) {
    let mut data = [0; 4];
    client.region_read(0, 0x10, &mut data).unwrap();
    assert_eq!(data, [0x10, 0x11, 0x12, 0x13]);
}

/// Where the event loop would learn of something.
pub(crate) fn is_readable(client: &Client, limit: Duration) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let limit = Timespec::try_from(limit).unwrap();
    let mut fds = [PollFd::from_borrowed_fd(client.as_fd(), PollFlags::IN)];
    poll(&mut fds, Some(&limit)).unwrap() > 0
}

/// The kind of an error, for tables.
pub(crate) fn kind(result: &Result<(), ConnError>) -> &'static str {
    match result {
        Ok(()) => "ok",
        Err(ConnError::Lost(_)) => "lost",
        Err(ConnError::TimedOut { .. }) => "timed out",
        Err(ConnError::Refused { .. }) => "refused",
        Err(ConnError::Answer { .. } | ConnError::Version(_)) => "bad answer",
        Err(ConnError::TooLong { .. }) => "too long",
        Err(ConnError::Descriptors { .. }) => "descriptors",
        Err(ConnError::Layout { .. }) => "layout",
        Err(_) => "other",
    }
}
