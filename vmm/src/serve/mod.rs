//! `outrigger serve`: a built-in device in a process of its own, for any VMM, or for the VM that started it.

mod arguments;
mod attached;

use std::path::Path;
use std::process::ExitCode;

use anyhow::Context as _;
use device_servers::sandbox::{self, Role};
use device_servers::{demo, disk, net};
use rustix::fs::Mode;
use rustix::process::umask;
use vfio_user_server::{Listener, Server};

use self::arguments::Client;
pub(crate) use self::arguments::Device;

/// Serves a device: until it is ended, or until the VM that it is for has ended.
pub(crate) fn run(device: &Device) -> anyhow::Result<ExitCode> {
    match device {
        Device::Demo { to } => serve(
            to,
            Role::Demo,
            || Ok(()),
            |()| Ok(demo::server(&demo::Options::new(""))?),
        ),
        Device::Disk { disk, to } => serve(
            to,
            Role::Disk,
            || Ok(disk::open(&disk.options())?),
            |disk| Ok(disk.server()?),
        ),
        Device::Net { net, to } => serve(
            to,
            Role::Net,
            || Ok(net::open(&net.options()?)?),
            |net| Ok(net.server()?),
        ),
    }
}

/// Serves the device that `server` makes. What it needs of the host is what `open` returns: the sandbox is between the
/// two.
fn serve<O, D: vfio_user_server::Device>(
    to: &Client,
    role: Role,
    open: impl FnOnce() -> anyhow::Result<O>,
    server: impl FnOnce(O) -> anyhow::Result<Server<D>>,
) -> anyhow::Result<ExitCode> {
    let sandboxed = |opened| {
        sandbox::enter(role)?;
        server(opened)
    };
    match &to.socket {
        Some(socket) => listen(socket, open()?, sandboxed).map(|()| ExitCode::SUCCESS),
        None => attached::serve(role.name(), || sandboxed(open()?)),
    }
}

/// Serves one client after the other.
fn listen<O, D: vfio_user_server::Device>(
    socket: &Path,
    opened: O,
    server: impl FnOnce(O) -> anyhow::Result<Server<D>>,
) -> anyhow::Result<()> {
    // Whoever connects can do with the device what a guest can.
    umask(Mode::RWXG | Mode::RWXO);
    let flag = || format!("--socket {}", socket.display());
    let listener = Listener::bind(socket).with_context(flag)?;
    let mut server = server(opened)?;
    println!("listening on {}", socket.display());
    server.run(&listener).with_context(flag)
}
