//! Taps (`linux/if_tun.h`, and `Documentation/networking/tuntap.rst` of the kernel).

use std::fs::OpenOptions;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use libc::{IFF_MULTI_QUEUE, IFF_NO_PI, IFF_TAP, IFF_UP, IFF_VNET_HDR};
use rustix::fs::OFlags;
use rustix::io::{Errno, ioctl_fionbio};
use rustix::net::{AddressFamily, SocketFlags, SocketType, netdevice, socket_with};

use super::config::{HEADER, USO};
use super::error::NetError;
use super::ioctl;
use super::link::LinkWatch;

/// One queue of a tap, or what is there in place of it.
#[derive(Debug)]
pub(super) struct Tap {
    fd: OwnedFd,
    /// Whether it is a tap, and takes a tap's requests.
    is_tap: bool,
}

/// A tap with all of its queues, and what there is to know of it.
#[derive(Debug)]
pub(super) struct Network {
    pub(super) taps: Vec<Tap>,
    /// The MTU in bytes, if it is known and fits.
    pub(super) mtu: Option<u16>,
    pub(super) has_uso: bool,
    /// What tells whether it is up. What is no tap always is.
    pub(super) link: Option<LinkWatch>,
}

impl Network {
    /// Opens a tap by its name, or makes it. One that is made gets the MTU, is up, and goes when it is closed. Without a
    /// name, it gets one from the kernel.
    pub(super) fn open(name: Option<&str>, pairs: u16, mtu: Option<u16>) -> Result<Self, NetError> {
        if let Some(name) = name {
            check(name)?;
        }
        let socket = any_socket()?;
        let is_new = name.is_none_or(|name| netdevice::name_to_index(&socket, name).is_err());
        let (name, first) = open_first(name, pairs, is_new)?;
        let failed = |step| {
            let name = name.clone();
            move |source: io::Error| NetError::Tap { step, name, source }
        };
        let mut taps = vec![first];
        for _ in 1..pairs {
            let fd = open_tun()?;
            ioctl::set_interface(&fd, &name, FLAGS | IFF_MULTI_QUEUE)
                .map_err(failed("open another queue of"))?;
            taps.push(fd);
        }
        if is_new {
            if let Some(mtu) = mtu {
                ioctl::set_interface_mtu(&socket, &name, mtu.into())
                    .map_err(failed("set the MTU of"))?;
            }
            let flags =
                ioctl::interface_flags(&socket, &name).map_err(failed("see the state of"))?;
            ioctl::set_interface_flags(&socket, &name, flags | IFF_UP)
                .map_err(failed("bring up"))?;
            log::info!("made tap {name}");
        }
        Self::of(taps)
    }

    /// Takes a tap that is open, by the descriptors of its queues. What is no tap has to keep packets apart.
    pub(super) fn of(fds: Vec<OwnedFd>) -> Result<Self, NetError> {
        let mut taps = Vec::with_capacity(fds.len());
        let mut interface = None;
        for fd in fds {
            ioctl_fionbio(&fd, true).map_err(io::Error::from)?;
            let found = ioctl::interface(&fd).ok();
            if let Some((name, flags)) = &found {
                if flags & IFF_VNET_HDR == 0 {
                    return Err(NetError::NoHeaders { name: name.clone() });
                }
                let size = HEADER.try_into().map_err(io::Error::other)?;
                ioctl::set_header_size(&fd, size).map_err(|source| NetError::Tap {
                    step: "set the size of headers of",
                    name: name.clone(),
                    source,
                })?;
            }
            taps.push(Tap {
                fd,
                is_tap: found.is_some(),
            });
            interface = interface.or(found);
        }
        let Some((name, _)) = interface else {
            return Ok(Self {
                taps,
                mtu: None,
                has_uso: true,
                link: None,
            });
        };
        let failed = |source| NetError::Tap {
            step: "watch",
            name: name.clone(),
            source,
        };
        let socket = any_socket()?;
        let mtu = ioctl::interface_mtu(&socket, &name).map_err(failed)?;
        let index = netdevice::name_to_index(&socket, &name).map_err(io::Error::from);
        let link = LinkWatch::new(index.map_err(failed)?).map_err(failed)?;
        let has_uso = taps.first().is_some_and(Tap::has_uso);
        Ok(Self {
            taps,
            mtu: mtu.try_into().ok(),
            has_uso,
            link: Some(link),
        })
    }
}

impl Tap {
    /// Says what packets that are read from all queues of the tap may be like (`TUN_F_*`).
    pub(super) fn set_offload(&self, offload: u32) -> io::Result<()> {
        if !self.is_tap {
            return Ok(());
        }
        match ioctl::set_offload(&self.fd, offload) {
            // The tap has been deleted: nothing comes from it any more, and the card is one whose link is down.
            Err(error) if error.raw_os_error() == Some(libc::EBADFD) => Ok(()),
            result => result,
        }
    }

    /// Takes this queue into use, so that the tap gives packets to it, or out of it. It may be so already.
    pub(super) fn attach(&self, attach: bool) -> io::Result<()> {
        let flag = if attach {
            libc::IFF_ATTACH_QUEUE
        } else {
            libc::IFF_DETACH_QUEUE
        };
        if !self.is_tap {
            return Ok(());
        }
        match ioctl::set_queue(&self.fd, flag) {
            // It is so already.
            Err(error) if error.kind() == ErrorKind::InvalidInput => Ok(()),
            result => result,
        }
    }

    /// Drops what is there to be read.
    pub(super) fn drain(&self) {
        // As many as the tap keeps at most, unless its administrator wants it otherwise (`TUN_READQ_SIZE`).
        const MOST: usize = 500;
        for _ in 0..MOST {
            // What of a packet is not read is gone too.
            if rustix::io::read(&self.fd, &mut [0; HEADER]).is_err() {
                return;
            }
        }
    }

    fn has_uso(&self) -> bool {
        let is_taken = self.set_offload(libc::TUN_F_CSUM | USO).is_ok();
        // Nothing is, until the driver says so. A kernel that takes more takes this.
        let _ = self.set_offload(0);
        is_taken
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// What every queue is: Ethernet, with headers for offloads.
const FLAGS: i32 = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR;

/// Opens the first queue, and says what the tap's name is.
fn open_first(name: Option<&str>, pairs: u16, is_new: bool) -> Result<(String, OwnedFd), NetError> {
    // The kernel replaces %d by a number.
    let asked = name.unwrap_or("tap%d");
    let fd = open_tun()?;
    let multi_queue = if pairs > 1 { IFF_MULTI_QUEUE } else { 0 };
    let mut result = ioctl::set_interface(&fd, asked, FLAGS | multi_queue);
    // One of several queues is good for a single one too, but has to be asked for as what it is.
    let is_other = |error: &io::Error| error.kind() == ErrorKind::InvalidInput;
    if pairs == 1 && result.as_ref().is_err_and(is_other) {
        result = ioctl::set_interface(&fd, asked, FLAGS | IFF_MULTI_QUEUE);
    }
    let shown = name.unwrap_or("tap0").to_owned();
    match result {
        Ok(name) => Ok((name, fd)),
        Err(source) => Err(match source.kind() {
            ErrorKind::PermissionDenied if is_new => NetError::CannotCreate { name: shown },
            ErrorKind::PermissionDenied => NetError::NotOurs { name: shown },
            ErrorKind::ResourceBusy => NetError::InUse { name: shown },
            ErrorKind::InvalidInput => NetError::NotSuitable { name: shown },
            _ => NetError::Tap {
                step: "open",
                name: shown,
                source,
            },
        }),
    }
}

fn open_tun() -> Result<OwnedFd, NetError> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(OFlags::NONBLOCK.bits().cast_signed())
        .open("/dev/net/tun");
    file.map(OwnedFd::from).map_err(NetError::NoTun)
}

/// A socket, to ask of interfaces.
fn any_socket() -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, flags, None);
    socket.map_err(|errno: Errno| errno.into())
}

/// Checks a name as the kernel does (`dev_valid_name`), and that it does not fill anything in.
fn check(name: &str) -> Result<(), NetError> {
    let is_bad = |character: char| character.is_whitespace() || "/:%\0".contains(character);
    let fits = (1..libc::IFNAMSIZ).contains(&name.len());
    if fits && ![".", ".."].contains(&name) && !name.contains(is_bad) {
        return Ok(());
    }
    Err(NetError::Name(name.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_no_interface_has_are_refused() {
        for name in [
            "",
            ".",
            "..",
            "a/b",
            "a b",
            "a:1",
            "tap%d",
            "a\0",
            "sixteen-letters-",
        ] {
            assert!(matches!(check(name), Err(NetError::Name(_))), "{name:?}");
        }
        for name in ["a", "tap0", "fifteen-letters", "vm.1_x"] {
            check(name).unwrap();
        }
    }
}
