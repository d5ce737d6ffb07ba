//! A connection over which bytes go as fast as they can, or to and fro. What they are does not matter: see
//! [`stream`](crate::stream) for when it does.
//!
//! The guest connects, and says with one byte what is going to be; the other end answers with the same one.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::Instant;

use anyhow::{Context, Result, ensure};

/// What is going to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transfer {
    /// The guest sends a byte, and the next when that has come back.
    RoundTrips,
    /// The guest sends.
    Upload,
    /// The guest receives.
    Download,
}

/// What is sent at a time.
const PIECE: usize = 256 << 10;

impl Transfer {
    const ALL: [Self; 3] = [Self::RoundTrips, Self::Upload, Self::Download];

    /// The one of this name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|one| one.name() == name)
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::RoundTrips => "round-trips",
            Self::Upload => "upload",
            Self::Download => "download",
        }
    }

    fn order(self) -> u8 {
        match self {
            Self::RoundTrips => b'r',
            Self::Upload => b'u',
            Self::Download => b'd',
        }
    }

    /// Orders it, as the guest, and waits until the other end is ready.
    ///
    /// # Errors
    /// When the connection fails.
    pub fn begin(self, mut stream: &TcpStream) -> Result<()> {
        stream.set_nodelay(true)?;
        stream.write_all(&[self.order()])?;
        let mut answer = [0];
        stream.read_exact(&mut answer)?;
        ensure!(answer == [self.order()], "the answer is {answer:?}");
        Ok(())
    }

    /// Goes on until it is time to end, as the guest. Returns how many round trips that was, or bytes that have arrived.
    ///
    /// # Errors
    /// When the connection fails.
    pub fn carry_out(self, mut stream: TcpStream, end: Instant) -> Result<u64> {
        let mut piece = vec![0; PIECE];
        let mut count = 0;
        match self {
            Self::RoundTrips => {
                let mut byte = [0];
                while Instant::now() < end {
                    stream.write_all(&byte)?;
                    stream.read_exact(&mut byte)?;
                    count += 1;
                }
            }
            Self::Upload => {
                while Instant::now() < end {
                    stream.write_all(&piece)?;
                    count += piece.len() as u64;
                }
                // The other end ends the connection when it has everything.
                stream.shutdown(Shutdown::Write)?;
                ensure!(stream.read(&mut piece)? == 0, "an answer to an upload");
            }
            Self::Download => {
                while Instant::now() < end {
                    let length = stream.read(&mut piece)?;
                    ensure!(length > 0, "the other end has ended the connection");
                    count += length as u64;
                }
            }
        }
        Ok(count)
    }

    /// Does what the guest orders, as the other end, until the guest ends the connection.
    ///
    /// # Errors
    /// When the connection fails, or the order is none.
    pub fn serve(mut stream: TcpStream) -> Result<()> {
        stream.set_nodelay(true)?;
        let mut order = [0];
        stream.read_exact(&mut order)?;
        let is_it = |one: &Self| [one.order()] == order;
        let transfer = Self::ALL.into_iter().find(is_it).context("no order")?;
        stream.write_all(&order)?;
        let mut piece = vec![0; PIECE];
        let result = match transfer {
            Self::RoundTrips => loop {
                let mut byte = [0];
                match stream.read(&mut byte) {
                    Ok(0) => break Ok(()),
                    Ok(_) => stream.write_all(&byte)?,
                    Err(error) => break Err(error),
                }
            },
            Self::Upload => loop {
                match stream.read(&mut piece) {
                    Ok(0) => break Ok(()),
                    Ok(_) => {}
                    Err(error) => break Err(error),
                }
            },
            Self::Download => loop {
                if let Err(error) = stream.write_all(&piece) {
                    break Err(error);
                }
            },
        };
        match result {
            // This is how a guest ends it that does not read all that was sent.
            Err(error) if is_end(error.kind()) => Ok(()),
            result => Ok(result?),
        }
    }
}

fn is_end(kind: ErrorKind) -> bool {
    matches!(kind, ErrorKind::BrokenPipe | ErrorKind::ConnectionReset)
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::thread;
    use std::time::Duration;

    use super::*;

    #[test]
    fn each_transfers_something_and_ends_at_both_ends() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        for transfer in Transfer::ALL {
            let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let (other, _) = listener.accept().unwrap();
            let server = thread::spawn(move || Transfer::serve(other));
            transfer.begin(&stream).unwrap();
            let end = Instant::now() + Duration::from_millis(20);
            assert!(transfer.carry_out(stream, end).unwrap() > 0, "{transfer:?}");
            server.join().unwrap().unwrap();
            assert_eq!(Transfer::parse(transfer.name()), Some(transfer));
        }
    }

    #[test]
    fn what_is_no_order_is_refused() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        stream.write_all(b"x").unwrap();
        assert!(Transfer::serve(listener.accept().unwrap().0).is_err());
    }
}
