//! Eventfds, of which the other end is not trusted.

use std::io::IoSliceMut;
use std::os::fd::{AsFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::fstat;
use rustix::io::{Errno, ReadWriteFlags, preadv2, write};

/// Whether it can be an eventfd. Anonymous inodes have no file type; what could block a writer for ever, such as a pipe
/// or a socket, has one.
pub(crate) fn is_eventfd(fd: &OwnedFd) -> bool {
    const TYPE: u32 = 0o170_000; // S_IFMT
    fstat(fd).is_ok_and(|stat| stat.st_mode & TYPE == 0)
}

/// Adds 1 to the counter. One that is full says already what there is to say, and is not waited for.
pub(crate) fn signal(fd: &impl AsFd) {
    let mut fds = [PollFd::new(fd, PollFlags::OUT)];
    let ready = poll(&mut fds, Some(&Timespec::default()));
    let [fd_ready] = fds;
    if ready != Ok(0)
        && fd_ready.revents().contains(PollFlags::OUT)
        && let Err(errno) = write(fd, &1_u64.to_ne_bytes())
    {
        log::warn!("an eventfd cannot be signalled: {errno}");
    }
}

/// Takes what is in the counter, and returns whether there was anything.
///
/// It does not block, even if the other end has changed the descriptor's flags and reads it too.
///
/// # Errors
///
/// The errno of a descriptor that is not, or not any more, of use.
pub(crate) fn drain(fd: &impl AsFd) -> Result<bool, Errno> {
    const CURRENT_POSITION: u64 = u64::MAX;
    let mut counter = [0; 8];
    let mut buffers = [IoSliceMut::new(&mut counter)];
    match preadv2(fd, &mut buffers, CURRENT_POSITION, ReadWriteFlags::NOWAIT) {
        Ok(_) => Ok(true),
        Err(Errno::AGAIN | Errno::INTR) => Ok(false),
        Err(errno) => Err(errno),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use rustix::event::{EventfdFlags, eventfd};

    use super::*;

    #[test]
    fn only_eventfds_and_their_like_are_taken() {
        assert!(is_eventfd(&eventfd(0, EventfdFlags::CLOEXEC).unwrap()));
        let (reader, writer) = std::io::pipe().unwrap();
        assert!(!is_eventfd(&reader.into()) && !is_eventfd(&writer.into()));
        let (a, _b) = std::os::unix::net::UnixStream::pair().unwrap();
        assert!(!is_eventfd(&a.into()));
        assert!(!is_eventfd(
            &std::fs::File::open("/dev/null").unwrap().into()
        ));
        assert!(!is_eventfd(&tempfile::tempfile().unwrap().into()));
    }

    #[test]
    fn neither_a_full_nor_an_empty_counter_blocks() {
        // Without NONBLOCK, as a hostile client would have it.
        let event = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        let start = Instant::now();
        assert_eq!(drain(&event), Ok(false));
        write(&event, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        signal(&event);
        assert_eq!(drain(&event), Ok(true));
        assert_eq!(drain(&event), Ok(false));
        signal(&event);
        assert_eq!(drain(&event), Ok(true));
        assert!(start.elapsed().as_secs() < 5);
    }
}
