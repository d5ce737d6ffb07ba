//! `outrigger remote`: the command line of the control API.

mod arguments;
mod client;
mod migrate;

use std::fs;
use std::io::{Read as _, Write as _, stdin, stdout};
use std::path::Path;
use std::process::ExitCode;

use anyhow::Context as _;
use hyper::Method;
use hyper::body::Bytes;
use serde_json::Value;
use vmm::api::body::SnapshotConfig;

pub(crate) use self::arguments::Arguments;
use self::arguments::{Verb, receive_data, restore_config};
use self::client::{Client, RemoteError};

/// Has the VMM do what the arguments say, and prints what it answers.
pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let socket = arguments.socket()?;
    let Err(error) = ask(&socket, &arguments.verb) else {
        return Ok(ExitCode::SUCCESS);
    };
    match error.downcast::<RemoteError>() {
        Ok(error) => {
            eprintln!("outrigger: {error}");
            Ok(ExitCode::from(error.exit_status()))
        }
        Err(error) => Err(error),
    }
}

fn ask(socket: &Path, verb: &Verb) -> anyhow::Result<()> {
    if let Verb::Migrate(migrate) = verb {
        return migrate::migrate(socket, &migrate.body());
    }
    let mut vmm = Client::connect(socket)?;
    match verb {
        Verb::Ping => print(&vmm.get("vmm.ping")?),
        Verb::Info => print(&vmm.get("vm.info")?),
        Verb::Counters => print(&vmm.get("vm.counters")?),
        Verb::Migration => print(&vmm.get("vm.migration")?),
        Verb::Create { file } => {
            let config = read(file)?.into();
            Ok(vmm.send(Method::PUT, "vm.create", config).map(drop)?)
        }
        Verb::Boot => vmm.put("vm.boot"),
        Verb::Pause => vmm.put("vm.pause"),
        Verb::Resume => vmm.put("vm.resume"),
        Verb::Reboot => vmm.put("vm.reboot"),
        Verb::PowerButton => vmm.put("vm.power-button"),
        Verb::Shutdown => vmm.put("vm.shutdown"),
        Verb::Delete => vmm.put("vm.delete"),
        Verb::ShutdownVmm => vmm.put("vmm.shutdown"),
        Verb::Snapshot { url } => vmm.put_json("vm.snapshot", &SnapshotConfig::new(url)),
        Verb::Restore(restore) => vmm.put_json("vm.restore", &restore_config(restore)?),
        Verb::Receive(receive) => vmm.put_json("vm.receive-migration", &receive_data(receive)?),
        Verb::Cancel => Ok(vmm
            .send(Method::DELETE, "vm.migration", Bytes::new())
            .map(drop)?),
        Verb::Resolve(resolve) => vmm.put_json("vm.resolve-migration", &resolve.body()),
        Verb::Migrate(_) => Ok(()),
    }
}

/// Prints JSON for people, and for programs.
fn print(body: &Bytes) -> anyhow::Result<()> {
    let body: Value = serde_json::from_slice(body).context("the answer is not JSON")?;
    // Whoever has closed the pipe has seen enough.
    let _ = writeln!(stdout(), "{body:#}");
    Ok(())
}

fn read(file: &Path) -> anyhow::Result<Vec<u8>> {
    if file == Path::new("-") {
        let mut bytes = Vec::new();
        stdin()
            .read_to_end(&mut bytes)
            .context("cannot read standard input")?;
        return Ok(bytes);
    }
    fs::read(file).with_context(|| format!("cannot read {}", file.display()))
}
