//! A connection over which one end sends what the other knows before, to see whether it arrives undamaged.
//!
//! Whoever connects says what is going to be sent, and by whom: [`Order`].

use std::io::{Read, Write};
use std::net::TcpStream;

use anyhow::{Context, Result, bail, ensure};

use crate::ledger::Chance;

/// The port that the test listens at.
pub const PORT: u16 = 4321;

/// What is going to be sent.
#[derive(Clone, Copy, Debug)]
pub struct Order {
    /// What it follows from.
    pub seed: u64,
    /// How many bytes.
    pub length: u64,
    /// Whether whoever connects sends it.
    pub is_upload: bool,
}

/// What the end that received says when all of it is what it should be.
const GOOD: u8 = 0x2a;

impl Order {
    /// Carries the order out, as the one who has connected.
    ///
    /// # Errors
    /// When the connection fails, or something else arrives than was sent.
    pub fn carry_out(&self, mut stream: TcpStream) -> Result<()> {
        for number in [self.seed, self.length, self.is_upload.into()] {
            stream.write_all(&number.to_le_bytes())?;
        }
        self.act(stream, self.is_upload)
    }

    /// Carries out what the one who has connected orders.
    ///
    /// # Errors
    /// When the connection fails, or something else arrives than was sent.
    pub fn serve(mut stream: TcpStream) -> Result<()> {
        let mut number = || -> Result<u64> {
            let mut bytes = [0; 8];
            stream.read_exact(&mut bytes)?;
            Ok(u64::from_le_bytes(bytes))
        };
        let order = Self {
            seed: number()?,
            length: number()?,
            is_upload: number()? != 0,
        };
        order.act(stream, !order.is_upload)
    }

    fn act(&self, mut stream: TcpStream, sends: bool) -> Result<()> {
        let mut chance = Chance::new(self.seed);
        let mut left = self.length;
        let mut expected = [0; PIECE];
        let mut piece = [0; PIECE];
        while left > 0 {
            fill(&mut expected, &mut chance);
            let count = left.min(PIECE as u64);
            let expected = expected.get(..usize::try_from(count)?).context("a piece")?;
            if sends {
                stream.write_all(expected)?;
            } else {
                let piece = piece.get_mut(..expected.len()).context("a piece")?;
                stream.read_exact(piece)?;
                self.compare(piece, expected, self.length - left)?;
            }
            left -= count;
        }
        if !sends {
            return Ok(stream.write_all(&[GOOD])?);
        }
        let mut answer = [0];
        stream.read_exact(&mut answer).context("no answer")?;
        ensure!(answer == [GOOD], "the answer is {answer:?}");
        Ok(())
    }

    fn compare(&self, received: &[u8], expected: &[u8], at: u64) -> Result<()> {
        let differs = |index: &usize| received.get(*index) != expected.get(*index);
        let mut wrong = (0..expected.len()).filter(differs);
        let Some(first) = wrong.next() else {
            return Ok(());
        };
        let (last, count) = (
            wrong.clone().next_back().unwrap_or(first),
            wrong.count() + 1,
        );
        bail!(
            "of {self:?}, {count} bytes are wrong between {} and {}: {:02x?}… for {:02x?}…",
            at + first as u64,
            at + last as u64,
            received.iter().skip(first).take(16).collect::<Vec<_>>(),
            expected.iter().skip(first).take(16).collect::<Vec<_>>(),
        );
    }
}

/// How much is compared at a time, in bytes.
const PIECE: usize = 1 << 15;

fn fill(piece: &mut [u8], chance: &mut Chance) {
    for word in piece.chunks_exact_mut(8) {
        word.copy_from_slice(&chance.next().to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::thread;

    use super::*;

    #[test]
    fn what_is_sent_is_compared() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        for is_upload in [true, false] {
            let connect = || {
                let ours = TcpStream::connect(address).unwrap();
                (ours, listener.accept().unwrap().0)
            };
            let order = Order {
                seed: 3,
                length: 100_001,
                is_upload,
            };
            let (ours, theirs) = connect();
            let served = thread::spawn(|| Order::serve(theirs));
            order.carry_out(ours).unwrap();
            served.join().unwrap().unwrap();
            // One that sends something else.
            let (ours, theirs) = connect();
            let liar = Order { seed: 4, ..order };
            let served = thread::spawn(move || liar.act(theirs, !is_upload));
            let result = order.act(ours, is_upload);
            let served = served.join().unwrap();
            let error = if is_upload { served } else { result }.unwrap_err();
            assert!(
                error
                    .to_string()
                    .contains("bytes are wrong between 0 and 32767"),
                "{error}"
            );
        }
    }
}
