//! Handing a connection to another process of this host, without a word to the server.
//!
//! The process that has it [describes](Client::describe) its end while it is still used, and the other one makes a client
//! of that, which does nothing yet ([`Client::inherit`]). Then the first one [leaves it](Client::hand_over), and says where;
//! the other one [goes on from there](Client::take_over), when it knows that it is to ([`Client::go_on`]). Until then, the
//! first one can go on instead. Whoever of the two does not just drops its client, which the server does not notice.
//!
//! What is handed over can be written down; descriptors are numbers in a [list](Descriptors) that goes with it. The other
//! process believes none of it.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::net::SocketType;
use rustix::net::sockopt::socket_type;
use serde::{Deserialize, Serialize};
use vfio_user_protocol::Limits;

use crate::client::Client;
use crate::connection::{Connection, LeftAt};
use crate::dma::{DmaService, GuestDma};
use crate::error::ConnError;
use crate::maps::DmaAccess;
use crate::options::Options;
use crate::setup::{Map, Setup};
use crate::twin::Twin;

/// The descriptors that go with something that is handed over. A descriptor that is in it several times goes once.
#[derive(Clone, Debug, Default)]
pub struct Descriptors {
    list: Vec<Arc<OwnedFd>>,
    /// The numbers, by what the descriptors are in this process.
    numbers: BTreeMap<RawFd, u32>,
}

impl Descriptors {
    /// Adds a descriptor, and returns its number.
    pub fn add(&mut self, descriptor: &Arc<OwnedFd>) -> u32 {
        let Self { list, numbers } = self;
        *numbers.entry(descriptor.as_raw_fd()).or_insert_with(|| {
            list.push(Arc::clone(descriptor));
            u32::try_from(list.len() - 1).unwrap_or(u32::MAX)
        })
    }

    /// The descriptor with a number.
    pub fn find(&self, number: u32) -> Option<&Arc<OwnedFd>> {
        self.list.get(usize::try_from(number).ok()?)
    }

    /// All of them, in the order of their numbers.
    pub fn iter(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.list.iter().map(|descriptor| descriptor.as_fd())
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.list.len()
    }
}

impl From<Vec<OwnedFd>> for Descriptors {
    fn from(descriptors: Vec<OwnedFd>) -> Self {
        let mut all = Self::default();
        for descriptor in descriptors {
            all.add(&Arc::new(descriptor));
        }
        all
    }
}

/// The end of a connection: its sockets, and what has been agreed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Connected {
    limits: Limits,
    socket: u32,
    twin: Option<u32>,
}

/// Where a connection was left: what its server keeps, and what the next command has to be like.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Standing {
    left_at: LeftAt,
    maps: Vec<HandedMap>,
    events: Vec<HandedEvent>,
    unmask_events: Vec<HandedEvent>,
}

/// Memory that the device has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct HandedMap {
    iova: u64,
    size: u64,
    /// The file and the offset in it, in bytes.
    file: Option<(u32, u64)>,
    writable: bool,
}

/// An interrupt's event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct HandedEvent {
    /// The kind of interrupt.
    index: u32,
    irq: u32,
    event: u32,
}

impl Client {
    /// Describes this end for another process, and adds its sockets to the `descriptors`.
    ///
    /// # Errors
    ///
    /// [`ConnError::System`] if this process can have no more descriptors.
    pub fn describe(&self, descriptors: &mut Descriptors) -> Result<Connected, ConnError> {
        let mut add = |socket: BorrowedFd<'_>| {
            let socket = socket.try_clone_to_owned().map_err(ConnError::System)?;
            Ok::<_, ConnError>(descriptors.add(&Arc::new(socket)))
        };
        let twin = self.twin.as_ref().map(|twin| add(twin.socket().as_fd()));
        Ok(Connected {
            limits: self.limits,
            socket: add(self.connection.socket())?,
            twin: twin.transpose()?,
        })
    }

    /// Leaves the connection to another process: waits, for `limit` at most, until nothing is on its way in either
    /// direction, and touches the sockets no more. Every call then fails with [`ConnError::Away`], until
    /// [`go_on`](Self::go_on). If it is dropped, that ends nothing but this process' part.
    ///
    /// # Errors
    ///
    /// [`ConnError::Restless`] if something does not end, [`ConnError::Lost`], and those of whoever is not ready for
    /// calls: [`ConnError::Draining`], [`ConnError::Away`]. The connection then goes on.
    pub fn hand_over(
        &self,
        limit: Duration,
        descriptors: &mut Descriptors,
    ) -> Result<Standing, ConnError> {
        let left_at = self.connection.hand_over(self.twin.as_ref(), limit)?;
        let setup = self.lock_setup();
        let mut maps = Vec::with_capacity(setup.maps.len());
        for (&iova, Map { size, file, access }) in &setup.maps {
            maps.push(HandedMap {
                iova,
                size: *size,
                file: file
                    .as_ref()
                    .map(|(file, offset)| (descriptors.add(file), *offset)),
                writable: *access == DmaAccess::ReadWrite,
            });
        }
        let mut event = |(&(index, irq), event): (&(u32, u32), &Arc<OwnedFd>)| HandedEvent {
            index,
            irq,
            event: descriptors.add(event),
        };
        Ok(Standing {
            left_at,
            maps,
            events: setup.events.iter().map(&mut event).collect(),
            unmask_events: setup.unmask_events.iter().map(&mut event).collect(),
        })
    }

    /// Makes a client of what another process has [described](Self::describe) and may hand over. It does nothing, and
    /// takes no calls, until it has [taken over](Self::take_over) and [goes on](Self::go_on); if it is dropped before,
    /// that changes nothing for the other process.
    ///
    /// # Errors
    ///
    /// [`ConnError::Handed`] if that is no connection, [`ConnError::System`] if there is no descriptor or memory for it.
    pub fn inherit(
        connected: &Connected,
        descriptors: &Descriptors,
        dma: Arc<dyn GuestDma>,
        options: &Options,
    ) -> Result<Self, ConnError> {
        let limits = connected.limits;
        if !limits.are_possible() || limits.twin_socket.is_some() != connected.twin.is_some() {
            return Err(ConnError::Handed("nobody can agree on such limits"));
        }
        let socket = |number| socket(descriptors, number);
        let service = DmaService::new(dma);
        let connection =
            Connection::new(socket(connected.socket)?, service, options.max_outstanding);
        let twin = connected.twin.map(|twin| {
            let twin = Twin::new(socket(twin)?);
            twin.map_err(ConnError::System)
        });
        let twin = twin.transpose()?;
        let connection = connection.map_err(ConnError::System)?;
        connection.stay_away(twin.as_ref());
        Ok(Self {
            connection: Arc::new(connection),
            twin,
            limits,
            deadlines: options.deadlines.clone(),
            setup: Mutex::default(),
        })
    }

    /// Learns where the connection was left that is to [go on](Self::go_on) here.
    ///
    /// # Errors
    ///
    /// [`ConnError::Handed`] if that makes no sense.
    pub fn take_over(
        &self,
        standing: &Standing,
        descriptors: &Descriptors,
    ) -> Result<(), ConnError> {
        let setup = standing.setup(descriptors)?;
        if setup.maps() > self.limits.max_dma_maps {
            return Err(ConnError::Handed("its server takes fewer mappings"));
        }
        *self.lock_setup() = setup;
        self.connection.take_over(&standing.left_at);
        Ok(())
    }

    /// Takes calls, and serves what the server has sent or will send: it is this process that has the connection, now or
    /// again.
    ///
    /// # Errors
    ///
    /// [`ConnError::Lost`], and [`ConnError::System`] if there is no thread for the connection, which is lost then.
    pub fn go_on(&self) -> Result<(), ConnError> {
        self.connection.go_on(self.twin.as_ref())
    }
}

impl Standing {
    /// What the server keeps, if it can be.
    fn setup(&self, descriptors: &Descriptors) -> Result<Setup, ConnError> {
        let find = |number| {
            let found = descriptors.find(number).map(Arc::clone);
            found.ok_or(ConnError::Handed("a descriptor is missing"))
        };
        let mut setup = Setup::default();
        let mut free = Some(0);
        for &HandedMap {
            iova,
            size,
            file,
            writable,
        } in &self.maps
        {
            if size == 0 || free.is_none_or(|free| iova < free) {
                return Err(ConnError::Handed("its mappings overlap"));
            }
            // The last one may end with the address space.
            if iova.checked_add(size - 1).is_none() {
                return Err(ConnError::Handed("a mapping has no end"));
            }
            free = iova.checked_add(size);
            let file = file.map(|(file, offset)| Ok::<_, ConnError>((find(file)?, offset)));
            let access = match writable {
                true => DmaAccess::ReadWrite,
                false => DmaAccess::ReadOnly,
            };
            let file = file.transpose()?;
            setup.add_map(iova, Map { size, file, access });
        }
        for (list, events) in [
            (&self.events, &mut setup.events),
            (&self.unmask_events, &mut setup.unmask_events),
        ] {
            for &HandedEvent { index, irq, event } in list {
                if events.insert((index, irq), find(event)?).is_some() {
                    return Err(ConnError::Handed("an interrupt has two events"));
                }
            }
        }
        Ok(setup)
    }
}

/// The connected Unix socket with a number, as a descriptor of its own.
fn socket(descriptors: &Descriptors, number: u32) -> Result<OwnedFd, ConnError> {
    let no_socket = ConnError::Handed("what should be its socket is none");
    let Some(found) = descriptors.find(number) else {
        return Err(no_socket);
    };
    let socket = UnixStream::from(found.try_clone().map_err(ConnError::System)?);
    let is_stream = socket_type(&socket) == Ok(SocketType::STREAM);
    // It has one, of this family, only if it is connected.
    let has_peer: io::Result<_> = socket.peer_addr();
    if is_stream && has_peer.is_ok() {
        Ok(socket.into())
    } else {
        Err(no_socket)
    }
}
