//! How long the control API takes to answer, when one client asks and when many do at once.

use std::path::Path;
use std::thread;
use std::time::Instant;

use anyhow::anyhow;
use tests::api::request;
use tests::tiny;

use crate::Bench;
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

/// Asks for `vm.info` while a guest runs.
pub(crate) fn measure(bench: &mut Bench) -> anyhow::Result<()> {
    let kernel = tiny::guest(|code| {
        code.print(b'x')?;
        code.halt()
    })?;
    let folder = tempfile::tempdir()?;
    let socket = folder.path().join("api.sock");
    let guest = Guest::small(kernel.path(), &[]);
    let mut command = bench.programs.outrigger(&guest);
    command.arg("--api-socket").arg(&socket);
    let mut vmm = Running::start(&mut command)?;
    vmm.wait_for(b'x', None)?;
    ask(&socket)?;
    let alone = ask(&socket)?;
    let together = thread::scope(|scope| -> anyhow::Result<Vec<f64>> {
        let clients: Vec<_> = (0..CLIENTS).map(|_| scope.spawn(|| ask(&socket))).collect();
        let mut all = Vec::new();
        for client in clients {
            all.extend(client.join().map_err(|_| anyhow!("a client panicked"))??);
        }
        Ok(all)
    })?;
    for (case, times) in [
        ("1 client".to_owned(), alone),
        (format!("{CLIENTS} clients"), together),
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

/// How long each request took, in milliseconds.
fn ask(socket: &Path) -> anyhow::Result<Vec<f64>> {
    let one = |_| {
        let asked = Instant::now();
        request(socket, "GET", "vm.info", "")?;
        Ok(asked.elapsed().as_secs_f64() * 1e3)
    };
    (0..REQUESTS).map(one).collect()
}
