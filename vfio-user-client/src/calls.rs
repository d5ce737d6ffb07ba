//! The table of commands that the server has not answered.

use std::os::fd::OwnedFd;

use vfio_user_protocol::{Command, Header};

use crate::reader::{Fds, Replies};

/// Largest number of commands that can be on their way: as many as a `u64` has bits.
pub(crate) const MAX_CALLS: usize = ID_STEP as usize;

/// What the ids of two successive commands in one place differ by.
const ID_STEP: u16 = 64;

/// The commands that are on their way, and their replies until these are fetched.
///
/// A command that nobody waits for any more keeps its place: its reply may still come, and must not be taken for that
/// of another. The place is free again when the reply comes, or the reply to a later command does, since servers work
/// in order and this one will not be answered.
#[derive(Debug)]
pub(crate) struct Calls {
    slots: Vec<Slot>,
    /// A bit for each slot that is free.
    free: u64,
    /// A bit for each slot whose caller sleeps and has no reply.
    asleep: u64,
    /// A bit for each slot whose caller slept when the reply came, and has to be woken.
    wake: u64,
    /// How many commands may be on their way.
    limit: usize,
    /// How many are.
    outstanding: usize,
    /// How many of these nobody waits for.
    abandoned: usize,
    /// How many have been answered, so that their callers are about to fetch the reply.
    answered: usize,
    /// Number of the next command, by which one is later than another.
    sequence: u64,
    /// Buffers for payloads, to be used again.
    spare: Vec<Vec<u8>>,
    /// Replies that belong to no command.
    strays: u64,
}

/// A command that is on its way. Whoever holds it has to [`Calls::fetch`] the reply or to [`Calls::abandon`] it.
#[derive(Debug)]
pub(crate) struct Ticket {
    slot: usize,
    /// The message id.
    pub(crate) id: u16,
}

impl Ticket {
    /// Which of the [`MAX_CALLS`] places the command has.
    pub(crate) fn slot(&self) -> usize {
        self.slot
    }
}

/// How a command ended.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// With a payload and descriptors.
    Payload(Vec<u8>, Vec<OwnedFd>),
    /// With an errno.
    Refused(u32),
    /// With more payload than was wanted.
    TooLong,
    /// With more descriptors than were wanted, or with some lost.
    Descriptors,
}

/// What a reply may have.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Expected {
    /// Most bytes of payload.
    pub(crate) payload: usize,
    /// Most descriptors.
    pub(crate) fds: usize,
}

impl Calls {
    /// A table for at most `limit` commands at a time, which is made to lie between 1 and [`MAX_CALLS`].
    pub(crate) fn new(limit: usize) -> Self {
        Self {
            slots: (0..ID_STEP).map(Slot::new).collect(),
            free: u64::MAX,
            asleep: 0,
            wake: 0,
            limit: limit.clamp(1, MAX_CALLS),
            outstanding: 0,
            abandoned: 0,
            answered: 0,
            sequence: 0,
            spare: Vec::with_capacity(MAX_CALLS),
            strays: 0,
        }
    }

    /// Allows only `limit` commands at a time from now on.
    pub(crate) fn set_limit(&mut self, limit: usize) {
        self.limit = limit.clamp(1, MAX_CALLS);
    }

    /// The highest message id that a command has had so far, as far as that matters: the number of the slot is left out.
    pub(crate) fn last_id(&self) -> u16 {
        let ids = self.slots.iter().map(|slot| slot.id & !(ID_STEP - 1));
        ids.max().unwrap_or_default()
    }

    /// Goes on with higher message ids than this.
    pub(crate) fn go_on_after(&mut self, id: u16) {
        for (slot, number) in self.slots.iter_mut().zip(0..ID_STEP) {
            slot.id = id & !(ID_STEP - 1) | number;
        }
    }

    /// Whether one more command may be sent.
    pub(crate) fn has_room(&self) -> bool {
        self.outstanding < self.limit
    }

    /// How many commands are on their way.
    pub(crate) fn outstanding(&self) -> usize {
        self.outstanding
    }

    /// How many replies belonged to no command.
    pub(crate) fn strays(&self) -> u64 {
        self.strays
    }

    /// Gives a place to a command. `None` if there [is no room](Self::has_room).
    pub(crate) fn open(&mut self, command: Command, expected: Expected) -> Option<Ticket> {
        if !self.has_room() {
            return None;
        }
        let number = self.free.trailing_zeros() as usize;
        let slot = self.slots.get_mut(number)?;
        self.free &= !bit(number);
        slot.id = next_id(slot.id);
        slot.command = command as u16;
        slot.sequence = self.sequence;
        slot.expected = expected;
        slot.state = SlotState::Waiting;
        slot.too_long = false;
        slot.payload = self.spare.pop().unwrap_or_default();
        self.sequence += 1;
        self.outstanding += 1;
        Some(Ticket {
            slot: number,
            id: slot.id,
        })
    }

    /// Fetches the reply, if it has come, and ends the call.
    pub(crate) fn fetch(&mut self, ticket: &Ticket) -> Option<Outcome> {
        let slot = self.slots.get_mut(ticket.slot)?;
        let SlotState::Done(end) = slot.state else {
            return None;
        };
        let payload = std::mem::take(&mut slot.payload);
        let fds = std::mem::take(&mut slot.fds);
        self.answered -= 1;
        self.free(ticket.slot);
        if end == End::Payload {
            return Some(Outcome::Payload(payload, fds));
        }
        self.recycle(payload);
        Some(match end {
            End::Payload | End::TooLong => Outcome::TooLong,
            End::Refused(errno) => Outcome::Refused(errno),
            End::Descriptors => Outcome::Descriptors,
        })
    }

    /// Ends the call without a reply. If the command `was_sent`, the reply may still come, and is dropped then.
    pub(crate) fn abandon(&mut self, ticket: &Ticket, was_sent: bool) {
        // A server can answer before it has the command.
        if self.fetch(ticket).is_some() {
            return;
        }
        let Some(slot) = self.slots.get_mut(ticket.slot) else {
            return;
        };
        let payload = std::mem::take(&mut slot.payload);
        if was_sent {
            slot.state = SlotState::Abandoned;
            self.abandoned += 1;
        } else {
            self.outstanding -= 1;
            self.free(ticket.slot);
        }
        self.recycle(payload);
    }

    /// Whether some caller is about to fetch its reply.
    pub(crate) fn has_answered(&self) -> bool {
        self.answered > 0
    }

    /// Takes back the buffer of a payload.
    pub(crate) fn recycle(&mut self, mut payload: Vec<u8>) {
        if (1..=LARGEST_SPARE).contains(&payload.capacity()) && self.spare.len() < MAX_CALLS {
            payload.clear();
            self.spare.push(payload);
        }
    }

    /// Notes that the caller of a command sleeps, or does so no more.
    pub(crate) fn set_asleep(&mut self, slot: usize, asleep: bool) {
        if asleep {
            self.asleep |= bit(slot);
        } else {
            self.asleep &= !bit(slot);
        }
    }

    /// The slots, a bit for each, whose callers sleep and have no reply.
    pub(crate) fn asleep(&self) -> u64 {
        self.asleep
    }

    /// The slots, a bit for each, whose callers have to be woken because their reply has come.
    pub(crate) fn take_wake(&mut self) -> u64 {
        std::mem::take(&mut self.wake)
    }

    /// The slot whose command a reply with this header answers, if there is one.
    fn find(&mut self, header: &Header) -> Option<&mut Slot> {
        self.slots
            .get_mut(slot_of(header))
            .filter(|slot| slot.id == header.id && slot.command == header.command)
            .filter(|slot| matches!(slot.state, SlotState::Waiting | SlotState::Abandoned))
    }

    fn free(&mut self, slot: usize) {
        if let Some(slot) = self.slots.get_mut(slot) {
            slot.state = SlotState::Free;
        }
        self.free |= bit(slot);
    }

    /// Frees the places of abandoned commands that are older than the one with this number.
    fn retire(&mut self, sequence: u64) {
        for number in 0..MAX_CALLS {
            let old = self
                .slots
                .get(number)
                .is_some_and(|slot| slot.state == SlotState::Abandoned && slot.sequence < sequence);
            if old {
                self.free(number);
                self.abandoned -= 1;
                self.outstanding -= 1;
            }
        }
    }
}

impl Replies for Calls {
    fn payload(&mut self, header: &Header, bytes: &[u8]) {
        if let Some(slot) = self.find(header)
            && slot.state == SlotState::Waiting
        {
            let room = slot.expected.payload - slot.payload.len();
            slot.too_long |= bytes.len() > room;
            slot.payload
                .extend_from_slice(bytes.get(..room).unwrap_or(bytes));
        }
    }

    fn end(&mut self, header: &Header, fds: Fds) {
        let Some(slot) = self.find(header) else {
            self.strays += 1;
            return;
        };
        let sequence = slot.sequence;
        let number = slot_of(header);
        if slot.state == SlotState::Abandoned {
            self.free(number);
            self.abandoned -= 1;
            self.strays += 1;
        } else {
            slot.state = SlotState::Done(slot.end(header, &fds));
            slot.fds = fds.fds;
            self.answered += 1;
            self.wake |= self.asleep & bit(number);
            self.asleep &= !bit(number);
        }
        self.outstanding -= 1;
        if self.abandoned > 0 {
            self.retire(sequence);
        }
    }
}

#[derive(Debug)]
struct Slot {
    state: SlotState,
    /// The command's message id. Its low bits are the number of the slot; the others count the slot's uses.
    id: u16,
    command: u16,
    sequence: u64,
    expected: Expected,
    /// The reply's payload as far as it has come.
    payload: Vec<u8>,
    too_long: bool,
    fds: Vec<OwnedFd>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum SlotState {
    Free,
    Waiting,
    Abandoned,
    Done(End),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Payload,
    Refused(u32),
    TooLong,
    Descriptors,
}

impl Slot {
    fn new(number: u16) -> Self {
        Self {
            state: SlotState::Free,
            id: number,
            command: 0,
            sequence: 0,
            expected: Expected { payload: 0, fds: 0 },
            payload: Vec::new(),
            too_long: false,
            fds: Vec::new(),
        }
    }

    /// How the command ends with this reply.
    fn end(&self, header: &Header, fds: &Fds) -> End {
        if header.is_error() {
            End::Refused(header.error)
        } else if self.too_long {
            End::TooLong
        } else if fds.lost || fds.fds.len() > self.expected.fds {
            End::Descriptors
        } else {
            End::Payload
        }
    }
}

/// The id of the next command in a slot whose last had the id `id`: the slot's number stays, the count of uses goes up
/// and is never 0, so that no command has the id 0 that some servers put into replies to nothing.
fn next_id(id: u16) -> u16 {
    let next = id.wrapping_add(ID_STEP);
    if next < ID_STEP { next + ID_STEP } else { next }
}

/// The number of the slot that a reply with this header can belong to.
fn slot_of(header: &Header) -> usize {
    usize::from(header.id % ID_STEP)
}

fn bit(slot: usize) -> u64 {
    1 << slot
}

/// Largest buffer that is kept to be used again, in bytes: what any answer but a dirty bitmap needs.
const LARGEST_SPARE: usize = 64 << 10;
