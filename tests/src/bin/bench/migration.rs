//! How long a guest stands still while it moves to another process, and how fast its memory goes there.
//!
//! Standstill is measured with a guest that writes to the serial port all the time, so that everyone's is seen from outside
//! and in the same way: from the last character that comes out of the one process to the first that comes out of the other.
//! Such a guest takes a CPU for itself. Speed is therefore measured with an idle one, too.

use std::io::{self, Read};
use std::net::TcpListener;
use std::path::Path;
use std::process::{ChildStdout, Command};
use std::time::{Duration, Instant};
use std::{fs, thread};

use anyhow::{Context, anyhow, bail};
use serde_json::{Value, json};
use tests::api::request;

use crate::Bench;
use crate::bare::dirty_scan;
use crate::full_guest::{Life, READY, full_guest};
use crate::http::put;
use crate::measurement::{Aim, Better, Definition, Measurement};
use crate::plain_copy::Copy;
use crate::program::{Running, wait_for};
use crate::programs::{CLOUD_HYPERVISOR, Guest};
use crate::turns::{Results, Turns};

const DOWNTIME: Definition = Definition {
    key: "migrate_downtime_ms",
    what: "from the last character of a migrating guest at its source to the first at its destination",
    unit: "ms",
    better: Better::Less,
    limit: None,
    aims: &[Aim::OfEachPeer(1.0 / 3.0)],
};
const SPEED: Definition = Definition {
    key: "migrate_gibps",
    what: "an idle guest's memory, or a writing one's, of which every page is in use, by the time that the migration took",
    unit: "GiB/s",
    better: Better::More,
    limit: Some("a plain copy of the same memory over the same sockets"),
    aims: &[],
};
const PARTS: Definition = Definition {
    key: "migrate_downtime_parts_ms",
    what: "what the guest's standstill went to, as Outrigger says",
    unit: "ms",
    better: Better::Less,
    limit: None,
    aims: &[],
};
const DIRTY_SCAN: Definition = Definition {
    key: "memory_dirty_scan_us_per_gib",
    what: "of the standstill, what it took to learn which pages the guest had written to",
    unit: "us",
    better: Better::Less,
    limit: Some("a bare KVM_GET_DIRTY_LOG"),
    aims: &[],
};

/// The way that memory takes, and what the guest does meanwhile.
#[derive(Clone, Copy, Debug)]
struct Kind {
    name: &'static str,
    way: Way,
    connections: u32,
    life: Life,
    /// Whether it is worth the time when there is little.
    quick: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Unix,
    Tcp,
}

const KINDS: [Kind; 9] = [
    kind("unix", Way::Unix, 1, Life::Idle).worthwhile(),
    kind("tcp, 1 connection", Way::Tcp, 1, Life::Idle),
    kind("tcp, 4 connections", Way::Tcp, 4, Life::Idle),
    kind("unix", Way::Unix, 1, Life::Talking).worthwhile(),
    kind("tcp, 1 connection", Way::Tcp, 1, Life::Talking),
    kind("tcp, 4 connections", Way::Tcp, 4, Life::Talking),
    kind("unix, writing", Way::Unix, 1, Life::Writing),
    kind("tcp, 1 connection, writing", Way::Tcp, 1, Life::Writing),
    kind("tcp, 4 connections, writing", Way::Tcp, 4, Life::Writing).worthwhile(),
];

const fn kind(name: &'static str, way: Way, connections: u32, life: Life) -> Kind {
    Kind {
        name,
        way,
        connections,
        life,
        quick: false,
    }
}

impl Kind {
    const fn worthwhile(self) -> Self {
        Self {
            quick: true,
            ..self
        }
    }
}

/// What a migration showed.
#[derive(Debug, Default)]
struct Figures {
    /// 0 where nobody can see it.
    downtime_ms: f64,
    gibps: f64,
    /// Parts of the downtime by name, in microseconds, if the VMM tells.
    parts: Value,
}

impl Figures {
    fn part_us(&self, name: &str) -> f64 {
        self.parts[name].as_f64().unwrap_or(f64::NAN)
    }
}

/// The parts that Outrigger tells of, in their order.
const DOWNTIME_PARTS: [&str; 6] = [
    "pause",
    "devices",
    "dirty_log",
    "copy",
    "destination",
    "commit",
];

pub(crate) fn measure(bench: &mut Bench) -> anyhow::Result<()> {
    let mebibytes = if bench.quick { 256 } else { 1024 };
    let mut speeds = Vec::new();
    let mut parts = Vec::new();
    for kind in KINDS {
        if bench.quick && !kind.quick {
            continue;
        }
        let results = migrate_often(bench, kind, mebibytes)?;
        if kind.life != Life::Idle {
            let mut downtime = results.measurement(&DOWNTIME, |run| run.downtime_ms);
            // A copy has no guest that could stand still.
            downtime.limit = None;
            bench.add(downtime.in_case(kind.name));
        }
        if kind.life != Life::Talking {
            let speed = results.measurement(&SPEED, |run| run.gibps);
            speeds.push(speed.in_case(kind.name));
        }
        if parts.is_empty() && kind.life == Life::Talking {
            parts = tell_parts(&results, mebibytes);
        }
        let key = match kind.life {
            Life::Idle => SPEED.key,
            Life::Talking | Life::Writing => DOWNTIME.key,
        };
        let what = format!("{key} {}", kind.name);
        bench.failed(&what, results.failures);
    }
    speeds
        .into_iter()
        .chain(parts)
        .for_each(|one| bench.add(one));
    Ok(())
}

/// What no peer tells of.
fn tell_parts(results: &Results<Figures>, mebibytes: u32) -> Vec<Measurement> {
    let without_peers = |definition, number: &dyn Fn(&Figures) -> f64| Measurement {
        peers: Vec::new(),
        ..results.measurement(definition, number)
    };
    let part = |name| {
        let part = without_peers(&PARTS, &|run| run.part_us(name) / 1e3);
        let part = Measurement {
            limit: None,
            ..part
        };
        part.in_case(name)
    };
    let mut all: Vec<_> = DOWNTIME_PARTS.into_iter().map(part).collect();
    let gibibytes = f64::from(mebibytes) / 1024.0;
    all.push(without_peers(&DIRTY_SCAN, &|run| {
        run.part_us("dirty_log") / gibibytes
    }));
    all
}

fn migrate_often(bench: &Bench, kind: Kind, mebibytes: u32) -> anyhow::Result<Results<Figures>> {
    let kernel = full_guest(mebibytes, kind.life)?;
    let vm = Guest {
        mebibytes,
        ..Guest::small(kernel.path(), &[])
    };
    let turn = |mut source: Command, mut destination: Command| {
        move || migrate(&mut source, &mut destination, kind, mebibytes)
    };
    let programs = &bench.programs;
    // A VMM without a VM is what a guest can move to.
    let mut source = programs.outrigger(&vm);
    // It then still tells how it went.
    source.arg("--no-shutdown");
    let mut turns = Turns::new(turn(source, Command::new(&programs.outrigger)));
    if let (Some(source), Some(path)) = (programs.cloud_hypervisor(&vm), &programs.cloud_hypervisor)
    {
        turns.peer(CLOUD_HYPERVISOR, turn(source, Command::new(path)));
    }
    let copy = Copy::new(u64::from(mebibytes) << 20)?;
    turns.limit(move || {
        let time = match kind.way {
            Way::Unix => copy.over_unix(kind.connections),
            Way::Tcp => copy.over_tcp(kind.connections),
        };
        let scan = dirty_scan(u64::from(mebibytes) << 20)?.as_secs_f64() * 1e6;
        Ok(Figures {
            gibps: gibps(mebibytes, time?),
            parts: json!({"dirty_log": scan}),
            ..Figures::default()
        })
    });
    turns.take(bench.rounds(7))
}

fn gibps(mebibytes: u32, time: Duration) -> f64 {
    f64::from(mebibytes) / 1024.0 / time.as_secs_f64()
}

/// Has a guest move from one new process to another.
fn migrate(
    source: &mut Command,
    destination: &mut Command,
    kind: Kind,
    mebibytes: u32,
) -> anyhow::Result<Figures> {
    let folder = tempfile::tempdir()?;
    let [from, to] = ["from.sock", "to.sock"].map(|name| folder.path().join(name));
    let mut source = Running::start(copy_of(source).arg("--api-socket").arg(&from))?;
    let mut destination = Running::start(copy_of(destination).arg("--api-socket").arg(&to))?;
    source.wait_for(READY, None)?;
    let url = match kind.way {
        Way::Unix => format!("unix:{}", folder.path().join("migration.sock").display()),
        Way::Tcp => format!("tcp:127.0.0.1:{}", free_port()?),
    };
    wait_for_listener(&from)?;
    wait_for_listener(&to)?;

    let mut said_there = destination.take_output()?;
    let mut said_here = source.take_output()?;
    let receive = json!({"receiver_url": url}).to_string();
    thread::scope(|scope| {
        let receiving = scope.spawn(|| put(&to, "vm.receive-migration", &receive));
        match kind.way {
            Way::Unix => wait_for_listener(&folder.path().join("migration.sock"))?,
            Way::Tcp => wait_for_port(&url)?,
        }
        let last = scope.spawn(move || last_character(&mut said_here));
        let first = scope.spawn(move || match kind.life {
            Life::Idle => Ok(None),
            Life::Talking | Life::Writing => {
                wait_for(&mut said_there, |_| true).map(|(_, first)| Some(first))
            }
        });
        let body = json!({"destination_url": url, "connections": kind.connections});
        let began = Instant::now();
        let sent = put(&from, "vm.send-migration", &body.to_string());
        if sent.is_err() {
            // So that nobody waits for what does not come.
            drop(destination);
        }
        // Cloud Hypervisor's source answers before it has sent anything.
        let received = receiving.join().map_err(|_| anyhow!("a thread panicked"))?;
        let time = began.elapsed();
        let parts = request(&from, "GET", "vm.migration", "").map(|answer| answer.body);
        let moved = sent.and(received).map_err(|error| source.explain(error));
        drop(source);
        let last = last.join().map_err(|_| anyhow!("a thread panicked"))?;
        let first = first.join().map_err(|_| anyhow!("a thread panicked"))?;
        moved?;
        let (last, first) = (last?, first?);
        let downtime = first.map(|first| first.saturating_duration_since(last));
        Ok(Figures {
            downtime_ms: downtime.unwrap_or_default().as_secs_f64() * 1e3,
            gibps: gibps(mebibytes, time),
            parts: parts.map_or(Value::Null, |body| body["downtime_parts_us"].clone()),
        })
    })
}

/// The same command once more, to be added to.
fn copy_of(command: &Command) -> Command {
    let mut copy = Command::new(command.get_program());
    copy.args(command.get_args());
    copy
}

/// When the last character came before the end.
fn last_character(output: &mut ChildStdout) -> io::Result<Instant> {
    let mut last = Instant::now();
    let mut buffer = [0; 4096];
    while output.read(&mut buffer)? > 0 {
        last = Instant::now();
    }
    Ok(last)
}

fn free_port() -> io::Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

/// Waits until somebody listens on a Unix socket, without connecting to it.
fn wait_for_listener(path: &Path) -> anyhow::Result<()> {
    // The flag of a socket that accepts connections (`__SO_ACCEPTCON`).
    const LISTENS: &str = " 00010000 ";
    let path = path.display().to_string();
    wait_for_line("/proc/net/unix", |line| {
        line.ends_with(&path) && line.contains(LISTENS)
    })
}

/// The same of a TCP port.
fn wait_for_port(url: &str) -> anyhow::Result<()> {
    let port = url.rsplit(':').next().context("no port")?;
    let local = format!(":{:04X} ", port.parse::<u16>()?);
    // State 10 is listening (`TCP_LISTEN`).
    wait_for_line("/proc/net/tcp", |line| {
        let fields: Vec<_> = line.split_ascii_whitespace().collect();
        fields
            .get(1)
            .is_some_and(|address| format!("{address} ").ends_with(&local))
            && fields.get(3) == Some(&"0A")
    })
}

fn wait_for_line(file: &str, is_it: impl Fn(&str) -> bool) -> anyhow::Result<()> {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !fs::read_to_string(file)?.lines().any(&is_it) {
        if Instant::now() > deadline {
            bail!("nobody listens");
        }
        thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}
