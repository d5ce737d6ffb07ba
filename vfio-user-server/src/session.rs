//! One client: its commands, one after the other, and their answers.

mod features;
mod info;
mod memory;
mod regions;
mod version;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::io::Errno;
use vfio_user_protocol::{Command, Header, IrqSet, Limits, take};
use zerocopy::{FromBytes, IntoBytes};

use crate::core::Core;
use crate::device::Device;
use crate::link::{Ended, Link, Next};
use crate::reader::Message;

/// Serves the client at the other end of `link` until it goes.
pub(crate) fn serve<D: Device>(core: &mut Core<D>, link: &Arc<Link>) -> Ended {
    let mut session = Session {
        core,
        link,
        limits: None,
        reply: Reply::default(),
    };
    let ended = loop {
        if let Err(ended) = session.serve_one() {
            break ended;
        }
    };
    session.core.disconnect();
    ended
}

/// A client that is being served.
struct Session<'a, D> {
    core: &'a mut Core<D>,
    link: &'a Arc<Link>,
    /// What was agreed on, once it was.
    limits: Option<Limits>,
    reply: Reply,
}

/// What a command is answered with.
#[derive(Default)]
struct Reply {
    payload: Vec<u8>,
    fds: Vec<Arc<dyn AsFd>>,
}

impl<D: Device> Session<'_, D> {
    /// Waits for a command or an event, and deals with it.
    fn serve_one(&mut self) -> Result<(), Ended> {
        let next = {
            let unmask = self.core.function.unmask_fd();
            let bells = self.core.watched_doorbells();
            let unmask = unmask.iter().map(|event| event.as_fd());
            let events: Vec<_> = bells.chain(unmask).collect();
            self.link.next(&events)?
        };
        // Whatever rang before a command was sent has to be heard before it is served.
        self.core.poll_events();
        match next {
            Next::Event => Ok(()),
            Next::Command(message) => self.serve_command(message),
        }
    }

    fn serve_command(&mut self, mut message: Message) -> Result<(), Ended> {
        self.reply.payload.clear();
        self.reply.payload.shrink_to(KEPT_REPLY);
        self.reply.fds.clear();
        let header = message.header;
        let fds = std::mem::take(&mut message.fds);
        let result = if !message.is_whole() {
            Err(Errno::TOOBIG)
        } else if message.fds_lost {
            Err(Errno::MFILE)
        } else {
            self.perform(&header, &message.payload, fds)
        };
        if let Err(errno) = result {
            log::debug!("command {} is refused: {errno}", header.command);
        }
        self.answer(&header, result)?;
        self.link.recycle(message.payload);
        if header.command == Command::Version as u16 && self.limits.is_none() {
            return Err(Ended::Version);
        }
        Ok(())
    }

    fn answer(&mut self, header: &Header, result: Result<(), Errno>) -> Result<(), Ended> {
        if header.is_posted() {
            return Ok(());
        }
        if let Err(errno) = result {
            let refusal = header.refusal(errno.raw_os_error().unsigned_abs());
            return self.link.reply(&refusal, &[], &[]);
        }
        let fds: Vec<BorrowedFd<'_>> = self.reply.fds.iter().map(|fd| fd.as_fd()).collect();
        let reply = header.reply(self.reply.payload.len());
        self.link.reply(&reply, &self.reply.payload, &fds)
    }

    /// Does what a command asks, and leaves the answer in `reply`.
    fn perform(&mut self, header: &Header, payload: &[u8], fds: Vec<OwnedFd>) -> Result<(), Errno> {
        let command = Command::try_from(header.command).map_err(|_| Errno::INVAL)?;
        let takes_fds = matches!(command, Command::DmaMap | Command::DeviceSetIrqs);
        if !takes_fds && !fds.is_empty() {
            return Err(Errno::INVAL);
        }
        if command == Command::Version {
            return self.version(payload);
        }
        let limits = self.limits.ok_or(Errno::INVAL)?;
        match command {
            Command::DmaMap => self.dma_map(payload, fds, &limits),
            Command::DmaUnmap => self.dma_unmap(payload),
            Command::DeviceGetInfo => self.device_info(payload),
            Command::DeviceGetRegionInfo => self.region_info(payload, &limits),
            Command::DeviceGetRegionIoFds => self.region_io_fds(payload, &limits),
            Command::DeviceGetIrqInfo => self.irq_info(payload),
            Command::DeviceSetIrqs => {
                let (set, data) = parse::<IrqSet>(payload)?;
                self.core.function.set_irqs(&set, data, fds)
            }
            Command::RegionRead => self.region_read(payload),
            Command::RegionWrite => self.region_write(payload),
            Command::RegionWriteMulti => self.region_write_multi(payload),
            Command::DeviceReset => self.core.reset(),
            Command::DeviceFeature => self.feature(payload),
            Command::MigDataRead => self.migration_read(payload),
            Command::MigDataWrite => self.migration_write(payload),
            // These are the device's.
            Command::Version | Command::DmaRead | Command::DmaWrite => Err(Errno::INVAL),
        }
    }
}

impl Reply {
    fn push(&mut self, part: &(impl IntoBytes + zerocopy::Immutable)) {
        self.payload.extend_from_slice(part.as_bytes());
    }
}

/// Splits a payload into the struct at its head and what follows.
fn parse<T: FromBytes>(payload: &[u8]) -> Result<(T, &[u8]), Errno> {
    take(payload).map_err(|_| Errno::INVAL)
}

/// A size as messages hold it.
fn size(size: usize) -> Result<u32, Errno> {
    u32::try_from(size).map_err(|_| Errno::INVAL)
}

/// How much memory a reply leaves behind for the next, in bytes.
const KEPT_REPLY: usize = 64 << 10;
