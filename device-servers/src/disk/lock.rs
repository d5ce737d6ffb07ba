//! Locks of files that belong to the open file, not to the process.
#![expect(unsafe_code, reason = "neither std nor rustix has F_OFD_SETLK")]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// A lock, or none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lock {
    Exclusive,
    Shared,
    None,
}

/// Changes the lock that this open file has on all of the file, without waiting (fcntl(2), "Open file description
/// locks"). A lock of somebody else that is in the way is [`io::ErrorKind::WouldBlock`].
pub(super) fn set(file: &File, lock: Lock) -> io::Result<()> {
    let kind = match lock {
        Lock::Exclusive => libc::F_WRLCK,
        Lock::Shared => libc::F_RDLCK,
        Lock::None => libc::F_UNLCK,
    };
    // From 0 on, without an end.
    let range = libc::flock {
        l_type: kind.try_into().map_err(io::Error::other)?,
        l_whence: libc::SEEK_SET.try_into().map_err(io::Error::other)?,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    // SAFETY: the descriptor is open as long as `file` is borrowed, and F_OFD_SETLK reads one `struct flock`, which
    // `range` is and outlives the call.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const range) };
    if result == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    // POSIX allows both.
    if error.raw_os_error() == Some(libc::EACCES) {
        return Err(io::ErrorKind::WouldBlock.into());
    }
    Err(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locks_exclude_each_other_as_they_should() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let open = || File::options().read(true).write(true).open(&file).unwrap();
        let (first, second) = (open(), open());
        let is_refused = |lock| {
            let result = set(&second, lock);
            result.is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock)
        };
        set(&first, Lock::Exclusive).unwrap();
        assert!(is_refused(Lock::Exclusive) && is_refused(Lock::Shared));
        set(&first, Lock::Shared).unwrap();
        assert!(is_refused(Lock::Exclusive) && !is_refused(Lock::Shared));
        set(&first, Lock::None).unwrap();
        assert!(!is_refused(Lock::Exclusive));
    }
}
