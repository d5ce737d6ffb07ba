//! What a register access costs, beside what it would cost without a client, and with others.
//!
//! Run with `cargo bench -p vfio-user-client`. Each contender is measured in many short rounds, in turn with the others,
//! so that what else the machine does falls on all of them; the medians of the rounds are compared. With two CPUs or
//! more the server has one for itself.

#![expect(clippy::unwrap_used, reason = "a benchmark that cannot run panics")]

use std::hint::black_box;
use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Barrier, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{
    RecvAncillaryBuffer, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, recvmsg,
    sendmsg,
};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use vfio_user_client::{Client, DmaError, GuestDma, Options};
use vfio_user_protocol::{
    Capabilities, Command, DeviceInfo, Header, RegionAccess, RegionInfo, TwinSocket, Version, take,
};
use zerocopy::IntoBytes;

const ROUNDS: usize = 61;
const CALLS: u32 = 2000;
const THREADS: u32 = 8;

fn main() {
    // What a test run asks for; there is nothing to test here.
    if std::env::args().any(|argument| argument == "--test") {
        return;
    }
    one_thread();
    many_threads();
}

/// One thread reads and writes four bytes.
fn one_thread() {
    let bare = Bare::new(serve_one());
    let client = client(serve_one(), true);
    let no_twin = self::client(serve_one(), false);
    let mut foreign = foreign_client();
    let mut contenders: [(&str, &mut dyn FnMut()); 5] = [
        ("bare sendmsg and recvmsg", &mut || bare.read()),
        ("read", &mut || {
            client.region_read(0, 0x10, &mut [0; 4]).unwrap();
        }),
        ("read, no twin socket", &mut || {
            no_twin.region_read(0, 0x10, &mut [0; 4]).unwrap();
        }),
        ("read, vfio_user 0.1.7", &mut || {
            foreign.region_read(0, 0x10, &mut [0; 4]).unwrap();
        }),
        ("write", &mut || {
            client.region_write(0, 0x10, &WORD).unwrap();
        }),
    ];
    let mut times = vec![Vec::new(); contenders.len()];
    let mut posts = Vec::new();
    let mut sustained = Vec::new();
    for _ in 0..ROUNDS {
        for (times, (_, call)) in times.iter_mut().zip(&mut contenders) {
            times.push(time(CALLS, call));
        }
        // Posted writes, as many as the queue takes without anybody waiting; then many more, and a read behind them.
        posts.push(time(BURST, || client.region_post(0, 0x10, &WORD).unwrap()));
        client.region_read(0, 0, &mut [0; 4]).unwrap();
        let began = Instant::now();
        for _ in 0..CALLS {
            client.region_post(0, 0x10, &WORD).unwrap();
        }
        client.region_read(0, 0, &mut [0; 4]).unwrap();
        sustained.push(began.elapsed() / CALLS);
    }
    println!("One thread, four bytes, median of {ROUNDS} rounds of {CALLS} calls:");
    let medians: Vec<_> = times.iter_mut().map(|times| median(times)).collect();
    let (bare, read) = (medians[0], medians[1]);
    for ((name, _), median) in contenders.iter().zip(&medians) {
        println!(
            "  {name:32} {median:9.2?}  {:5.2} of bare",
            ratio(*median, bare)
        );
    }
    let post = median(&mut posts);
    println!(
        "  {:32} {post:9.2?}  {:5.2} of read",
        "posted write",
        ratio(post, read)
    );
    let each = median(&mut sustained);
    println!(
        "  {:32} {each:9.2?}  {:.0} a second",
        "posted write, sustained",
        1.0 / each.as_secs_f64()
    );
}

/// Eight threads read four bytes each, at once.
fn many_threads() {
    let bare: Vec<_> = serve(THREADS as usize).into_iter().map(Bare::new).collect();
    let shared = client(serve_one(), true);
    let locked = Mutex::new(client(serve_one(), true));
    let mut times = vec![Vec::new(); 3];
    for _ in 0..ROUNDS {
        times[0].push(together(|thread| bare[thread as usize].read()));
        times[1].push(together(|_| shared.region_read(0, 0, &mut [0; 4]).unwrap()));
        times[2].push(together(|_| {
            locked
                .lock()
                .unwrap()
                .region_read(0, 0, &mut [0; 4])
                .unwrap();
        }));
    }
    let medians: Vec<_> = times.iter_mut().map(|times| median(times)).collect();
    println!("{THREADS} threads, four bytes, median time of a read over all threads:");
    println!("  {:32} {:9.2?}", "bare, a socket each", medians[0]);
    println!(
        "  {:32} {:9.2?}  {:5.2} of bare's rate",
        "one client",
        medians[1],
        ratio(medians[0], medians[1])
    );
    println!(
        "  {:32} {:9.2?}  {:5.2} times its rate",
        "one client under one lock",
        medians[2],
        ratio(medians[2], medians[1])
    );
}

/// What is written.
const WORD: [u8; 4] = [1, 2, 3, 4];

/// Posted writes that fit into the socket's queue for certain.
const BURST: u32 = 64;

/// The time of one of `calls` calls.
fn time(calls: u32, mut call: impl FnMut()) -> Duration {
    let began = Instant::now();
    for _ in 0..calls {
        call();
    }
    began.elapsed() / calls
}

/// The time of a call when all threads make `CALLS` of them at once, divided by the number of threads.
fn together(call: impl Fn(u32) + Sync) -> Duration {
    let start = Barrier::new(THREADS as usize + 1);
    let began = thread::scope(|scope| {
        for thread in 0..THREADS {
            let (start, call) = (&start, &call);
            scope.spawn(move || {
                start.wait();
                for _ in 0..CALLS / 4 {
                    call(thread);
                }
            });
        }
        start.wait();
        Instant::now()
    });
    began.elapsed() / (CALLS / 4 * THREADS)
}

fn median(times: &mut [Duration]) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

fn ratio(a: Duration, b: Duration) -> f64 {
    a.as_secs_f64() / b.as_secs_f64()
}

/// No client at all: the same bytes by the same system calls.
struct Bare(UnixStream);

impl Bare {
    fn new(stream: UnixStream) -> Self {
        Self(stream)
    }

    fn read(&self) {
        let access = RegionAccess {
            offset: 0x10,
            region: 0,
            count: 4,
        };
        let header = Header::command(1, Command::RegionRead, size_of_val(&access));
        let parts = [
            IoSlice::new(header.as_bytes()),
            IoSlice::new(access.as_bytes()),
        ];
        sendmsg(
            &self.0,
            &parts,
            &mut SendAncillaryBuffer::default(),
            SendFlags::NOSIGNAL,
        )
        .unwrap();
        let mut reply = [0; 64];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = recvmsg(
            &self.0,
            &mut [IoSliceMut::new(&mut reply)],
            &mut control,
            RecvFlags::CMSG_CLOEXEC,
        );
        assert_eq!(received.unwrap().bytes, 36);
        black_box(reply);
    }
}

struct NoMemory;

impl GuestDma for NoMemory {
    fn read(&self, _: u64, _: &mut [u8]) -> Result<(), DmaError> {
        Err(DmaError)
    }

    fn write(&self, _: u64, _: &[u8]) -> Result<(), DmaError> {
        Err(DmaError)
    }
}

fn client(stream: UnixStream, twin_socket: bool) -> Client {
    let options = Options {
        twin_socket,
        ..Options::default()
    };
    Client::handshake(stream, Arc::new(NoMemory), &options).unwrap()
}

fn foreign_client() -> vfio_user::Client {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    thread::spawn(move || echo(vec![listener.accept().unwrap().0]));
    vfio_user::Client::new(&path).unwrap()
}

fn serve_one() -> UnixStream {
    serve(1).remove(0)
}

/// Connections to a server with one thread for all of them.
fn serve(connections: usize) -> Vec<UnixStream> {
    let (ours, theirs): (Vec<_>, Vec<_>) = (0..connections)
        .map(|_| UnixStream::pair().unwrap())
        .unzip();
    thread::spawn(move || echo(theirs));
    ours
}

/// Puts the server on the last CPU, if there are two, and so leaves the others to its clients.
fn settle() {
    let all = sched_getaffinity(None).unwrap();
    if all.count() < 2 {
        return;
    }
    let last = (0..CpuSet::MAX_CPU)
        .rev()
        .find(|cpu| all.is_set(*cpu))
        .unwrap();
    let mut server = CpuSet::new();
    server.set(last);
    sched_setaffinity(None, &server).unwrap();
}

/// A server whose one region reads as zeros.
fn echo(streams: Vec<UnixStream>) {
    settle();
    let mut twins = Vec::new();
    let mut connections: Vec<_> = streams.into_iter().map(Echo::new).collect();
    loop {
        let mut ready = vec![true];
        if connections.len() > 1 {
            let mut fds: Vec<_> = connections
                .iter()
                .map(|connection| PollFd::new(&connection.stream, PollFlags::IN))
                .collect();
            poll(&mut fds, None).unwrap();
            ready = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        }
        for (connection, ready) in connections.iter_mut().zip(ready) {
            if ready && !connection.serve(&mut twins) {
                return;
            }
        }
    }
}

/// A connection of the server, with what it has received of a message that is not complete.
struct Echo {
    stream: UnixStream,
    input: Vec<u8>,
    filled: usize,
}

impl Echo {
    fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            input: vec![0; 64 << 10],
            filled: 0,
        }
    }

    /// Receives once and answers every message that is complete. Returns `false` at the end of the connection.
    fn serve(&mut self, twins: &mut Vec<UnixStream>) -> bool {
        let Ok(received @ 1..) = self.stream.read(&mut self.input[self.filled..]) else {
            return false;
        };
        self.filled += received;
        let mut rest = &self.input[..self.filled];
        while let Ok((header, _)) = take::<Header>(rest)
            && let Some((message, next)) = rest.split_at_checked(header.size as usize)
        {
            answer(&mut self.stream, &header, &message[Header::SIZE..], twins);
            rest = next;
        }
        let left = self.filled - rest.len()..self.filled;
        self.filled = left.len();
        self.input.copy_within(left, 0);
        true
    }
}

fn answer(stream: &mut UnixStream, command: &Header, payload: &[u8], twins: &mut Vec<UnixStream>) {
    if command.is_posted() {
        return;
    }
    let mut fds: Vec<OwnedFd> = Vec::new();
    let mut reply = Vec::new();
    match Command::try_from(command.command).unwrap() {
        Command::Version => {
            let (_, theirs) = Version::decode(payload).unwrap();
            let mut ours = Capabilities::default();
            if theirs.twin_socket.is_some_and(|twin| twin.supported) {
                let (here, there) = UnixStream::pair().unwrap();
                twins.push(here);
                fds.push(there.into());
                ours.twin_socket = Some(TwinSocket {
                    supported: true,
                    fd_index: Some(0),
                });
            }
            let version = Version { major: 0, minor: 0 };
            reply = version.encode(&ours).unwrap();
        }
        Command::DeviceGetInfo => {
            let info = DeviceInfo {
                argsz: 16,
                flags: 2,
                num_regions: 1,
                num_irqs: 0,
            };
            reply.extend(info.as_bytes());
        }
        Command::DeviceGetRegionInfo => {
            let info = RegionInfo {
                argsz: 32,
                flags: 3,
                size: 0x1000,
                ..RegionInfo::default()
            };
            reply.extend(info.as_bytes());
        }
        Command::RegionRead => return answer_read(stream, command, payload),
        Command::RegionWrite => reply.extend(&payload[..16]),
        _ => {}
    }
    let header = command.reply(reply.len());
    send(
        stream,
        &[IoSlice::new(header.as_bytes()), IoSlice::new(&reply)],
        &fds,
    );
}

/// The one answer that is measured allocates nothing.
fn answer_read(stream: &mut UnixStream, command: &Header, payload: &[u8]) {
    let mut reply = [0; 36];
    reply[..16].copy_from_slice(command.reply(20).as_bytes());
    reply[16..32].copy_from_slice(payload);
    stream.write_all(&reply).unwrap();
}

fn send(stream: &UnixStream, parts: &[IoSlice<'_>], fds: &[OwnedFd]) {
    let fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
    }
    sendmsg(stream, parts, &mut control, SendFlags::NOSIGNAL).unwrap();
}
