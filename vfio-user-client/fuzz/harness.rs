//! What the fuzz targets do with their input. An ordinary test does the same with the corpus.

#![allow(dead_code, reason = "each target uses one of them")]

use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use vfio_user_client::{Client, Deadlines, DmaError, GuestDma, Options};
use vfio_user_protocol::{
    Capabilities, Command, Header, Limits, TwinSocket, Version, io_fds, sparse_areas, take,
};
use zerocopy::IntoBytes;

/// Parses `bytes` as everything that there is a parser for.
pub(crate) fn parsers(bytes: &[u8]) {
    let ours = Capabilities {
        twin_socket: Some(TwinSocket {
            supported: true,
            fd_index: None,
        }),
        ..Capabilities::default()
    };
    if let Ok((version, theirs)) = Version::decode(bytes) {
        let _ = Version::CURRENT.check_answer(version);
        let _ = Limits::agree(version, &ours, &theirs);
    }
    if let Ok((header, _)) = take::<Header>(bytes) {
        let _ = header.check(1 << 20);
        let _ = Command::try_from(header.command);
    }
    if let Ok(Some(areas)) = sparse_areas(bytes) {
        assert!(areas.len() * 16 <= bytes.len());
    }
    if let Ok(entries) = io_fds(bytes) {
        assert!(entries.len() * 40 <= bytes.len());
    }
}

/// Lets a server say `bytes`: up to the first NUL its capabilities, then a piece for each call, which is a length in
/// two bytes and as many bytes of the stream. At the end it hangs up. Each call may take as long as `limit`.
///
/// Returns how many of the nine calls were answered well.
pub(crate) fn conversation(bytes: &[u8], limit: Duration) -> usize {
    let nul = bytes.iter().position(|byte| *byte == 0);
    let (json, mut pieces) = bytes.split_at(nul.map_or(bytes.len(), |nul| nul + 1));
    let Ok((ours, theirs)) = UnixStream::pair() else {
        return 0;
    };
    let header = Header {
        id: FIRST_ID,
        ..Header::command(0, Command::Version, 0).reply(size_of::<Version>() + json.len())
    };
    let version = Version { major: 0, minor: 0 };
    say(
        &theirs,
        &[header.as_bytes(), version.as_bytes(), json].concat(),
    );
    let Ok(client) = Client::handshake(ours, Arc::new(Zeros), &options(limit)) else {
        return 0;
    };
    let calls: [fn(&Client) -> bool; 9] = [
        |client| client.device_info().is_ok(),
        |client| client.region_info(0).is_ok(),
        |client| client.region_io_fds(0).is_ok(),
        |client| client.irq_info(0).is_ok(),
        |client| client.region_read(0, 0, &mut [0; 64]).is_ok(),
        |client| client.region_write(0, 0, &[0; 64]).is_ok(),
        |client| client.device_state().is_ok(),
        |client| client.migration_read(&mut [0; 64]).is_ok(),
        |client| client.dma_log(0, 1 << 20, 4096).is_ok(),
    ];
    let mut answered = 0;
    for call in calls {
        if let Ok((length, rest)) = take::<u16>(pieces) {
            let (piece, rest) = rest.split_at(usize::from(length).min(rest.len()));
            say(&theirs, piece);
            pieces = rest;
        } else {
            // It fails only if the client has hung up already.
            let _ = theirs.shutdown(Shutdown::Write);
        }
        answered += usize::from(call(&client));
    }
    client.serve();
    answered
}

/// Sends what there is room for, and does not wait for more.
fn say(mut stream: &UnixStream, bytes: &[u8]) {
    let _ = stream.set_nonblocking(true);
    let _ = stream.write(bytes);
}

/// Guest memory: a page of zeros.
struct Zeros;

impl GuestDma for Zeros {
    fn read(&self, address: u64, data: &mut [u8]) -> Result<(), DmaError> {
        data.fill(0);
        (address < 4096).then_some(()).ok_or(DmaError)
    }

    fn write(&self, address: u64, _: &[u8]) -> Result<(), DmaError> {
        (address < 4096).then_some(()).ok_or(DmaError)
    }
}

fn options(limit: Duration) -> Options {
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

/// The id that a client gives its first command. The next ones are its multiples while each is answered before the next.
const FIRST_ID: u16 = 64;
