//! What the fuzz target does with its input. An ordinary test does the same with the corpus.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use vfio_user_protocol::{Command, Header, Version, take};
use vfio_user_server::{
    Bar, Description, Device, Doorbell, Ended, Host, Ids, Migration, MsixTable, Options, Server,
    ServerError, Snapshot,
};
use zerocopy::IntoBytes;

/// Lets a client say `bytes`, and then one that knows how to behave, and returns whether the second was served well.
///
/// The first byte says what the first client can do. Pieces of what it sends follow, each of which is a byte that says
/// which descriptor comes with it, a length in two bytes, and as many bytes. At the end it hangs up. It reads nothing.
pub(crate) fn conversation(bytes: &[u8]) -> bool {
    let Ok(mut server) = server() else {
        return false;
    };
    let Some((first, mut rest)) = bytes.split_first() else {
        return true;
    };
    let capabilities = match first & 3 {
        0 => "{}\0",
        1 => "{\"capabilities\":{\"max_msg_fds\":8}}\0",
        2 => "{\"capabilities\":{\"max_msg_fds\":8,\"twin_socket\":{\"supported\":true}}}\0",
        _ => "{\"capabilities\":{\"max_msg_fds\":0,\"max_data_xfer_size\":64}}\0",
    };
    let mut pieces = vec![(0, version(capabilities))];
    while let Ok((Piece { fd, length }, after)) = take::<Piece>(rest) {
        let length = usize::from(u16::from_le_bytes(length)).min(after.len());
        let (piece, after) = after.split_at(length);
        pieces.push((fd, piece.to_vec()));
        rest = after;
    }
    serve(&mut server, &pieces);
    let read = [message(Command::RegionRead, &[0; 12], &[4, 0, 0, 0])].concat();
    serve(&mut server, &[(0, version("{}\0")), (0, read)]) == Some(Ended::Closed)
}

/// How a piece begins.
#[derive(zerocopy::FromBytes)]
#[repr(C)]
struct Piece {
    fd: u8,
    length: [u8; 2],
}

/// Serves a client that sends these pieces and hangs up, and returns how that ended.
fn serve(server: &mut Server<Everything>, pieces: &[(u8, Vec<u8>)]) -> Option<Ended> {
    let (ours, theirs) = UnixStream::pair().ok()?;
    ours.set_nonblocking(true).ok()?;
    for (fd, piece) in pieces {
        // What there is no room for is lost.
        let _ = send(&ours, piece, descriptor(*fd).as_ref());
    }
    ours.shutdown(Shutdown::Write).ok()?;
    server.serve(theirs).ok()
}

fn send(stream: &UnixStream, bytes: &[u8], fd: Option<&OwnedFd>) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds: Vec<_> = fd.iter().map(|fd| fd.as_fd()).collect();
    if !fds.is_empty() {
        control.push(SendAncillaryMessage::ScmRights(&fds));
    }
    sendmsg(
        stream,
        &[IoSlice::new(bytes)],
        &mut control,
        SendFlags::NOSIGNAL,
    )?;
    Ok(())
}

/// A descriptor of every kind.
fn descriptor(kind: u8) -> Option<OwnedFd> {
    match kind & 3 {
        1 => {
            let memory = memfd_create("fuzz", MemfdFlags::CLOEXEC).ok()?;
            ftruncate(&memory, 1 << 16).ok()?;
            Some(memory)
        }
        2 => eventfd(0, EventfdFlags::CLOEXEC).ok(),
        3 => io::pipe().ok().map(|(_, writer)| writer.into()),
        _ => None,
    }
}

fn version(json: &str) -> Vec<u8> {
    message(
        Command::Version,
        Version::CURRENT.as_bytes(),
        json.as_bytes(),
    )
}

fn message(command: Command, head: &[u8], data: &[u8]) -> Vec<u8> {
    let header = Header::command(1, command, head.len() + data.len());
    [header.as_bytes(), head, data].concat()
}

/// A device that does what its registers are written: memory, interrupts and a state.
#[derive(Debug)]
struct Everything {
    host: Host,
    registers: [u8; 0x1000],
}

fn server() -> Result<Server<Everything>, ServerError> {
    let ids = Ids {
        vendor: 1,
        device: 2,
        subsystem_vendor: 3,
        subsystem: 4,
        revision: 5,
        class: 6,
    };
    let description = Description::new(ids)
        .bar(0, Bar::memory32(0x1000))
        .bar(1, Bar::memory64(0x1000))
        .intx()
        .msi(2)
        .express()
        .msix(MsixTable {
            vectors: 65,
            table_bar: 1,
            table_offset: 0,
            pending_bar: 1,
            pending_offset: 0x800,
        })
        .doorbell(Doorbell {
            bar: 0,
            offset: 0x800,
            size: 4,
            value: None,
        });
    let patience = Duration::from_millis(1);
    let options = Options {
        memory_deadline: patience,
        send_deadline: patience,
        unmap_deadline: patience,
        max_mappings: 8,
        ..Options::default()
    };
    Server::new(description, options, |host| Everything {
        host: host.clone(),
        registers: [0; 0x1000],
    })
}

impl Device for Everything {
    fn read(&mut self, _: usize, offset: u64, data: &mut [u8]) -> io::Result<()> {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let bytes = self.registers.get(start..).unwrap_or(&[]);
        for (to, from) in data.iter_mut().zip(bytes) {
            *to = *from;
        }
        Ok(())
    }

    /// Registers that are written with a byte trigger an interrupt, those of eight bytes are an address.
    fn write(&mut self, _: usize, offset: u64, data: &[u8]) -> io::Result<()> {
        match *data {
            [vector] => {
                self.host.interrupts.trigger(vector.into());
                self.host.interrupts.set_intx(vector & 1 != 0);
            }
            [a, b, c, d, e, f, g, h] => {
                let address = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
                let mut memory = [0; 0x1001];
                let _ = self.host.memory.read(address, &mut memory);
                let _ = self.host.memory.write(address, &memory);
            }
            _ => {}
        }
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let bytes = self.registers.get_mut(start..).unwrap_or(&mut []);
        for (to, from) in bytes.iter_mut().zip(data) {
            *to = *from;
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.registers.fill(0);
    }

    fn doorbell(&mut self, _: usize) {
        self.host.interrupts.trigger(64);
    }

    fn migration(&mut self) -> Migration<'_> {
        Migration::Snapshot(self)
    }
}

impl Snapshot for Everything {
    fn save(&mut self) -> io::Result<Vec<u8>> {
        Ok(self.registers.to_vec())
    }

    fn restore(&mut self, state: &[u8]) -> io::Result<()> {
        self.registers = *state.first_chunk().ok_or(io::ErrorKind::InvalidData)?;
        Ok(())
    }
}
