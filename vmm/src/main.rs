//! The `outrigger` command.

mod cli;
mod serve;
mod vfio_command;

use std::process::ExitCode;

use anyhow::Context as _;
use vmm::{Ending, Vm};

use crate::cli::{Cli, Command};

fn main() -> ExitCode {
    let cli = match Cli::from_arguments() {
        Ok(cli) => cli,
        Err(code) => return code,
    };
    cli.set_up_log();
    let done = match &cli.command {
        Some(Command::Serve(device)) => serve::run(device),
        Some(Command::Vfio(command)) => vfio_command::run(command).map(|()| ExitCode::SUCCESS),
        None => run(&cli).map(|ending| report(&ending)),
    };
    done.unwrap_or_else(|error| {
        eprintln!("outrigger: {error:#}");
        ExitCode::FAILURE
    })
}

/// Runs a guest until it ends for good.
fn run(cli: &Cli) -> anyhow::Result<Ending> {
    let mut vm = Vm::new(&cli.vm_config()?)?;
    if vmm::only_emulates() {
        eprintln!(
            "outrigger: warning: this KVM only emulates guests (the CPU has neither VMX nor SVM): simple ones run, \
             slowly; a stock Linux kernel does not boot"
        );
    }
    loop {
        let ending = vm.run()?;
        if ending != Ending::Reset || cli.no_reboot {
            return Ok(ending);
        }
        log::info!("{ending}");
        if let Some(ending) = vm.reset().context("cannot reset the guest")? {
            return Ok(ending);
        }
    }
}

/// Says how the guest ended, if it is not as usual.
fn report(ending: &Ending) -> ExitCode {
    log::info!("{ending}");
    if ending.exit_status() != 0 {
        eprintln!("outrigger: {ending}");
    }
    ExitCode::from(ending.exit_status())
}
