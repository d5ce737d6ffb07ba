//! What goes to the tap.

use std::io::{self, ErrorKind};

use super::config::{HEADER, MAX_PACKET};
use super::packet::{self, MAX_SLICES};
use super::pair::{BATCH, Wait};
use super::split;
use super::tap::Tap;
use crate::virtio::guest::{self, Guest};
use crate::virtio::{Chain, VirtQueue};

/// Takes packets from the driver.
///
/// They are written straight from the driver's buffers, but for UDP packets that the tap does not split. What is no packet,
/// or one that the tap does not want, is dropped, as a network does. Only if the tap has no room now, the packet waits in
/// its queue.
#[derive(Debug)]
pub(super) struct Transmitter {
    /// For packets that are not in mapped memory, or that are split here.
    own: Box<[u8]>,
    /// Whether the tap splits UDP packets.
    has_uso: bool,
}

impl Transmitter {
    /// Of a card with a tap that splits UDP packets or does not.
    pub(super) fn new(has_uso: bool) -> Self {
        Self {
            own: vec![0; MAX_PACKET].into(),
            has_uso,
        }
    }

    /// Takes a batch of packets from the driver, and says what to wait for.
    pub(super) fn transmit(&mut self, queue: &mut VirtQueue, tap: &Tap) -> Wait {
        let guest = queue.guest();
        queue.disable_notifications(&guest.view);
        let mut wait = Wait::No;
        for _ in 0..BATCH {
            let Some(chain) = queue.pop(&guest.view) else {
                wait = Wait::Driver;
                break;
            };
            let head = chain.head_index();
            match self.send(chain, &guest, tap) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    queue.unpop(1);
                    wait = Wait::Tap;
                    break;
                }
                Err(error) => log::debug!("a packet is dropped: {error}"),
                Ok(()) => {}
            }
            queue.push(&guest.view, head, 0);
        }
        queue.interrupt(&guest.view);
        if wait == Wait::Driver && queue.enable_notifications(&guest.view) {
            wait = Wait::No;
        }
        wait
    }

    fn send(&mut self, chain: Chain<'_>, guest: &Guest, tap: &Tap) -> io::Result<()> {
        let segments = guest::segments(chain, false);
        let length = guest::length(&segments);
        if length <= HEADER || length > MAX_PACKET {
            return Err(ErrorKind::InvalidData.into());
        }
        let is_split = !self.has_uso && {
            let mut start = [0; split::KIND];
            guest.gather(&segments, &mut start) && split::is_for(start)
        };
        match guest.slices(&segments) {
            Some(slices) if slices.len() <= MAX_SLICES && !is_split => {
                packet::write(tap, &slices)?;
                return Ok(());
            }
            _ => {}
        }
        let packet = self.own.get_mut(..length).ok_or(ErrorKind::InvalidData)?;
        if !guest.gather(&segments, packet) {
            return Err(ErrorKind::InvalidInput.into());
        }
        if is_split {
            split::write(packet, |pieces| {
                rustix::io::writev(tap, pieces)?;
                Ok(())
            })
        } else {
            rustix::io::write(tap, packet)?;
            Ok(())
        }
    }
}
