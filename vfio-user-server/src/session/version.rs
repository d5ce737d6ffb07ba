//! `VERSION`.

use std::os::unix::net::UnixStream;
use std::sync::Arc;

use rustix::io::Errno;
use vfio_user_protocol::{Capabilities, Limits, TwinSocket, Version};

use super::Session;
use crate::device::Device;
use crate::link::Link;
use crate::memory::Channel;
use crate::reader::MAX_DATA;

impl<D: Device> Session<'_, D> {
    /// Answers the proposal of a version. It can be made once.
    pub(super) fn version(&mut self, payload: &[u8]) -> Result<(), Errno> {
        if self.limits.is_some() {
            return Err(Errno::INVAL);
        }
        let bad = |error| {
            log::warn!("the client's version cannot be spoken: {error}");
            Errno::INVAL
        };
        let (version, theirs) = Version::decode(payload).map_err(bad)?;
        if version.major != Version::CURRENT.major {
            return Err(Errno::INVAL);
        }
        let version = Version {
            minor: version.minor.min(Version::CURRENT.minor),
            ..version
        };
        let ours = self.capabilities();
        let proposal = Capabilities {
            twin_socket: None,
            ..theirs
        };
        let limits = Limits::agree(version, &ours, &proposal).map_err(bad)?;
        let twin = if limits.max_msg_fds > 0 && wants_twin(&theirs) {
            Some(self.make_twin()?)
        } else {
            None
        };
        let answer = answer(&ours, &theirs, twin.is_some());
        self.reply.payload = version.encode(&answer).map_err(|_| Errno::INVAL)?;
        let link = twin.unwrap_or_else(|| Arc::clone(self.link));
        self.core.host.memory.set_channel(Some(Channel {
            link,
            chunk: limits.max_data_xfer_size,
            limit: self.core.options.memory_deadline,
        }));
        self.limits = Some(limits);
        Ok(())
    }

    /// What this side can do.
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            // QEMU takes no more than 16.
            max_msg_fds: Some(16),
            max_data_xfer_size: Some(MAX_DATA as u64),
            max_dma_maps: Some(self.core.options.max_mappings as u64),
            pgsizes: Some(4096),
            write_multiple: Some(true),
            twin_socket: None,
        }
    }

    /// Makes a socket for the device's own commands, and puts the client's end of it into the reply.
    fn make_twin(&mut self) -> Result<Arc<Link>, Errno> {
        let errno = |error: std::io::Error| Errno::from_io_error(&error).unwrap_or(Errno::IO);
        let (ours, theirs) = UnixStream::pair().map_err(errno)?;
        let link = Link::new(ours, self.core.options.send_deadline).map_err(errno)?;
        self.reply.fds.push(Arc::new(theirs));
        Ok(Arc::new(link))
    }
}

fn wants_twin(theirs: &Capabilities) -> bool {
    theirs
        .twin_socket
        .is_some_and(|twin_socket| twin_socket.supported)
}

/// What is answered to a proposal: of what it names, what this side can do.
fn answer(ours: &Capabilities, theirs: &Capabilities, twin: bool) -> Capabilities {
    Capabilities {
        max_msg_fds: ours.max_msg_fds.filter(|_| theirs.max_msg_fds.is_some()),
        max_data_xfer_size: ours
            .max_data_xfer_size
            .filter(|_| theirs.max_data_xfer_size.is_some()),
        max_dma_maps: ours.max_dma_maps.filter(|_| theirs.max_dma_maps.is_some()),
        pgsizes: ours.pgsizes.filter(|_| theirs.pgsizes.is_some()),
        write_multiple: ours
            .write_multiple
            .filter(|_| theirs.write_multiple == Some(true)),
        twin_socket: twin.then_some(TwinSocket {
            supported: true,
            fd_index: Some(0),
        }),
    }
}
