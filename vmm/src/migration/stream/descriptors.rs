//! Descriptors, which only go where both ends are on one host: over a Unix socket, in batches, each with one byte that
//! says how many they are.
//!
//! The other end knows when they come and how many, from the frame before them; it reads no byte of them by other means,
//! or the kernel would drop what comes with it.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::io::retry_on_intr;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

use super::{Socket, Stream};

/// Most descriptors that go at once (`SCM_MAX_FD` of the kernel's `net/scm.h`).
const BATCH: usize = 253;

/// Room for the control data of a batch, in bytes.
const SPACE: usize = rustix::cmsg_space!(ScmRights(BATCH));

impl Stream {
    /// Whether descriptors can go this way.
    pub(in crate::migration) fn takes_descriptors(&self) -> bool {
        matches!(self.socket, Socket::Unix(_))
    }

    /// Sends descriptors.
    pub(in crate::migration) fn send_descriptors(
        &mut self,
        descriptors: &[BorrowedFd<'_>],
    ) -> io::Result<()> {
        for batch in descriptors.chunks(BATCH) {
            self.wait(|socket| send_batch(unix(socket)?, batch))?;
        }
        Ok(())
    }

    /// Receives so many descriptors, which close on exec.
    pub(in crate::migration) fn receive_descriptors(
        &mut self,
        count: usize,
    ) -> io::Result<Vec<OwnedFd>> {
        let mut all = Vec::new();
        while all.len() < count {
            let batch = self.wait(|socket| receive_batch(unix(socket)?))?;
            if batch.is_empty() || batch.len() > count - all.len() {
                return Err(io::ErrorKind::InvalidData.into());
            }
            all.extend(batch);
        }
        Ok(all)
    }
}

fn unix(socket: &Socket) -> io::Result<&UnixStream> {
    match socket {
        Socket::Unix(stream) => Ok(stream),
        _ => Err(io::ErrorKind::Unsupported.into()),
    }
}

fn send_batch(stream: &UnixStream, batch: &[BorrowedFd<'_>]) -> io::Result<()> {
    let count = u8::try_from(batch.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let mut space = [MaybeUninit::uninit(); SPACE];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !control.push(SendAncillaryMessage::ScmRights(batch)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let byte = [count];
    let bytes = [IoSlice::new(&byte)];
    retry_on_intr(|| sendmsg(stream, &bytes, &mut control, SendFlags::NOSIGNAL))?;
    Ok(())
}

fn receive_batch(stream: &UnixStream) -> io::Result<Vec<OwnedFd>> {
    let mut byte = [0];
    let mut space = [MaybeUninit::uninit(); SPACE];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = retry_on_intr(|| {
        let mut bytes = [IoSliceMut::new(&mut byte)];
        recvmsg(stream, &mut bytes, &mut control, RecvFlags::CMSG_CLOEXEC)
    })?;
    let mut batch = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            batch.extend(rights);
        }
    }
    if received.bytes == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    if received.flags.contains(ReturnFlags::CTRUNC) {
        return Err(io::Error::other(
            "not all descriptors have arrived (too many open files? see `ulimit -n`)",
        ));
    }
    if [batch.len()] != byte.map(usize::from) {
        return Err(io::ErrorKind::InvalidData.into());
    }
    Ok(batch)
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::os::fd::AsFd as _;
    use std::thread;

    use rustix::event::{EventfdFlags, eventfd};
    use rustix::io::{FdFlags, fcntl_getfd};

    use super::*;

    fn pair() -> [Stream; 2] {
        let (here, there) = UnixStream::pair().unwrap();
        [here, there].map(|stream| Stream::new(Socket::Unix(stream)).unwrap())
    }

    #[test]
    fn descriptors_arrive_in_their_order_between_other_bytes() {
        let [mut here, mut there] = pair();
        let events: Vec<_> = (1..=600)
            .map(|number| eventfd(number, EventfdFlags::NONBLOCK).unwrap())
            .collect();
        thread::scope(|scope| {
            scope.spawn(|| {
                here.write_all(b"before").unwrap();
                let events: Vec<_> = events.iter().map(|event| event.as_fd()).collect();
                here.send_descriptors(&events).unwrap();
                here.write_all(b"after").unwrap();
            });
            let mut before = [0; 6];
            io::Read::read_exact(&mut there, &mut before).unwrap();
            let received = there.receive_descriptors(600).unwrap();
            for (event, number) in received.iter().zip(1_u64..) {
                let mut value = [0; 8];
                rustix::io::read(event, &mut value).unwrap();
                assert_eq!(u64::from_ne_bytes(value), number);
                assert!(fcntl_getfd(event).unwrap().contains(FdFlags::CLOEXEC));
            }
            let mut after = [0; 5];
            io::Read::read_exact(&mut there, &mut after).unwrap();
            assert_eq!([&before[..], &after[..]], [&b"before"[..], b"after"]);
        });
    }

    #[test]
    fn fewer_or_more_than_announced_are_an_error() {
        let null = std::fs::File::open("/dev/null").unwrap();
        let two = [null.as_fd(), null.as_fd()];
        let [mut here, mut there] = pair();
        here.send_descriptors(&two).unwrap();
        assert!(there.receive_descriptors(1).is_err());
        here.write_all(&[1]).unwrap();
        assert!(there.receive_descriptors(1).is_err());
        here.write_all(&[0]).unwrap();
        assert!(there.receive_descriptors(1).is_err());
        here.send_descriptors(&two).unwrap();
        drop(here);
        let error = there.receive_descriptors(3).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
}
