//! The way between the two ends of a migration, on which each message can be held up, and which can be cut.

use std::collections::HashSet;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Result, ensure};
use tempfile::TempDir;

/// What a connection is for, as its first message says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Link {
    /// The agreement, the devices, and the platform.
    Control,
    /// Guest memory.
    Memory,
    /// How a migration ended.
    Question,
}

/// What a frame is about; the numbers are those of the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Kind {
    /// What the VM is like.
    Machine = 1,
    /// The destination has made such a machine.
    Ready = 2,
    /// Some of a device's state.
    DeviceData = 5,
    /// The state of the platform.
    State = 6,
    /// The destination has everything.
    Prepared = 7,
    /// Run it.
    Commit = 8,
    /// It runs.
    Committed = 9,
    /// Why it does not go there.
    Refused = 10,
    /// The source knows that it runs.
    Heard = 12,
    /// No more pages come on this connection before the destination has these.
    RoundEnd = 13,
    /// It has.
    RoundTaken = 14,
}

/// Which frame: its number, from 0 on, in its direction of the first connection of its kind, or what it is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Frame {
    /// The nth.
    Number(usize),
    /// The first of this kind.
    Kind(Kind),
}

/// How much of a frame has gone through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// Nothing.
    None,
    /// Its head, and half of what follows.
    Half,
    /// All of it.
    All,
}

/// A moment of a migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Moment {
    /// On what connection.
    pub link: Link,
    /// Whether from the source to the destination.
    pub there: bool,
    /// At what frame.
    pub frame: Frame,
    /// How far into it.
    pub part: Part,
}

impl Moment {
    /// On the control connection, before a frame of this kind goes through.
    pub fn before(kind: Kind) -> Self {
        Self::of(kind, Part::None)
    }

    /// On the control connection, after a frame of this kind has gone through.
    pub fn after(kind: Kind) -> Self {
        Self::of(kind, Part::All)
    }

    fn of(kind: Kind, part: Part) -> Self {
        Self {
            link: Link::Control,
            there: !matches!(kind, Kind::Ready | Kind::Prepared | Kind::Committed),
            frame: Frame::Kind(kind),
            part,
        }
    }
}

/// A way to a destination, for one migration.
#[derive(Debug)]
pub struct Crossing {
    path: PathBuf,
    shared: Arc<Shared>,
    _folder: TempDir,
}

#[derive(Debug)]
struct Shared {
    destination: PathBuf,
    moment: Option<Moment>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// The moment has come.
    has_come: bool,
    /// Whoever is held up may go on.
    released: bool,
    /// Nothing goes through, and nobody gets a connection.
    cut: bool,
    /// All connections, to be cut.
    streams: Vec<UnixStream>,
    /// The kinds of frames that have gone through on control connections.
    passed: HashSet<u32>,
    /// Connections of each kind that have been made.
    links: Vec<Link>,
}

impl Crossing {
    /// A way to where a destination listens. What goes through it is held up at `moment`.
    ///
    /// # Errors
    /// When there is no place for it.
    pub fn to(destination: &Path, moment: Option<Moment>) -> io::Result<Self> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("crossing");
        let listener = UnixListener::bind(&path)?;
        let shared = Arc::new(Shared {
            destination: destination.to_owned(),
            moment,
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        thread::spawn({
            let shared = Arc::downgrade(&shared);
            move || {
                for client in listener.incoming().flatten() {
                    let Some(shared) = shared.upgrade() else {
                        return;
                    };
                    thread::spawn(move || shared.connect(client));
                }
            }
        });
        Ok(Self {
            path,
            shared,
            _folder: folder,
        })
    }

    /// Where a source finds it.
    pub fn url(&self) -> String {
        format!("unix:{}", self.path.display())
    }

    /// Waits until the moment has come, if it does so soon. Whoever is on the way stands still then.
    pub fn wait(&self, patience: Duration) -> bool {
        let waited =
            self.shared
                .changed
                .wait_timeout_while(self.shared.lock(), patience, |state| !state.has_come);
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        state.has_come
    }

    /// Waits until the moment has come.
    ///
    /// # Errors
    /// When it does not.
    pub fn expect(&self, patience: Duration) -> Result<()> {
        ensure!(self.wait(patience), "no {:?}", self.shared.moment);
        Ok(())
    }

    /// Lets whoever stands still go on.
    pub fn release(&self) {
        self.shared.lock().released = true;
        self.shared.changed.notify_all();
    }

    /// Cuts all connections. There are no others until it is mended.
    pub fn cut(&self) {
        let mut state = self.shared.lock();
        state.cut = true;
        state.released = true;
        for stream in state.streams.drain(..) {
            // It may have been closed by whoever has it.
            let _ = stream.shutdown(Shutdown::Both);
        }
        self.shared.changed.notify_all();
    }

    /// Allows for new connections.
    pub fn mend(&self) {
        self.shared.lock().cut = false;
    }

    /// Whether all of a frame of this kind has gone through.
    pub fn has_passed(&self, kind: Kind) -> bool {
        self.shared.lock().passed.contains(&(kind as u32))
    }
}

impl Drop for Crossing {
    fn drop(&mut self) {
        self.cut();
        // The listener's thread notices.
        let _ = UnixStream::connect(&self.path);
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Passes on what a client says, and what is answered.
    fn connect(self: &Arc<Self>, mut client: UnixStream) -> io::Result<()> {
        if self.lock().cut {
            return Ok(());
        }
        let mut server = UnixStream::connect(&self.destination)?;
        let ends = [client.try_clone()?, server.try_clone()?];
        let mut back = (server.try_clone()?, client.try_clone()?);
        let mut hello = [0; 36];
        client.read_exact(&mut hello)?;
        let link = match hello.get(16) {
            Some(0) => Link::Control,
            Some(1) => Link::Memory,
            _ => Link::Question,
        };
        let is_first = {
            let mut state = self.lock();
            if state.cut {
                return Ok(());
            }
            state.streams.extend(ends);
            let is_first = !state.links.contains(&link);
            state.links.push(link);
            is_first
        };
        server.write_all(&hello)?;
        let shared = Arc::clone(self);
        thread::spawn(move || shared.pass(&mut back.0, &mut back.1, link, false, is_first));
        self.pass(&mut client, &mut server, link, true, is_first);
        Ok(())
    }

    fn pass(
        &self,
        from: &mut UnixStream,
        to: &mut UnixStream,
        link: Link,
        there: bool,
        is_first: bool,
    ) {
        let mut number = 0;
        while let Ok(()) = self.pass_frame(from, to, link, there, is_first.then_some(number)) {
            number += 1;
        }
        for end in [from, to] {
            let _ = end.shutdown(Shutdown::Both);
        }
    }

    fn pass_frame(
        &self,
        from: &mut UnixStream,
        to: &mut UnixStream,
        link: Link,
        there: bool,
        number: Option<usize>,
    ) -> io::Result<()> {
        let mut head = [0; 8];
        from.read_exact(&mut head)?;
        let [a, b, c, d, length @ ..] = head;
        let (kind, length) = (
            u32::from_le_bytes([a, b, c, d]),
            u64::from(u32::from_le_bytes(length)),
        );
        let part = self.moment.filter(|moment| {
            let is_it = match moment.frame {
                Frame::Number(wanted) => number == Some(wanted),
                Frame::Kind(wanted) => kind == wanted as u32,
            };
            (moment.link, moment.there) == (link, there) && is_it
        });
        let part = part.map(|moment| moment.part);
        if part == Some(Part::None) {
            self.stand_still();
        }
        to.write_all(&head)?;
        let half = length / 2;
        io::copy(&mut from.take(half), to)?;
        if part == Some(Part::Half) {
            self.stand_still();
        }
        let rest = length - half;
        if io::copy(&mut from.take(rest), to)? < rest {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if link == Link::Control {
            self.lock().passed.insert(kind);
        }
        if part == Some(Part::All) {
            self.stand_still();
        }
        Ok(())
    }

    /// The moment has come.
    fn stand_still(&self) {
        let mut state = self.lock();
        state.has_come = true;
        self.changed.notify_all();
        let waited = self.changed.wait_while(state, |state| !state.released);
        drop(waited);
    }
}
