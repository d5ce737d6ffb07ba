//! Errors of a device as the client is told of them.

use std::io::{self, ErrorKind};

use rustix::io::Errno;

/// The errno of an error, or the one that goes best with its kind.
pub(crate) fn errno(error: &io::Error) -> Errno {
    if let Some(errno) = Errno::from_io_error(error) {
        return errno;
    }
    match error.kind() {
        ErrorKind::InvalidInput | ErrorKind::InvalidData | ErrorKind::UnexpectedEof => Errno::INVAL,
        ErrorKind::Unsupported => Errno::OPNOTSUPP,
        ErrorKind::PermissionDenied => Errno::PERM,
        ErrorKind::NotFound => Errno::NOENT,
        ErrorKind::AlreadyExists => Errno::EXIST,
        ErrorKind::WouldBlock => Errno::AGAIN,
        ErrorKind::ResourceBusy => Errno::BUSY,
        ErrorKind::TimedOut => Errno::TIMEDOUT,
        ErrorKind::OutOfMemory => Errno::NOMEM,
        _ => Errno::IO,
    }
}
