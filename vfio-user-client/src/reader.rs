//! The reading side of a socket: from bytes as they come to messages.
//!
//! The reader keeps what it knows of the message that it is in the middle of, so whoever reads may stop after any byte
//! and somebody else can go on. It decides nothing: payloads of replies go to [`Replies`] as they come, commands of the
//! peer are returned one at a time.

use std::os::fd::OwnedFd;

use vfio_user_protocol::{Header, ProtocolError, take};

use crate::socket::Received;

/// Where replies go.
pub(crate) trait Replies {
    /// Takes the next bytes of the payload of the reply with this header.
    fn payload(&mut self, header: &Header, bytes: &[u8]);

    /// Takes the descriptors of the reply with this header, which ends here.
    fn end(&mut self, header: &Header, fds: Fds);
}

/// The descriptors that came with a message.
#[derive(Debug, Default)]
pub(crate) struct Fds {
    /// Those that arrived.
    pub(crate) fds: Vec<OwnedFd>,
    /// Whether others did not.
    pub(crate) lost: bool,
}

/// Turns bytes into messages.
#[derive(Debug)]
pub(crate) struct Reader {
    /// Bytes as received. Those from `parsed` to `filled` have not been looked at.
    input: Box<[u8]>,
    parsed: usize,
    filled: usize,
    /// How many bytes of the stream have been parsed.
    position: u64,
    /// Descriptors that belong to the message that holds the byte before `fds_end` of the stream.
    fds: Fds,
    fds_end: u64,
    /// The header of the next message, as far as it has come.
    head: [u8; Header::SIZE],
    head_len: usize,
    /// The message whose payload comes next, and how much of it is still to come, in bytes.
    message: Option<(Header, usize)>,
    /// The payload of a command, as far as it has come, and as far as it is wanted.
    command: Vec<u8>,
    max_command: usize,
}

impl Reader {
    /// A reader that keeps up to `max_command` bytes of a command's payload and skips the rest.
    pub(crate) fn new(max_command: usize) -> Self {
        Self {
            input: vec![0; INPUT_SIZE].into_boxed_slice(),
            parsed: 0,
            filled: 0,
            position: 0,
            fds: Fds::default(),
            fds_end: 0,
            head: [0; Header::SIZE],
            head_len: 0,
            message: None,
            command: Vec::with_capacity(max_command),
            max_command,
        }
    }

    /// Lets `receive` fill the reader, once all that it had has been parsed, and returns how many bytes came.
    pub(crate) fn fill<E>(
        &mut self,
        receive: impl FnOnce(&mut [u8], &mut Vec<OwnedFd>) -> Result<Received, E>,
    ) -> Result<usize, E> {
        let before = self.fds.fds.len();
        let received = receive(&mut self.input, &mut self.fds.fds)?;
        self.parsed = 0;
        self.filled = received.bytes.min(self.input.len());
        if received.fds_lost || self.fds.fds.len() > before {
            self.fds.lost |= received.fds_lost;
            // The kernel ends a receive with the bytes that descriptors were sent with. They are to be sent with the
            // header of their message, so that message is the one to which the last byte belongs.
            self.fds_end = self.position.saturating_add(self.filled as u64);
        }
        Ok(self.filled)
    }

    /// Parses what there is up to the end of the next command, if one ends there, and returns its header. Its payload
    /// is then in [`command`](Self::command). `None` means that all has been parsed.
    ///
    /// # Errors
    ///
    /// [`ProtocolError`] if what should be a header is none. Nothing after it can be understood.
    pub(crate) fn parse(
        &mut self,
        replies: &mut impl Replies,
    ) -> Result<Option<Header>, ProtocolError> {
        loop {
            let Some((header, missing)) = self.next_message()? else {
                return Ok(None);
            };
            let bytes = self.input.get(self.parsed..self.filled).unwrap_or(&[]);
            let bytes = bytes.get(..missing).unwrap_or(bytes);
            if header.is_reply() {
                replies.payload(&header, bytes);
            } else {
                let room = self.max_command.saturating_sub(self.command.len());
                self.command
                    .extend_from_slice(bytes.get(..room).unwrap_or(bytes));
            }
            let len = bytes.len();
            self.advance(len);
            if len < missing {
                self.message = Some((header, missing - len));
                return Ok(None);
            }
            self.message = None;
            let fds = self.take_fds();
            if !header.is_reply() {
                return Ok(Some(header));
            }
            replies.end(&header, fds);
        }
    }

    /// The payload of the command that [`parse`](Self::parse) returned last. It is shorter than the header says if it
    /// was longer than any that is wanted.
    pub(crate) fn command(&self) -> &[u8] {
        &self.command
    }

    /// The message whose payload comes next and how much of that is missing, once its header is complete.
    fn next_message(&mut self) -> Result<Option<(Header, usize)>, ProtocolError> {
        if self.message.is_some() {
            return Ok(self.message);
        }
        let bytes = self.input.get(self.parsed..self.filled).unwrap_or(&[]);
        let room = self.head.get_mut(self.head_len..).unwrap_or(&mut []);
        let len = room.len().min(bytes.len());
        for (to, from) in room.iter_mut().zip(bytes) {
            *to = *from;
        }
        self.advance(len);
        self.head_len += len;
        if self.head_len < Header::SIZE {
            return Ok(None);
        }
        let (header, _) = take::<Header>(&self.head)?;
        header.check(MAX_MESSAGE)?;
        self.head_len = 0;
        self.command.clear();
        self.message = Some((header, header.payload_size()));
        Ok(self.message)
    }

    fn advance(&mut self, len: usize) {
        self.parsed += len;
        self.position = self.position.saturating_add(len as u64);
    }

    /// The descriptors of the message that ends here.
    fn take_fds(&mut self) -> Fds {
        if self.position < self.fds_end {
            return Fds::default();
        }
        std::mem::take(&mut self.fds)
    }
}

/// Bytes received at once at most. Two messages of the size that we send fit.
const INPUT_SIZE: usize = 64 << 10;

/// Largest size that a message of the server may claim, in bytes: more than the dirty bitmap of a terabyte of memory,
/// the largest answer that anybody asks for. It bounds only what is skipped, as nothing is allocated for it.
pub(crate) const MAX_MESSAGE: usize = 64 << 20;
