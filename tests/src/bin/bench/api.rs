//! How long the control API takes to answer, when one client asks and when many do at once.

use std::path::Path;
use std::thread;
use std::time::Instant;

use anyhow::anyhow;
use tests::api::request;
use tests::tiny;

use crate::program::Running;
use crate::{Arguments, percentile};

const CLIENTS: usize = 32;
const REQUESTS: usize = 100;

/// Asks for `vm.info` while a guest runs, over a new connection each time.
pub(crate) fn measure(arguments: &Arguments) -> anyhow::Result<()> {
    let kernel = tiny::guest(|code| {
        code.print(b'x')?;
        code.halt()
    })?;
    let folder = tempfile::tempdir()?;
    let socket = folder.path().join("api.sock");
    let command = [
        arguments.outrigger.clone(),
        "--kernel".into(),
        kernel.path().to_owned(),
        "--api-socket".into(),
        socket.clone(),
    ];
    let mut vmm = Running::start(&command)?;
    vmm.wait_for(b'x', None)?;
    let alone = ask(&socket)?;
    let together = thread::scope(|scope| -> anyhow::Result<Vec<f64>> {
        let clients: Vec<_> = (0..CLIENTS).map(|_| scope.spawn(|| ask(&socket))).collect();
        let mut all = Vec::new();
        for client in clients {
            all.extend(client.join().map_err(|_| anyhow!("a client panicked"))??);
        }
        Ok(all)
    })?;
    println!("vm.info over the API's socket, a connection for each request");
    println!("{:18} {:>12} {:>12}", "", "median ms", "99 % ms");
    for (name, times) in [
        ("1 client".to_owned(), alone),
        (format!("{CLIENTS} clients"), together),
    ] {
        let [middle, high] = [50, 99].map(|percent| percentile(times.clone(), percent));
        println!("{name:18} {middle:12.2} {high:12.2}");
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
