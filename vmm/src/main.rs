//! The `outrigger` command.

mod cli;

use std::process::ExitCode;

use anyhow::Context as _;
use vmm::{Ending, Vm};

use crate::cli::Cli;

fn main() -> ExitCode {
    let cli = match Cli::from_arguments() {
        Ok(cli) => cli,
        Err(code) => return code,
    };
    cli.set_up_log();
    match run(&cli) {
        Ok(ending) => {
            log::info!("{ending}");
            if ending.exit_status() != 0 {
                eprintln!("outrigger: {ending}");
            }
            ExitCode::from(ending.exit_status())
        }
        Err(error) => {
            eprintln!("outrigger: {error:#}");
            ExitCode::FAILURE
        }
    }
}

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
        vm.reset().context("cannot reset the guest")?;
    }
}
