//! A server whose one region reads as zeroes, with a thread for all of its connections.

use std::io::{self, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::thread;

use anyhow::{Context, bail};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use tempfile::TempDir;
use vfio_user_protocol::{
    Capabilities, Command, DeviceInfo, Header, RegionInfo, TwinSocket, Version, take,
};
use zerocopy::IntoBytes;

use crate::placement;

/// A connection of the server.
pub(super) struct Echo {
    stream: UnixStream,
    /// The server's ends of the sockets for its own commands, of which it has none.
    twins: Vec<UnixStream>,
    input: Vec<u8>,
    /// How much of a message that is not complete there is.
    filled: usize,
}

impl Echo {
    /// Starts a server for a client. It ends with that.
    pub(super) fn start() -> anyhow::Result<UnixStream> {
        Self::start_many(1)?.pop().context("no connection")
    }

    /// Starts a server for so many clients. It ends with the first of them.
    pub(super) fn start_many(connections: u32) -> anyhow::Result<Vec<UnixStream>> {
        let pairs: io::Result<Vec<_>> = (0..connections).map(|_| UnixStream::pair()).collect();
        let (clients, servers): (_, Vec<_>) = pairs?.into_iter().unzip();
        serve(move || Ok(servers))?;
        Ok(clients)
    }

    /// Starts a server for a client that connects to a socket. That stays as long as the folder does.
    pub(super) fn listen() -> anyhow::Result<(TempDir, PathBuf)> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("echo.sock");
        let listener = UnixListener::bind(&path)?;
        serve(move || Ok(vec![listener.accept()?.0]))?;
        Ok((folder, path))
    }

    fn on(stream: UnixStream) -> Self {
        Self {
            stream,
            twins: Vec::new(),
            input: vec![0; 64 << 10],
            filled: 0,
        }
    }

    /// Receives once and answers every message that is complete. Says whether the connection goes on.
    fn receive(&mut self) -> anyhow::Result<bool> {
        let free = self.input.get_mut(self.filled..).unwrap_or_default();
        let received = self.stream.read(free)?;
        if received == 0 {
            return Ok(false);
        }
        self.filled += received;
        let mut rest = self.input.get(..self.filled).unwrap_or_default();
        while let Ok((header, _)) = take::<Header>(rest)
            && let Some((message, next)) = rest.split_at_checked(header.size as usize)
        {
            let payload = message.get(Header::SIZE..).unwrap_or_default();
            answer(&mut self.stream, &header, payload, &mut self.twins)?;
            rest = next;
        }
        let left = self.filled - rest.len()..self.filled;
        self.filled = left.len();
        self.input.copy_within(left, 0);
        Ok(true)
    }
}

/// Starts the thread, where the client runs, too.
fn serve(
    connect: impl FnOnce() -> io::Result<Vec<UnixStream>> + Send + 'static,
) -> anyhow::Result<()> {
    placement::on_one_cpu(|| {
        thread::spawn(move || -> anyhow::Result<()> {
            let mut connections: Vec<_> = connect()?.into_iter().map(Echo::on).collect();
            loop {
                let mut ready = vec![true];
                if connections.len() > 1 {
                    let streams = connections.iter().map(|connection| &connection.stream);
                    let mut fds: Vec<_> = streams
                        .map(|stream| PollFd::new(stream, PollFlags::IN))
                        .collect();
                    poll(&mut fds, None)?;
                    ready = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
                }
                for (connection, ready) in connections.iter_mut().zip(ready) {
                    if ready && !connection.receive()? {
                        return Ok(());
                    }
                }
            }
        });
        Ok(())
    })
}

fn answer(
    stream: &mut UnixStream,
    command: &Header,
    payload: &[u8],
    twins: &mut Vec<UnixStream>,
) -> anyhow::Result<()> {
    if command.is_posted() {
        return Ok(());
    }
    let mut fds: Vec<OwnedFd> = Vec::new();
    let reply = match Command::try_from(command.command)? {
        Command::RegionRead => return answer_read(stream, command, payload),
        Command::RegionWrite => payload.get(..16).context("a short write")?.to_vec(),
        Command::Version => {
            let (_, theirs) = Version::decode(payload)?;
            let mut ours = Capabilities::default();
            if theirs.twin_socket.is_some_and(|twin| twin.supported) {
                let (here, there) = UnixStream::pair()?;
                twins.push(here);
                fds.push(there.into());
                ours.twin_socket = Some(TwinSocket {
                    supported: true,
                    fd_index: Some(0),
                });
            }
            Version { major: 0, minor: 0 }.encode(&ours)?
        }
        Command::DeviceGetInfo => DeviceInfo {
            argsz: 16,
            flags: 2,
            num_regions: 1,
            num_irqs: 0,
        }
        .as_bytes()
        .to_vec(),
        Command::DeviceGetRegionInfo => RegionInfo {
            argsz: 32,
            flags: 3,
            size: 0x1000,
            ..RegionInfo::default()
        }
        .as_bytes()
        .to_vec(),
        command => bail!("{command:?} is not expected here"),
    };
    let header = command.reply(reply.len());
    send(
        stream,
        &[IoSlice::new(header.as_bytes()), IoSlice::new(&reply)],
        &fds,
    )
}

/// The one answer that is measured allocates nothing.
fn answer_read(stream: &mut UnixStream, command: &Header, payload: &[u8]) -> anyhow::Result<()> {
    let header = command.reply(20);
    let mut reply = [0; 36];
    let bytes = header.as_bytes().iter().chain(payload);
    for (to, from) in reply.iter_mut().zip(bytes) {
        *to = *from;
    }
    Ok(stream.write_all(&reply)?)
}

fn send(stream: &UnixStream, parts: &[IoSlice<'_>], fds: &[OwnedFd]) -> anyhow::Result<()> {
    let fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        control.push(SendAncillaryMessage::ScmRights(&fds));
    }
    sendmsg(stream, parts, &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}
