//! What goes to the tap.

use std::io::{self, ErrorKind};

use super::config::{HEADER, MAX_PACKET};
use super::packet::{self, MAX_SLICES};
use super::pair::{BATCH, Wait};
use super::tap::Tap;
use crate::virtio::guest::{self, Guest};
use crate::virtio::{Chain, VirtQueue};

/// Takes packets from the driver.
///
/// They are written straight from the driver's buffers. What is no packet, or one that the tap does not want, is dropped,
/// as a network does. Only if the tap has no room now, the packet waits in its queue.
#[derive(Debug)]
pub(super) struct Transmitter {
    /// For packets that are not in mapped memory.
    own: Box<[u8]>,
}

impl Transmitter {
    pub(super) fn new() -> Self {
        Self {
            own: vec![0; MAX_PACKET].into(),
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
        match guest.slices(&segments) {
            Some(slices) if slices.len() <= MAX_SLICES => {
                packet::write(tap, &slices)?;
            }
            _ => {
                let packet = self.own.get_mut(..length).ok_or(ErrorKind::InvalidData)?;
                if !guest.gather(&segments, packet) {
                    return Err(ErrorKind::InvalidInput.into());
                }
                rustix::io::write(tap, packet)?;
            }
        }
        Ok(())
    }
}
