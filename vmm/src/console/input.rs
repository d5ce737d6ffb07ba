//! What the user types, on its way to the serial port.

use std::collections::VecDeque;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use devices::Serial;
use event_manager::{EventOps, Events, MutEventSubscriber};
use rustix::stdio::stdin;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::escape::Escape;
use super::terminal::Terminal;
use crate::ending::{Ending, Endings};

/// How much input is kept for a guest that does not read.
const QUEUE_MAX: usize = 4096;

/// Input that waits for room in the serial port.
pub(super) struct Queue {
    port: Arc<Serial>,
    bytes: VecDeque<u8>,
}

impl Queue {
    pub(super) fn new(port: Arc<Serial>) -> Self {
        Self {
            port,
            bytes: VecDeque::new(),
        }
    }

    /// How much more it takes.
    pub(super) fn room(&self) -> usize {
        QUEUE_MAX.saturating_sub(self.bytes.len())
    }

    /// Takes a byte, or loses it if there is no room.
    pub(super) fn push(&mut self, byte: u8) {
        if self.room() > 0 {
            self.bytes.push_back(byte);
        }
    }

    /// Gives the guest what it has room for.
    pub(super) fn flush(&mut self) {
        let length = self.port.input_capacity().min(self.bytes.len());
        if length > 0 {
            let bytes: Vec<_> = self.bytes.drain(..length).collect();
            self.port.input(&bytes);
        }
    }
}

/// Standard input.
pub(super) struct Keyboard {
    terminal: Terminal,
    escape: Escape,
    queue: Queue,
    /// Signalled when the guest has read what the port held.
    input_empty: EventFd,
    endings: Arc<Endings>,
    state: State,
}

/// Whether standard input is being watched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Watched,
    /// Not until the queue has room.
    Full,
    /// Not any more.
    Ended,
}

const TYPED: u32 = 0;
const INPUT_EMPTY: u32 = 1;

impl Keyboard {
    pub(super) fn new(
        terminal: Terminal,
        port: Arc<Serial>,
        input_empty: EventFd,
        endings: Arc<Endings>,
    ) -> Self {
        let (escape, queue) = (Escape::default(), Queue::new(port));
        Self {
            terminal,
            escape,
            queue,
            input_empty,
            endings,
            state: State::Full,
        }
    }

    fn watch(&mut self, ops: &mut EventOps<'_>) {
        // A plain file cannot be watched, and is no keyboard.
        let watched = self.terminal.is_readable() && ops.add(Self::typed()).is_ok();
        self.state = if watched {
            State::Watched
        } else {
            State::Ended
        };
    }

    fn unwatch(&mut self, ops: &mut EventOps<'_>, state: State) {
        if let Err(error) = ops.remove(Self::typed()) {
            log::debug!("standard input: {error}");
        }
        self.state = state;
    }

    fn typed() -> Events {
        Events::with_data_raw(stdin().as_raw_fd(), TYPED, EventSet::IN)
    }

    fn read(&mut self, ops: &mut EventOps<'_>) {
        let mut typed = [0; 256];
        // A user must be able to leave a guest that does not read, so what is typed is read in any case.
        let room = if self.terminal.is_raw() {
            typed.len()
        } else {
            self.queue.room()
        };
        let length = room.min(typed.len());
        let typed = match rustix::io::read(stdin(), typed.get_mut(..length).unwrap_or_default()) {
            Ok(0) => return self.unwatch(ops, State::Ended),
            Ok(length) => typed.get(..length).unwrap_or_default(),
            Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => return,
            Err(error) => {
                log::debug!("standard input: {error}");
                return self.unwatch(ops, State::Ended);
            }
        };
        if !self.terminal.is_raw() {
            typed.iter().for_each(|&byte| self.queue.push(byte));
        } else if self.escape.filter(typed, |byte| self.queue.push(byte)) {
            self.endings.report(Ending::Quit);
        }
    }
}

impl MutEventSubscriber for Keyboard {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        self.watch(ops);
        let events = Events::with_data(&self.input_empty, INPUT_EMPTY, EventSet::IN);
        if let Err(error) = ops.add(events) {
            log::error!("serial port: no input: {error}");
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        match events.data() {
            TYPED => self.read(ops),
            _ => {
                let _ = self.input_empty.read();
            }
        }
        self.queue.flush();
        let full = self.queue.room() == 0 && !self.terminal.is_raw();
        match self.state {
            State::Watched if full => self.unwatch(ops, State::Full),
            State::Full if !full => self.watch(ops),
            _ => {}
        }
    }
}
