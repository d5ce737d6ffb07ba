//! The requests that taps and interfaces take (`linux/if_tun.h`, netdevice(7)).
#![expect(unsafe_code, reason = "neither std nor rustix has these requests")]

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use libc::{Ioctl, c_int, c_short, c_ulong};

/// A `struct ifreq` (netdevice(7)): an interface's name, and what the request is about.
#[repr(C)]
struct Request {
    name: [u8; libc::IFNAMSIZ],
    value: [u8; 24],
}

const _: () = assert!(size_of::<Request>() == size_of::<libc::ifreq>());

impl Request {
    fn new(name: &str) -> io::Result<Self> {
        let mut bytes = [0; libc::IFNAMSIZ];
        // The last byte ends the name.
        let place = bytes
            .get_mut(..name.len())
            .filter(|place| place.len() < libc::IFNAMSIZ);
        let place = place.ok_or(io::ErrorKind::InvalidInput)?;
        place.copy_from_slice(name.as_bytes());
        Ok(Self {
            name: bytes,
            value: [0; 24],
        })
    }

    fn name(&self) -> String {
        let name = self.name.split(|byte| *byte == 0).next().unwrap_or(&[]);
        String::from_utf8_lossy(name).into_owned()
    }

    /// `ifr_flags`
    fn flags(&self) -> c_int {
        let [low, high, ..] = self.value;
        u16::from_ne_bytes([low, high]).into()
    }

    fn set_flags(&mut self, flags: c_int) {
        // All flags that there are to be set have at most 16 bits.
        let [low, high, ..] = flags.to_le_bytes();
        let bytes = c_short::from_le_bytes([low, high]).to_ne_bytes();
        if let Some(place) = self.value.first_chunk_mut() {
            *place = bytes;
        }
    }

    /// `ifr_mtu`
    fn mtu(&self) -> c_int {
        self.value
            .first_chunk()
            .map_or(0, |bytes| c_int::from_ne_bytes(*bytes))
    }

    fn set_mtu(&mut self, mtu: c_int) {
        if let Some(place) = self.value.first_chunk_mut() {
            *place = mtu.to_ne_bytes();
        }
    }
}

/// Makes an open `/dev/net/tun` a queue of a tap, which is made if it is not there. Returns the tap's name.
pub(super) fn set_interface(fd: &impl AsFd, name: &str, flags: c_int) -> io::Result<String> {
    let mut request = Request::new(name)?;
    request.set_flags(flags);
    call(fd, libc::TUNSETIFF, &mut request)?;
    Ok(request.name())
}

/// The name and the flags of the tap that a descriptor is a queue of.
pub(super) fn interface(fd: &impl AsFd) -> io::Result<(String, c_int)> {
    let mut request = Request::new("")?;
    call(fd, libc::TUNGETIFF, &mut request)?;
    Ok((request.name(), request.flags()))
}

/// Takes a queue of a tap into use (`IFF_ATTACH_QUEUE`) or out of it (`IFF_DETACH_QUEUE`).
pub(super) fn set_queue(fd: &impl AsFd, flag: c_int) -> io::Result<()> {
    let mut request = Request::new("")?;
    request.set_flags(flag);
    call(fd, libc::TUNSETQUEUE, &mut request)
}

/// The flags of an interface, for which any socket will do.
pub(super) fn interface_flags(socket: &impl AsFd, name: &str) -> io::Result<c_int> {
    let mut request = Request::new(name)?;
    call(socket, libc::SIOCGIFFLAGS, &mut request)?;
    Ok(request.flags())
}

pub(super) fn set_interface_flags(socket: &impl AsFd, name: &str, flags: c_int) -> io::Result<()> {
    let mut request = Request::new(name)?;
    request.set_flags(flags);
    call(socket, libc::SIOCSIFFLAGS, &mut request)
}

/// The MTU of an interface, in bytes.
pub(super) fn interface_mtu(socket: &impl AsFd, name: &str) -> io::Result<c_int> {
    let mut request = Request::new(name)?;
    call(socket, libc::SIOCGIFMTU, &mut request)?;
    Ok(request.mtu())
}

pub(super) fn set_interface_mtu(socket: &impl AsFd, name: &str, mtu: c_int) -> io::Result<()> {
    let mut request = Request::new(name)?;
    request.set_mtu(mtu);
    call(socket, libc::SIOCSIFMTU, &mut request)
}

/// Sets how long the header of each packet is, in bytes.
pub(super) fn set_header_size(fd: &impl AsFd, size: c_int) -> io::Result<()> {
    // SAFETY: the descriptor is open while it is borrowed, and the kernel reads one int, which `size` is. Of what is no
    // tap, the number is no request.
    let result = unsafe {
        libc::ioctl(
            fd.as_fd().as_raw_fd(),
            libc::TUNSETVNETHDRSZ,
            &raw const size,
        )
    };
    outcome(result)
}

/// Sets what the packets that are read may be like (`TUN_F_*`).
pub(super) fn set_offload(fd: &impl AsFd, offload: u32) -> io::Result<()> {
    let offload = c_ulong::from(offload);
    // SAFETY: the descriptor is open while it is borrowed, and the argument is a number.
    let result = unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), libc::TUNSETOFFLOAD, offload) };
    outcome(result)
}

/// Makes a request that takes a `struct ifreq`; there is no other in this file to call it with.
fn call(fd: &impl AsFd, number: Ioctl, request: &mut Request) -> io::Result<()> {
    // SAFETY: the descriptor is open while it is borrowed, and the kernel reads and writes one `struct ifreq`, which has
    // the size and the layout of `request`, and no pointers in what these requests use of it.
    let result = unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), number, &raw mut *request) };
    outcome(result)
}

fn outcome(result: c_int) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
