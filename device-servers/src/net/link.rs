//! Whether an interface is up, as the kernel says (rtnetlink(7)).

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use libc::{IFF_LOWER_UP, IFF_UP, RTM_DELLINK, RTM_GETLINK, RTM_NEWLINK, RTMGRP_LINK};
use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};
use rustix::net::{bind, recv, send, socket_with};

/// Is told when an interface goes up or down. It is readable when there may be something new.
#[derive(Debug)]
pub(super) struct LinkWatch {
    socket: OwnedFd,
    index: i32,
}

/// Bytes in `struct nlmsghdr` (netlink(7)).
const HEADER: usize = 16;

/// Most bytes in a message of an interface.
const MAX_MESSAGE: usize = 32 << 10;

/// Most messages that are read at a time.
const BATCH: usize = 64;

impl LinkWatch {
    /// Watches the interface with this index.
    pub(super) fn new(index: u32) -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let kind = SocketType::RAW;
        // The protocol is NETLINK_ROUTE, which is 0.
        let socket = socket_with(AddressFamily::NETLINK, kind, flags, None)?;
        let groups = RTMGRP_LINK.cast_unsigned();
        bind(&socket, &SocketAddrNetlink::new(0, groups))?;
        Ok(Self {
            socket,
            index: index.try_into().map_err(io::Error::other)?,
        })
    }

    /// Asks the kernel to say how things are. The answer comes as what is new does.
    pub(super) fn ask(&self) -> io::Result<()> {
        const REQUEST: u16 = 1; // NLM_F_REQUEST
        let mut message = Vec::with_capacity(HEADER + INFO);
        message.extend(32_u32.to_ne_bytes());
        message.extend(RTM_GETLINK.to_ne_bytes());
        message.extend(REQUEST.to_ne_bytes());
        message.extend([0; 8]);
        // `struct ifinfomsg`: the family, which is none, the index, and what is not used.
        message.extend([0; 4]);
        message.extend(self.index.to_ne_bytes());
        message.extend([0; 8]);
        send(&self.socket, &message, SendFlags::DONTWAIT)?;
        Ok(())
    }

    /// Reads what is new, and returns whether the interface is up, if that is among it.
    pub(super) fn read(&self) -> Option<bool> {
        let mut latest = None;
        let mut bytes = vec![0; MAX_MESSAGE];
        for _ in 0..BATCH {
            match recv(&self.socket, bytes.as_mut_slice(), RecvFlags::DONTWAIT) {
                Ok((length, _)) => {
                    let messages = bytes.get(..length).unwrap_or(&[]);
                    latest = states(messages, self.index).last().or(latest);
                }
                // Something was lost. The answer has room: reading has made some.
                Err(Errno::NOBUFS) => {
                    if let Err(error) = self.ask() {
                        log::warn!("cannot ask whether the tap is up: {error}");
                    }
                }
                Err(_) => break,
            }
        }
        latest
    }
}

impl AsFd for LinkWatch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Bytes in `struct ifinfomsg` (rtnetlink(7)).
const INFO: usize = 16;

/// What messages say of the interface with this index.
fn states(messages: &[u8], index: i32) -> impl Iterator<Item = bool> {
    let mut rest = messages;
    std::iter::from_fn(move || {
        let header: &[u8; HEADER] = rest.first_chunk()?;
        let [l0, l1, l2, l3, k0, k1, ..] = *header;
        let length = usize::try_from(u32::from_ne_bytes([l0, l1, l2, l3])).ok()?;
        let kind = u16::from_ne_bytes([k0, k1]);
        let body = rest.get(HEADER..length)?;
        // Each begins at a multiple of four bytes.
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or(&[]);
        Some(state(kind, body, index))
    })
    .flatten()
}

fn state(kind: u16, body: &[u8], index: i32) -> Option<bool> {
    let info: &[u8; INFO] = body.first_chunk()?;
    let [_, _, _, _, i0, i1, i2, i3, f0, f1, f2, f3, ..] = *info;
    if i32::from_ne_bytes([i0, i1, i2, i3]) != index {
        return None;
    }
    let flags = i32::from_ne_bytes([f0, f1, f2, f3]);
    match kind {
        // It has been brought up, and has a carrier.
        RTM_NEWLINK => Some(flags & IFF_UP != 0 && flags & IFF_LOWER_UP != 0),
        RTM_DELLINK => Some(false),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: u16, index: i32, flags: i32) -> Vec<u8> {
        let mut bytes = 36_u32.to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend([0; 14]);
        bytes.extend(index.to_ne_bytes());
        bytes.extend(flags.to_ne_bytes());
        bytes.extend([0; 8]);
        bytes
    }

    #[test]
    fn only_what_concerns_the_interface_counts() {
        let up = IFF_UP | IFF_LOWER_UP;
        let messages = [
            message(RTM_NEWLINK, 7, up),
            message(RTM_NEWLINK, 8, IFF_UP),
            message(RTM_GETLINK, 7, 0),
            message(RTM_NEWLINK, 7, IFF_UP),
            message(RTM_NEWLINK, 7, IFF_LOWER_UP),
            message(RTM_NEWLINK, 7, up | 0x80),
            message(RTM_DELLINK, 7, up),
        ]
        .concat();
        let found: Vec<_> = states(&messages, 7).collect();
        assert_eq!(found, [true, false, false, true, false]);
        for cut in 0..messages.len() {
            // Messages that are cut off end the list.
            assert!(states(&messages[..cut], 7).count() <= found.len());
        }
        let mut endless = messages;
        endless[..4].copy_from_slice(&0_u32.to_ne_bytes());
        assert_eq!(states(&endless, 7).count(), 0);
    }

    #[test]
    fn the_kernel_answers() {
        // The loopback interface is always the first.
        let watch = LinkWatch::new(1).unwrap();
        watch.ask().unwrap();
        assert!(watch.read().is_some());
    }
}
