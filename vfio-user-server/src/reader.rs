//! The reading side of a socket: from bytes as they come to whole messages.
//!
//! The reader keeps what it knows of the message that it is in the middle of, so whoever reads may stop after any byte
//! and another thread can go on.

use std::os::fd::OwnedFd;

use vfio_user_protocol::{Header, ProtocolError, take};

use crate::socket::{MAX_FDS, Received};

/// Largest access that is offered, in bytes. The client's own limit is for what it is sent unasked: libvfio-user's reads
/// and writes more at once than it says that the device may.
pub(crate) const MAX_DATA: usize = 1 << 20;

/// Most bytes of a message's payload that are kept: the largest access that is offered, its head, and the head of a
/// list. What is longer is skipped, and [`Message::is_whole`] says so.
pub(crate) const MAX_PAYLOAD: usize = MAX_DATA + 64;

/// A message as it was received.
#[derive(Debug)]
pub(crate) struct Message {
    pub(crate) header: Header,
    pub(crate) payload: Vec<u8>,
    pub(crate) fds: Vec<OwnedFd>,
    /// Whether some of its descriptors did not arrive.
    pub(crate) fds_lost: bool,
}

impl Message {
    /// Whether all of the payload was kept.
    pub(crate) fn is_whole(&self) -> bool {
        self.payload.len() == self.header.payload_size()
    }
}

/// Turns bytes into messages.
#[derive(Debug)]
pub(crate) struct Reader {
    /// Bytes as received. Those from `parsed` to `filled` have not been looked at.
    input: Box<[u8]>,
    parsed: usize,
    filled: usize,
    /// Descriptors that came with the input. They belong to the message that its last byte is of: the kernel ends a
    /// receive with the bytes that descriptors were sent with, and those are to be sent with their message's header.
    new_fds: Vec<OwnedFd>,
    new_fds_lost: bool,
    /// Descriptors of the message that the input began in the middle of.
    fds: Vec<OwnedFd>,
    fds_lost: bool,
    /// The header of the next message, as far as it has come.
    head: [u8; Header::SIZE],
    head_len: usize,
    /// The message whose payload comes next, and how much of it is still to come, in bytes.
    message: Option<(Header, usize)>,
    /// The payload, as far as it has come, and as far as it is kept.
    payload: Vec<u8>,
}

impl Reader {
    pub(crate) fn new() -> Self {
        Self {
            input: vec![0; INPUT_SIZE].into_boxed_slice(),
            parsed: 0,
            filled: 0,
            new_fds: Vec::new(),
            new_fds_lost: false,
            fds: Vec::new(),
            fds_lost: false,
            head: [0; Header::SIZE],
            head_len: 0,
            message: None,
            payload: Vec::new(),
        }
    }

    /// Lets `receive` fill the reader, once all that it had has been parsed, and returns how many bytes came.
    pub(crate) fn fill<E>(
        &mut self,
        receive: impl FnOnce(&mut [u8], &mut Vec<OwnedFd>) -> Result<Received, E>,
    ) -> Result<usize, E> {
        self.keep_new_fds();
        let received = receive(&mut self.input, &mut self.new_fds)?;
        self.new_fds_lost = received.fds_lost;
        self.parsed = 0;
        self.filled = received.bytes.min(self.input.len());
        Ok(self.filled)
    }

    /// Parses what there is up to the end of the next message, if one ends there. `None` means that all has been
    /// parsed.
    ///
    /// # Errors
    ///
    /// [`ProtocolError`] if what should be a header is none. Nothing after it can be understood.
    pub(crate) fn parse(&mut self) -> Result<Option<Message>, ProtocolError> {
        let Some((header, missing)) = self.next_message()? else {
            return Ok(None);
        };
        let bytes = self.input.get(self.parsed..self.filled).unwrap_or(&[]);
        let bytes = bytes.get(..missing).unwrap_or(bytes);
        let room = MAX_PAYLOAD.saturating_sub(self.payload.len());
        self.payload
            .extend_from_slice(bytes.get(..room).unwrap_or(bytes));
        let len = bytes.len();
        self.parsed += len;
        if len < missing {
            self.message = Some((header, missing - len));
            return Ok(None);
        }
        self.message = None;
        if self.parsed == self.filled {
            self.keep_new_fds();
        }
        Ok(Some(Message {
            header,
            payload: std::mem::take(&mut self.payload),
            fds: std::mem::take(&mut self.fds),
            fds_lost: std::mem::take(&mut self.fds_lost),
        }))
    }

    /// Takes back the payload of a message that has been dealt with, so that its memory serves again.
    pub(crate) fn recycle(&mut self, mut payload: Vec<u8>) {
        payload.clear();
        payload.shrink_to(INPUT_SIZE);
        if self.payload.capacity() == 0 {
            self.payload = payload;
        }
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
        self.parsed += len;
        self.head_len += len;
        if self.head_len < Header::SIZE {
            return Ok(None);
        }
        let (header, _) = take::<Header>(&self.head)?;
        // Whatever the size, the message can be skipped.
        header.check(usize::MAX)?;
        self.head_len = 0;
        self.message = Some((header, header.payload_size()));
        Ok(self.message)
    }

    /// Counts the descriptors that came last to the message that the next bytes are of, if they are not too many.
    fn keep_new_fds(&mut self) {
        self.fds_lost |= std::mem::take(&mut self.new_fds_lost);
        if self.fds.len() + self.new_fds.len() > MAX_FDS {
            self.new_fds.clear();
            self.fds_lost = true;
        }
        self.fds.append(&mut self.new_fds);
    }
}

/// Bytes received at once at most.
const INPUT_SIZE: usize = 64 << 10;
