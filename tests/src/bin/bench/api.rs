//! How long the control API takes to answer, when one client asks and when many do at once.

use std::path::{Path, PathBuf};
use std::thread;
use std::time::Instant;

use anyhow::anyhow;
use iced_x86::code_asm::{dword_ptr, eax, ebp};
use tempfile::{NamedTempFile, TempDir};
use tests::api::request;
use tests::tiny;

use crate::Bench;
use crate::device::{HANGS, Hanging};
use crate::driver::{self, FAILED};
use crate::measurement::{Better, Definition, Measurement, Series};
use crate::program::Running;
use crate::programs::Guest;

const LATENCY: Definition = Definition {
    key: "api_latency_ms",
    what: "vm.info over the API's socket, a new connection for each request",
    unit: "ms",
    better: Better::Less,
    limit: None,
    aims: &[],
};

const CLIENTS: usize = 32;
const REQUESTS: usize = 100;

/// Asks for `vm.info` while a guest runs, and while one waits for a device that hangs.
pub(crate) fn measure(bench: &mut Bench) -> anyhow::Result<()> {
    let kernel = tiny::guest(|code| {
        code.print(READY)?;
        code.halt()
    })?;
    let vmm = Vmm::start(bench, &Guest::small(kernel.path(), &[]))?;
    let alone = ask(&vmm.socket)?;
    let together = thread::scope(|scope| -> anyhow::Result<Vec<f64>> {
        let ask = || ask(&vmm.socket);
        let clients: Vec<_> = (0..CLIENTS).map(|_| scope.spawn(ask)).collect();
        let mut all = Vec::new();
        for client in clients {
            all.extend(client.join().map_err(|_| anyhow!("a client panicked"))??);
        }
        Ok(all)
    })?;

    let hanging = Hanging::serve()?;
    let kernel = waiting_guest()?;
    let devices = [hanging.socket().to_owned()];
    let vmm = Vmm::start(bench, &Guest::small(kernel.path(), &devices))?;
    let beside_hung = ask(&vmm.socket)?;
    drop(vmm);

    for (case, times) in [
        ("1 client".to_owned(), alone),
        (format!("{CLIENTS} clients"), together),
        ("1 client, a device hung".to_owned(), beside_hung),
    ] {
        bench.add(Measurement {
            definition: &LATENCY,
            case: Some(case),
            ours: Series(times),
            peers: Vec::new(),
            limit: None,
        });
    }
    Ok(())
}

/// What guests say when they are where they stay.
const READY: u8 = b'x';

/// A guest that waits for a device for ever.
fn waiting_guest() -> anyhow::Result<NamedTempFile> {
    tiny::guest(|code| {
        let mut fails = code.create_label();
        let mut again = code.create_label();
        code.allow_interrupts()?;
        code.cli()?;
        driver::find(code, 0, fails)?;
        code.set_label(&mut again)?;
        code.print(READY)?;
        code.mov(
            eax,
            dword_ptr(ebp + i32::try_from(HANGS).unwrap_or_default()),
        )?;
        code.jmp(again)?;
        code.set_label(&mut fails)?;
        code.print(FAILED)?;
        code.halt()
    })
}

/// Outrigger with its API.
struct Vmm {
    socket: PathBuf,
    _process: Running,
    _folder: TempDir,
}

impl Vmm {
    /// Starts it, and waits until its guest is where it stays.
    fn start(bench: &Bench, guest: &Guest<'_>) -> anyhow::Result<Self> {
        let folder = tempfile::tempdir()?;
        let socket = folder.path().join("api.sock");
        let mut command = bench.programs.outrigger(guest);
        command.arg("--api-socket").arg(&socket);
        let mut process = Running::start(&mut command)?;
        process.wait_for(READY, Some(FAILED))?;
        ask(&socket)?;
        Ok(Self {
            socket,
            _process: process,
            _folder: folder,
        })
    }
}

/// How long each request took, in milliseconds.
fn ask(socket: &Path) -> anyhow::Result<Vec<f64>> {
    let one = |_| {
        let asked = Instant::now();
        request(socket, "GET", "vm.info", "")?;
        Ok(asked.elapsed().as_secs_f64() * 1e3)
    };
    (0..REQUESTS).map(one).collect()
}
