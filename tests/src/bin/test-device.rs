//! Serves the test device, to one client after the other, until it is killed.

use std::io::{self, Write};
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Parser;

/// A vfio-user server with a PCI device that exercises everything a VMM must carry.
#[derive(Debug, Parser)]
struct Options {
    /// Where to listen; a socket that is left over there is replaced.
    #[arg(long)]
    socket: PathBuf,
}

fn main() -> Result<()> {
    env_logger::init();
    let Options { socket } = Options::parse();
    tests::device::serve(&socket, || {
        println!("listening on {}", socket.display());
        let _ = io::stdout().flush();
    })
    .with_context(|| format!("serving {}", socket.display()))
}
