//! The vfio-user client alone, beside what its calls would cost without one, and beside the client of the crate
//! `vfio_user`.
//!
//! The server is no server: it answers at once, with as few instructions as it can, so that all the difference is the
//! client's.

mod echo;

use std::hint::black_box;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Barrier, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{anyhow, ensure};
use rustix::net::{
    RecvAncillaryBuffer, RecvFlags, SendAncillaryBuffer, SendFlags, recvmsg, sendmsg,
};
use vfio_user_client::{Client, DmaError, GuestDma, Options};
use vfio_user_protocol::{Command, Header, MessageFlags, RegionAccess};
use zerocopy::IntoBytes;

use self::echo::Echo;
use crate::measurement::{Aim, Better, Definition, Measurement};
use crate::turns::Turns;
use crate::{Bench, placement};

const READ: Definition = Definition {
    key: "client_read_ratio",
    what: "a read of four bytes by the vfio-user client",
    unit: "us",
    better: Better::Less,
    limit: Some("a bare sendmsg and a bare recvmsg of the same bytes"),
    aims: &[Aim::OfLimit(1.15)],
};
const POSTED: Definition = Definition {
    key: "client_posted_write_ratio",
    what: "a write of four bytes of which no answer is waited for, of very many with a read behind them",
    limit: Some("a bare sendmsg of the same bytes"),
    aims: &[],
    ..READ
};
const PIPELINED: Definition = Definition {
    key: "client_pipelined_ratio",
    what: "a read of four bytes, of those that eight threads make at once with one client",
    limit: Some("the same with a bare socket for each thread"),
    aims: &[],
    ..READ
};

/// The other client.
const VFIO_USER: &str = "vfio_user 0.1";

const CALLS: u32 = 2000;
const THREADS: u32 = 8;

pub(crate) fn measure(bench: &mut Bench) -> anyhow::Result<()> {
    let rounds = bench.rounds(31);
    for measurement in [
        one_read(rounds)?,
        posted_writes(rounds)?,
        many_reads(rounds)?,
    ] {
        bench.add(measurement);
    }
    Ok(())
}

fn one_read(rounds: usize) -> anyhow::Result<Measurement> {
    let (client, bare, mut foreign) = (client()?, Bare::new()?, foreign()?);
    let mut turns = Turns::new(|| time(CALLS, || Ok(client.region_read(0, 0x10, &mut [0; 4])?)));
    turns.peer(VFIO_USER, move || {
        time(CALLS, || {
            let read = foreign.region_read(0, 0x10, &mut [0; 4]);
            read.map_err(|error| anyhow!("{error:?}"))
        })
    });
    turns.limit(|| time(CALLS, || bare.read()));
    Ok(turns.take(rounds)?.measurement(&READ, |time| *time))
}

fn posted_writes(rounds: usize) -> anyhow::Result<Measurement> {
    let (client, bare, mut foreign) = (client()?, Bare::new()?, foreign()?);
    let mut turns = Turns::new(|| {
        sustained(
            || Ok(client.region_post(0, 0x10, &WORD)?),
            || Ok(client.region_read(0, 0x10, &mut [0; 4])?),
        )
    });
    // It knows no posted writes.
    turns.peer(VFIO_USER, move || {
        time(CALLS, || {
            let written = foreign.region_write(0, 0x10, &WORD);
            written.map_err(|error| anyhow!("{error:?}"))
        })
    });
    turns.limit(|| sustained(|| bare.post(), || bare.read()));
    Ok(turns.take(rounds)?.measurement(&POSTED, |time| *time))
}

fn many_reads(rounds: usize) -> anyhow::Result<Measurement> {
    let client = client()?;
    let foreign = Mutex::new(foreign()?);
    let bare = Bare::many(THREADS)?;
    let mut turns = Turns::new(|| together(|_| Ok(client.region_read(0, 0x10, &mut [0; 4])?)));
    turns.peer(VFIO_USER, || {
        together(|_| {
            let mut foreign = foreign.lock().map_err(|_| anyhow!("a thread panicked"))?;
            let read = foreign.region_read(0, 0x10, &mut [0; 4]);
            read.map_err(|error| anyhow!("{error:?}"))
        })
    });
    turns.limit(|| {
        together(|thread| match bare.get(thread as usize) {
            Some(bare) => bare.read(),
            None => Ok(()),
        })
    });
    Ok(turns.take(rounds)?.measurement(&PIPELINED, |time| *time))
}

/// What is written.
const WORD: [u8; 4] = [1, 2, 3, 4];

/// The time of one of so many calls, in microseconds.
fn time(calls: u32, mut call: impl FnMut() -> anyhow::Result<()>) -> anyhow::Result<f64> {
    placement::on_one_cpu(|| {
        let began = Instant::now();
        for _ in 0..calls {
            call()?;
        }
        Ok(each(began.elapsed(), calls))
    })
}

/// The time of one of very many posts, behind which a read waits for all of them.
fn sustained(
    mut post: impl FnMut() -> anyhow::Result<()>,
    read: impl Fn() -> anyhow::Result<()>,
) -> anyhow::Result<f64> {
    const POSTS: u32 = 10 * CALLS;
    placement::on_one_cpu(|| {
        let began = Instant::now();
        for _ in 0..POSTS {
            post()?;
        }
        read()?;
        Ok(each(began.elapsed(), POSTS))
    })
}

/// The time of a call of all threads together, which make so many at once.
fn together(call: impl Fn(u32) -> anyhow::Result<()> + Sync) -> anyhow::Result<f64> {
    const CALLS_EACH: u32 = CALLS / 4;
    let start = Barrier::new(THREADS as usize + 1);
    let make_calls = |thread| {
        start.wait();
        (0..CALLS_EACH).try_for_each(|_| call(thread))
    };
    let make_calls = &make_calls;
    placement::on_one_cpu(|| {
        thread::scope(|scope| {
            let threads: Vec<_> = (0..THREADS)
                .map(|thread| scope.spawn(move || make_calls(thread)))
                .collect();
            start.wait();
            let began = Instant::now();
            for thread in threads {
                thread.join().map_err(|_| anyhow!("a thread panicked"))??;
            }
            Ok(each(began.elapsed(), THREADS * CALLS_EACH))
        })
    })
}

fn each(all: Duration, count: u32) -> f64 {
    all.as_secs_f64() * 1e6 / f64::from(count)
}

fn client() -> anyhow::Result<Client> {
    let stream = Echo::start()?;
    Ok(Client::handshake(
        stream,
        Arc::new(NoMemory),
        &Options::default(),
    )?)
}

fn foreign() -> anyhow::Result<vfio_user::Client> {
    let (_folder, socket) = Echo::listen()?;
    vfio_user::Client::new(&socket).map_err(|error| anyhow!("{error:?}"))
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

/// No client at all: the same bytes by the system calls that no client can do without, for descriptors may come with any
/// message.
struct Bare {
    stream: UnixStream,
    access: RegionAccess,
}

impl Bare {
    fn new() -> anyhow::Result<Self> {
        Ok(Self::on(Echo::start()?))
    }

    /// So many, all served by one thread.
    fn many(count: u32) -> anyhow::Result<Vec<Self>> {
        Ok(Echo::start_many(count)?.into_iter().map(Self::on).collect())
    }

    fn on(stream: UnixStream) -> Self {
        Self {
            stream,
            access: RegionAccess {
                offset: 0x10,
                region: 0,
                count: 4,
            },
        }
    }

    fn read(&self) -> anyhow::Result<()> {
        let header = Header::command(1, Command::RegionRead, size_of::<RegionAccess>());
        self.send(&header, &[])?;
        let mut reply = [0; 36];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = recvmsg(
            &self.stream,
            &mut [IoSliceMut::new(&mut reply)],
            &mut control,
            RecvFlags::CMSG_CLOEXEC,
        )?;
        ensure!(received.bytes == reply.len(), "the answer is in pieces");
        black_box(reply);
        Ok(())
    }

    fn post(&self) -> anyhow::Result<()> {
        let size = size_of::<RegionAccess>() + WORD.len();
        let mut header = Header::command(1, Command::RegionWrite, size);
        header.flags |= MessageFlags::NO_REPLY.bits();
        self.send(&header, &WORD)
    }

    fn send(&self, header: &Header, data: &[u8]) -> anyhow::Result<()> {
        let parts = [header.as_bytes(), self.access.as_bytes(), data].map(IoSlice::new);
        let mut control = SendAncillaryBuffer::default();
        sendmsg(&self.stream, &parts, &mut control, SendFlags::NOSIGNAL)?;
        Ok(())
    }
}
