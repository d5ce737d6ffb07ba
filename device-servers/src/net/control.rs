//! The control queue, the tap's link, and announcements: all that is no packet, in one thread.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use virtio_bindings::bindings::virtio_net::{
    VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK, VIRTIO_NET_CTRL_GUEST_OFFLOADS,
    VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET, VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_ADDR_SET,
    VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_ERR, VIRTIO_NET_OK,
};

use super::announce;
use super::config::{ANNOUNCE, CONTROL_MAC, CONTROL_OFFLOADS, GUEST_OFFLOADS};
use super::device::Shared;
use super::link::LinkWatch;
use super::mac::MacAddress;
use crate::virtio::guest::{self, Guest, Segment};
use crate::virtio::{Activation, Chain, ConfigSignal, Service, Stop, VirtQueue};

/// Serves the control queue, if the driver has one, and does what is to be done while it runs.
#[derive(Debug)]
pub(super) struct Control {
    shared: Arc<Shared>,
    link: Option<LinkWatch>,
    /// When the next announcement is due.
    due: Option<Instant>,
}

/// Bytes of a command before what it is about: its class and its number (virtio 1.2, 5.1.6.5).
const HEADER: usize = 2;

/// Most bytes of the commands that there are: 64 bits of offloads.
const LONGEST: usize = HEADER + 8;

/// Most commands before it is looked at something else.
const BATCH: usize = 64;

impl Control {
    pub(super) fn new(shared: Arc<Shared>, link: Option<LinkWatch>) -> Self {
        Self {
            shared,
            link,
            due: None,
        }
    }

    /// Does all that there is to do, and returns whether there may be more.
    fn step(
        &mut self,
        queue: Option<&mut VirtQueue>,
        features: u64,
        config: &ConfigSignal,
    ) -> bool {
        let is_up = self.link.as_ref().and_then(LinkWatch::read);
        if is_up.is_some_and(|is_up| self.shared.set_link(is_up)) {
            config.changed();
        }
        self.announce();
        queue.is_some_and(|queue| self.serve_queue(queue, features))
    }

    fn serve_queue(&self, queue: &mut VirtQueue, features: u64) -> bool {
        queue.doorbell().has_rung();
        let guest = queue.guest();
        queue.disable_notifications(&guest.view);
        let mut is_empty = false;
        for _ in 0..BATCH {
            let Some(chain) = queue.pop(&guest.view) else {
                is_empty = true;
                break;
            };
            let head = chain.head_index();
            let written = self.answer(&chain, &guest, features);
            queue.push(&guest.view, head, written);
        }
        queue.interrupt(&guest.view);
        !is_empty || queue.enable_notifications(&guest.view)
    }

    /// Does what a command says, and answers it. Returns how many bytes were written.
    fn answer(&self, chain: &Chain<'_>, guest: &Guest, features: u64) -> u32 {
        let answer = guest::segments(chain.clone(), true);
        let Some(Segment { address, .. }) = answer.first().copied() else {
            return 0;
        };
        let command = guest::segments(chain.clone(), false);
        let length = guest::length(&command);
        let mut bytes = [0; LONGEST];
        let is_done = bytes.get_mut(..length).is_some_and(|bytes| {
            guest.gather(&command, bytes) && self.shared.command(bytes, features)
        });
        let result = if is_done {
            VIRTIO_NET_OK
        } else {
            VIRTIO_NET_ERR
        };
        let [result, ..] = result.to_le_bytes();
        u32::from(guest.write(address, &[result]))
    }

    /// Sends an announcement, if one is due.
    fn announce(&mut self) {
        let now = Instant::now();
        let (left, mac) = self.shared.announcements();
        if left == 0 {
            self.due = None;
            return;
        }
        let due = *self.due.get_or_insert_with(|| now + announce::pause(left));
        if now < due {
            return;
        }
        if let Some(tap) = self.shared.taps.first() {
            // The next one may fare better.
            if let Err(errno) = rustix::io::write(tap, &announce::frame(mac)) {
                log::debug!("cannot announce the network card: {errno}");
            }
        }
        self.shared.announced();
        self.due = (left > 1).then(|| now + announce::pause(left - 1));
    }

    fn wait(
        &self,
        queue: Option<&VirtQueue>,
        stop: &Stop,
        limit: Option<Duration>,
    ) -> io::Result<()> {
        let bell = queue.map(|queue| queue.doorbell().as_fd());
        let link = self.link.as_ref().map(AsFd::as_fd);
        let fds = [Some(stop.as_fd()), bell, link].into_iter().flatten();
        let fds = fds.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
        let limit = limit.and_then(|limit| Timespec::try_from(limit).ok());
        match poll(&mut fds.collect::<Vec<_>>(), limit.as_ref()) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }
}

impl Service for Control {
    fn serve(&mut self, activation: &mut Activation, stop: &Stop) {
        let Activation {
            features,
            queues,
            config,
        } = activation;
        // What happened to the tap meanwhile may have been lost.
        if let Some(Err(error)) = self.link.as_ref().map(LinkWatch::ask) {
            log::warn!("cannot ask whether the tap is up: {error}");
        }
        if self.shared.is_to_announce() {
            config.changed();
        }
        while !stop.is_set() {
            let has_more = self.step(queues.first_mut(), *features, config);
            let until_due = || {
                self.due
                    .map(|due| due.saturating_duration_since(Instant::now()))
            };
            let limit = if has_more {
                Some(Duration::ZERO)
            } else {
                until_due()
            };
            if let Err(error) = self.wait(queues.first(), stop, limit) {
                match queues.first_mut() {
                    Some(queue) => queue.give_up(&error),
                    None => log::error!("cannot wait for what happens to the tap: {error}"),
                }
                return;
            }
        }
    }
}

impl Shared {
    /// Does what a command says, and returns whether that was possible.
    fn command(&self, bytes: &[u8], features: u64) -> bool {
        let has = |feature: u64| features & feature != 0;
        let Some(([class, number], rest)) = bytes.split_first_chunk() else {
            return false;
        };
        match (u32::from(*class), u32::from(*number), rest) {
            (VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_ADDR_SET, &[a, b, c, d, e, f])
                if has(CONTROL_MAC) =>
            {
                let mac = MacAddress::new([a, b, c, d, e, f]);
                mac.is_some_and(|mac| self.set_mac(mac))
            }
            (VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK, []) if has(ANNOUNCE) => {
                self.driver_announces()
            }
            (VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, &[low, high]) => {
                self.use_pairs(u16::from_le_bytes([low, high]), features)
            }
            (VIRTIO_NET_CTRL_GUEST_OFFLOADS, VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET, offloads)
                if has(CONTROL_OFFLOADS) =>
            {
                let offloads = <[u8; 8]>::try_from(offloads).map(u64::from_le_bytes);
                let negotiated = features & GUEST_OFFLOADS;
                let offloads = offloads.ok().filter(|offloads| offloads & !negotiated == 0);
                offloads.is_some_and(|offloads| self.set_offloads(offloads))
            }
            _ => false,
        }
    }
}
