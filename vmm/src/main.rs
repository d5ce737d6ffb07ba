//! The `outrigger` command.

mod cli;
mod remote;
mod serve;
mod vfio_command;

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use vmm::api::Api;
use vmm::control::RestoreRequest;
use vmm::private_socket::PrivateSocket;
use vmm::{Ending, Events, VmConfig, Vmm};

use crate::cli::{Cli, Command};

fn main() -> ExitCode {
    let cli = match Cli::from_arguments() {
        Ok(cli) => cli,
        Err(code) => return code,
    };
    cli.set_up_log();
    let done = match &cli.command {
        Some(Command::Serve(device)) => serve::run(device),
        Some(Command::Remote(arguments)) => remote::run(arguments),
        Some(Command::Vfio(command)) => vfio_command::run(command).map(|()| ExitCode::SUCCESS),
        None => run(&cli).map(|ending| report(&ending)),
    };
    done.unwrap_or_else(|error| {
        eprintln!("outrigger: {error:#}");
        ExitCode::FAILURE
    })
}

/// Runs a VMM until it ends.
fn run(cli: &Cli) -> anyhow::Result<Ending> {
    let config = cli.vm_config()?;
    let restore = cli.restore_request()?;
    let listen = |path: &Path| PrivateSocket::bind("--api-socket", path);
    let socket = cli.api_socket()?.as_deref().map(listen).transpose()?;
    let events = cli.event_monitor()?.as_deref().map(Events::open);
    let events = events.transpose()?.unwrap_or_default();
    let mut vmm = Vmm::new(cli.policy(), events.clone())?;
    let api = socket.map(|socket| Api::serve(socket, vmm.control()));
    let api = api.transpose()?;
    let ending = boot_and_run(&mut vmm, config, restore);
    // Whoever waits for an answer of the VMM gets one when it has ended.
    drop(vmm);
    drop(api);
    events.flush(LAST_EVENTS);
    ending
}

/// How long writing the last events may take.
const LAST_EVENTS: Duration = Duration::from_secs(1);

fn boot_and_run(
    vmm: &mut Vmm,
    config: Option<VmConfig>,
    restore: Option<RestoreRequest>,
) -> anyhow::Result<Ending> {
    if let Some(config) = config {
        vmm.boot(config)?;
    }
    if let Some(request) = restore {
        // Whether the guest can run here will turn out.
        vmm.restore(request)?;
    } else if vmm::only_emulates() {
        eprintln!(
            "outrigger: warning: this KVM only emulates guests (the CPU has neither VMX nor SVM): simple ones run, \
             slowly; a stock Linux kernel does not boot"
        );
    }
    Ok(vmm.run()?)
}

/// Says how the guest ended, if it is not as usual.
fn report(ending: &Ending) -> ExitCode {
    log::info!("{ending}");
    if ending.exit_status() != 0 {
        eprintln!("outrigger: {ending}");
    }
    ExitCode::from(ending.exit_status())
}
