//! The reading side of a socket: from bytes as they come to messages.
//!
//! The reader keeps what it knows of the message that it is in the middle of, so whoever reads may stop after any byte
//! and somebody else can go on. It decides nothing: payloads of replies go to [`Replies`] as they come, commands of the
//! peer are returned one at a time.

use std::os::fd::OwnedFd;

use vfio_user_protocol::{Header, ProtocolError, take};

use crate::socket::{MAX_FDS, Received};

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

impl Fds {
    /// Adds those that came later, as long as there are no more than a message can have.
    fn append(&mut self, mut later: Self) {
        self.lost |= later.lost;
        if self.fds.len() + later.fds.len() > MAX_FDS {
            self.lost = true;
        } else {
            self.fds.append(&mut later.fds);
        }
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
    new_fds: Fds,
    /// Descriptors of the message that the input began in the middle of.
    fds: Fds,
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
            new_fds: Fds::default(),
            fds: Fds::default(),
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
        let new_fds = std::mem::take(&mut self.new_fds);
        self.fds.append(new_fds);
        let received = receive(&mut self.input, &mut self.new_fds.fds)?;
        self.new_fds.lost = received.fds_lost;
        self.parsed = 0;
        self.filled = received.bytes.min(self.input.len());
        Ok(self.filled)
    }

    /// Whether all that has been received has been parsed.
    pub(crate) fn is_parsed(&self) -> bool {
        self.parsed == self.filled
    }

    /// Whether nothing of a message has been received whose end has not.
    pub(crate) fn is_between_messages(&self) -> bool {
        self.is_parsed() && self.head_len == 0 && self.message.is_none()
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
            self.parsed += len;
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
        self.parsed += len;
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

    /// The descriptors of the message that ends here.
    fn take_fds(&mut self) -> Fds {
        let mut fds = std::mem::take(&mut self.fds);
        if self.is_parsed() {
            fds.append(std::mem::take(&mut self.new_fds));
        }
        fds
    }
}

/// Bytes received at once at most. Two messages of the size that we send fit.
const INPUT_SIZE: usize = 64 << 10;

/// Largest size that a message of the server may claim, in bytes: more than the dirty bitmap of a terabyte of memory,
/// the largest answer that anybody asks for. It bounds only what is skipped, as nothing is allocated for it.
pub(crate) const MAX_MESSAGE: usize = 64 << 20;

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::fs::File;

    use proptest::prelude::*;
    use vfio_user_protocol::{Command, MessageFlags};
    use zerocopy::IntoBytes;

    use super::*;

    const MAX_COMMAND: usize = 100;

    /// A message as it is sent, and as it should arrive: id, whether it is a reply, payload, and descriptors.
    #[derive(Clone, Debug, Default, PartialEq, Eq)]
    struct Message {
        id: u16,
        is_reply: bool,
        payload: Vec<u8>,
        fds: usize,
    }

    impl Message {
        fn bytes(&self) -> Vec<u8> {
            let mut header = Header::command(self.id, Command::RegionRead, self.payload.len());
            if self.is_reply {
                header.flags = MessageFlags::REPLY.bits();
            }
            [header.as_bytes(), &self.payload].concat()
        }
    }

    /// Messages as they arrive.
    #[derive(Default)]
    struct Arrived {
        whole: Vec<Message>,
        payload: Vec<u8>,
    }

    impl Replies for Arrived {
        fn payload(&mut self, _: &Header, bytes: &[u8]) {
            self.payload.extend_from_slice(bytes);
        }

        fn end(&mut self, header: &Header, fds: Fds) {
            self.whole.push(Message {
                id: header.id,
                is_reply: true,
                payload: std::mem::take(&mut self.payload),
                fds: fds.fds.len(),
            });
        }
    }

    /// Lets the reader receive and parse `bytes` with so many descriptors.
    fn feed(reader: &mut Reader, bytes: &[u8], fds: usize, arrived: &mut Arrived) -> bool {
        let filled = reader.fill(|buffer, into| {
            buffer[..bytes.len()].copy_from_slice(bytes);
            into.extend((0..fds).map(|_| OwnedFd::from(File::open("/dev/null").unwrap())));
            Ok::<_, Infallible>(Received {
                bytes: bytes.len(),
                fds_lost: false,
            })
        });
        assert_eq!(filled, Ok(bytes.len()));
        loop {
            match reader.parse(arrived) {
                Ok(None) => return true,
                Ok(Some(command)) => arrived.whole.push(Message {
                    id: command.id,
                    is_reply: false,
                    payload: reader.command().to_vec(),
                    fds: 0,
                }),
                Err(_) => return false,
            }
        }
    }

    fn message() -> impl Strategy<Value = Message> {
        let payload = prop::collection::vec(any::<u8>(), 0..200);
        (any::<u16>(), any::<bool>(), payload, 0usize..3).prop_map(
            |(id, is_reply, payload, fds)| Message {
                id,
                is_reply,
                payload,
                fds,
            },
        )
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn messages_arrive_however_the_stream_is_split(
            messages in prop::collection::vec(message(), 1..20),
            sizes in prop::collection::vec(1usize..300, 1..50),
        ) {
            let bytes: Vec<u8> = messages.iter().flat_map(Message::bytes).collect();
            let mut reader = Reader::new(MAX_COMMAND);
            let mut arrived = Arrived::default();
            let mut rest = &bytes[..];
            for size in sizes.iter().cycle() {
                let (piece, next) = rest.split_at((*size).min(rest.len()));
                prop_assert!(feed(&mut reader, piece, 0, &mut arrived));
                rest = next;
                if rest.is_empty() {
                    break;
                }
            }
            let expected: Vec<_> = messages.into_iter().map(without_fds).collect();
            prop_assert_eq!(arrived.whole, expected);
        }

        /// The kernel ends a receive with the bytes that descriptors came with, and may begin it with earlier ones.
        #[test]
        fn descriptors_arrive_with_the_message_that_they_were_sent_with(
            messages in prop::collection::vec(message(), 1..20),
            joins in prop::collection::vec(any::<bool>(), 20),
            cuts in prop::collection::vec(1usize..400, 20),
        ) {
            let mut reader = Reader::new(MAX_COMMAND);
            let mut arrived = Arrived::default();
            let mut pending = Vec::new();
            for ((message, join), cut) in messages.iter().zip(joins).zip(cuts) {
                let bytes = message.bytes();
                // The first piece, with the descriptors, and perhaps with what came before; then the rest.
                let (first, rest) = bytes.split_at(cut.min(bytes.len()));
                if !join && !pending.is_empty() {
                    prop_assert!(feed(&mut reader, &pending, 0, &mut arrived));
                    pending.clear();
                }
                pending.extend_from_slice(first);
                prop_assert!(feed(&mut reader, &pending, message.fds, &mut arrived));
                pending = rest.to_vec();
            }
            prop_assert!(feed(&mut reader, &pending, 0, &mut arrived));
            let expected: Vec<_> = messages
                .into_iter()
                .map(|message| if message.is_reply { message } else { without_fds(message) })
                .collect();
            prop_assert_eq!(arrived.whole, expected);
        }

        #[test]
        fn any_bytes_are_messages_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..500)) {
            feed(&mut Reader::new(MAX_COMMAND), &bytes, 1, &mut Arrived::default());
        }
    }

    /// A message as it arrives if its descriptors don't; of a command no more is kept than is wanted.
    fn without_fds(mut message: Message) -> Message {
        if !message.is_reply {
            message.payload.truncate(MAX_COMMAND);
        }
        message.fds = 0;
        message
    }

    #[test]
    fn lost_descriptors_are_noted_for_their_message_alone() {
        struct Lost(Vec<bool>);
        impl Replies for Lost {
            fn payload(&mut self, _: &Header, _: &[u8]) {}
            fn end(&mut self, _: &Header, fds: Fds) {
                self.0.push(fds.lost);
            }
        }
        let message = Message {
            is_reply: true,
            ..Message::default()
        };
        let mut reader = Reader::new(MAX_COMMAND);
        let mut lost = Lost(Vec::new());
        for fds_lost in [false, true, false] {
            let bytes = [message.bytes(), message.bytes()].concat();
            let filled = reader.fill(|buffer, _| {
                buffer[..bytes.len()].copy_from_slice(&bytes);
                Ok::<_, Infallible>(Received {
                    bytes: bytes.len(),
                    fds_lost,
                })
            });
            assert_eq!(filled, Ok(32));
            assert!(matches!(reader.parse(&mut lost), Ok(None)));
        }
        assert_eq!(lost.0, [false, false, false, true, false, false]);
    }
}
