//! The VMM: a place for one VM at a time, on the main thread, which runs it and does what others ask of it.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use crate::config::VmConfig;
use crate::control::{Command, Control, ControlError, Operation, Reply, Request, RestoreRequest};
use crate::ending::{Ending, Endings};
use crate::event_loop::{EventLoop, LoopError};
use crate::events::Events;
use crate::vm::{Surroundings, Vm, VmError};

/// A VMM, with a VM or without.
pub struct Vmm {
    /// None while nobody has asked for one, and again when its run has ended.
    vm: Option<Vm>,
    /// What is waited for meanwhile.
    idle: EventLoop,
    surroundings: Surroundings,
    control: Control,
    policy: Policy,
    /// Ends the VMM if the VM that it was started for cannot be restored.
    restoring: Option<JoinHandle<Result<(), ControlError>>>,
}

/// What a VMM does when a run of its guest ends.
#[derive(Debug, Clone, Copy, Default)]
pub struct Policy {
    /// A guest that resets ends the VMM.
    pub no_reboot: bool,
    /// A guest that powers off or crashes does not: the VMM waits to boot it again.
    pub no_shutdown: bool,
}

/// Why a VMM cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    /// The VM cannot be made or started.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// The VM cannot be put back into its state at power-on.
    #[error("cannot reset the guest")]
    Reset(#[source] VmError),
    /// There is one already, or it cannot be.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// There is no thread for something.
    #[error("cannot start a thread")]
    Thread(#[source] io::Error),
    /// It cannot even wait.
    #[error(transparent)]
    Loop(#[from] LoopError),
}

/// Why a VMM ends.
enum End {
    /// The run of the guest has ended, and that is the end of it.
    Run(Ending),
    /// It was asked to.
    Asked(Reply),
}

impl Vmm {
    /// A VMM without a VM. What happens is told to `events`.
    pub fn new(policy: Policy, events: Events) -> Result<Self, VmmError> {
        events.tell("vmm", "starting", &[]);
        let endings = Arc::new(Endings::new().map_err(VmError::Event)?);
        let surroundings = Surroundings::new(endings.clone(), events)?;
        let control = Control::new(surroundings.clone());
        let mut idle = EventLoop::new(endings)?;
        idle.add(Box::new(surroundings.signals.watch(None)));
        Ok(Self {
            vm: None,
            idle,
            surroundings,
            control,
            policy,
            restoring: None,
        })
    }

    /// A handle to it.
    pub fn control(&self) -> Control {
        self.control.clone()
    }

    /// Creates a VM, and boots it.
    pub fn boot(&mut self, config: VmConfig) -> Result<(), VmmError> {
        self.control.create(config)?;
        let config = self.control.to_boot()?;
        Ok(self.start(&config)?)
    }

    /// Makes a VM of a snapshot, when the VMM [runs](Self::run), which fails if there cannot be that VM.
    pub fn restore(&mut self, request: RestoreRequest) -> Result<(), VmmError> {
        let restored = self.control.start(Operation::Restore(request))?;
        let control = self.control.clone();
        let thread = thread::Builder::new().name("restoring".into());
        let thread = thread.spawn(move || {
            restored.wait().inspect_err(|_| {
                control.quit();
            })
        });
        self.restoring = Some(thread.map_err(VmmError::Thread)?);
        Ok(())
    }

    /// Runs until the VMM is to end, and says why.
    pub fn run(&mut self) -> Result<Ending, VmmError> {
        let end = self.run_to_end();
        self.control.close();
        let restored = self.restoring.take().map(JoinHandle::join);
        self.drop_vm(false);
        self.surroundings.events.tell("vmm", "shutdown", &[]);
        match restored {
            // Somebody has ended the VMM meanwhile.
            None | Some(Ok(Ok(()) | Err(ControlError::Cancelled(_) | ControlError::Ending))) => {}
            Some(Ok(Err(error))) => return Err(error.into()),
            Some(Err(_)) => log::error!("who waits for the VM to be restored has panicked"),
        }
        match end? {
            End::Run(ending) => Ok(ending),
            End::Asked(reply) => {
                // Whoever hears this may start the next VM with the same devices at once.
                reply.send(Ok(()));
                Ok(Ending::Quit)
            }
        }
    }

    fn run_to_end(&mut self) -> Result<End, VmmError> {
        loop {
            let commands = self.control.commands();
            let event_loop = self.vm.as_mut().map_or(&mut self.idle, Vm::event_loop);
            if let Some(ending) = event_loop.run_until(|| !commands.is_empty())?
                && let Some(ending) = self.after(ending)?
            {
                return Ok(End::Run(ending));
            }
            while let Some(command) = self.control.commands().next() {
                if let Some(end) = self.serve(command)? {
                    return Ok(end);
                }
            }
        }
    }

    /// Goes on after the end of a run, or returns it if it is that of the VMM, too.
    fn after(&mut self, ending: Ending) -> Result<Option<Ending>, VmmError> {
        self.surroundings
            .events
            .tell("guest", ending.event(), &[("reason", &ending)]);
        match ending {
            Ending::Quit => Ok(Some(ending)),
            Ending::Reset if !self.policy.no_reboot => {
                log::info!("{ending}");
                self.reset()
            }
            ending if self.policy.no_shutdown => {
                log::warn!("{ending}");
                self.drop_vm(true);
                Ok(None)
            }
            ending => Ok(Some(ending)),
        }
    }

    fn serve(&mut self, Command { request, reply }: Command) -> Result<Option<End>, VmmError> {
        let outcome = match request {
            Request::Boot => self.control.to_boot().and_then(|config| {
                self.start(&config)
                    .map_err(|error| ControlError::failed("the VM does not boot", error))
            }),
            Request::Shutdown => self.control.expect_running().map(|()| self.drop_vm(true)),
            Request::Delete => self.control.expect_idle().map(|()| self.drop_vm(false)),
            Request::Reboot => match self.control.expect_running() {
                Ok(()) => {
                    if let Some(ending) = self.reset()? {
                        return Ok(Some(End::Run(ending)));
                    }
                    Ok(())
                }
                Err(error) => Err(error),
            },
            Request::Adopt { vm, config, resume } => self
                .adopt(*vm, config, resume)
                .map_err(|error| ControlError::failed("the VM does not go on", error)),
            Request::Discard => {
                self.vm = None;
                self.control.discarded();
                Ok(())
            }
            Request::Depart => {
                self.drop_vm(false);
                if !self.policy.no_shutdown {
                    return Ok(Some(End::Run(Ending::Departed)));
                }
                Ok(())
            }
            Request::Quit => return Ok(Some(End::Asked(reply))),
        };
        reply.send(outcome);
        Ok(None)
    }

    /// Makes a VM, and starts it.
    fn start(&mut self, config: &VmConfig) -> Result<(), VmError> {
        let events = &self.surroundings.events;
        events.tell("vm", "booting", &[]);
        let mut vm = Vm::within(config, &self.surroundings)?;
        vm.start()?;
        events.tell("vm", "booted", &[]);
        self.control.started(vm.machine());
        self.vm = Some(vm);
        Ok(())
    }

    /// Takes over a VM whose devices run already.
    fn adopt(&mut self, mut vm: Vm, config: Arc<VmConfig>, resume: bool) -> Result<(), VmError> {
        if !resume {
            vm.vcpus().pause();
        }
        vm.start()?;
        self.control.adopted(config, vm.machine());
        self.vm = Some(vm);
        Ok(())
    }

    /// Resets the VM and starts it again. If the user ends the VMM meanwhile, returns that.
    fn reset(&mut self) -> Result<Option<Ending>, VmmError> {
        let Some(vm) = &mut self.vm else {
            return Ok(None);
        };
        let events = &self.surroundings.events;
        events.tell("vm", "rebooting", &[]);
        self.control.reset_begins();
        vm.stop();
        if let Some(ending) = vm.reset().map_err(VmmError::Reset)? {
            return Ok(Some(ending));
        }
        vm.vcpus().resume();
        vm.start()?;
        self.control.reset_ends();
        events.tell("vm", "rebooted", &[]);
        Ok(None)
    }

    /// Ends the VM's run, if it runs. It may stay what it was before it was booted.
    fn drop_vm(&mut self, stays: bool) {
        self.control.ended(stays);
        if self.vm.take().is_some() {
            self.surroundings.events.tell("vm", "shutdown", &[]);
        }
        // What the guest did last concerns nobody any more, and the next one least.
        self.surroundings.endings.forget_guest();
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        self.control.close();
        self.drop_vm(false);
    }
}

impl fmt::Debug for Vmm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vmm")
            .field("vm", &self.vm)
            .finish_non_exhaustive()
    }
}
