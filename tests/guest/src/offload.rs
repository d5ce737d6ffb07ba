//! What is left to a network card of the work on packets, as ethtool(8) changes it.
#![expect(
    unsafe_code,
    reason = "the kernel is given the address of what it is asked"
)]

use std::ffi::{c_int, c_void};
use std::io;
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::AsRawFd;
use std::ptr;

use rustix::ioctl::{Opcode, Updater, ioctl};

/// Something that can be left to a card (`ETHTOOL_S*` of `linux/ethtool.h`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Offload {
    /// Computing the checksums of what is sent. Without it, there is none of the others.
    Checksum = 0x17,
    /// Sending what is in several pieces.
    Pieces = 0x19,
    /// Splitting TCP.
    Segmentation = 0x1f,
    /// Splitting what the card cannot split, late.
    GenericSegmentation = 0x24,
}

/// Has a socket send what it is given at once as datagrams of this size, the last one smaller. A card that can splits them.
///
/// # Errors
/// When the kernel does not.
pub fn split_datagrams(socket: &UdpSocket, size: u16) -> io::Result<()> {
    let size = c_int::from(size);
    let length = libc::socklen_t::try_from(size_of_val(&size)).map_err(io::Error::other)?;
    let value = ptr::from_ref(&size).cast();
    // SAFETY: the option is an int, which outlives the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_UDP,
            libc::UDP_SEGMENT,
            value,
            length,
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// `SIOCETHTOOL` of `linux/sockios.h`.
const ETHTOOL: Opcode = 0x8946;

/// `struct ifreq` of `linux/if.h`, as far as it is used here.
#[repr(C)]
struct Request {
    name: [u8; 16],
    data: *mut c_void,
    rest: [u8; 16],
}

/// `struct ethtool_value`.
#[repr(C)]
struct Value {
    command: u32,
    data: u32,
}

/// Leaves something to the card from now on, or no longer.
///
/// # Errors
/// When there is no such card, or it cannot do this.
pub fn set(interface: &str, offload: Offload, is_on: bool) -> io::Result<()> {
    let mut value = Value {
        command: offload as u32,
        data: is_on.into(),
    };
    let mut name = [0; 16];
    let place = name.get_mut(..interface.len());
    let place = place.filter(|place| place.len() < 16);
    place
        .ok_or(io::ErrorKind::InvalidInput)?
        .copy_from_slice(interface.as_bytes());
    let mut request = Request {
        name,
        data: ptr::from_mut(&mut value).cast(),
        rest: [0; 16],
    };
    let any = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    // SAFETY: SIOCETHTOOL takes a `struct ifreq`, which `Request` is.
    let update = unsafe { Updater::<ETHTOOL, Request>::new(&mut request) };
    // SAFETY: the commands of `Offload` read a `struct ethtool_value` where `data` points, and it outlives the call.
    unsafe { ioctl(&any, update) }?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interfaces_that_are_not_there_have_none() {
        for name in ["no-such-card", "a-name-that-is-too-long-for-a-card"] {
            set(name, Offload::Checksum, true).unwrap_err();
        }
    }
}
