//! A virtual machine: all parts, put together, run and reset.

mod restore;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

pub(crate) use self::restore::RestoreError;
use crate::acpi::{self, AcpiError};
use crate::bars::Space;
use crate::boot::{BootError, Payload};
use crate::bus::Bus;
use crate::config::{ConfigError, VmConfig};
use crate::console::{Console, ConsoleError};
use crate::cpu_profile::CpuProfile;
use crate::cpuid::CommonCpuid;
use crate::ending::{Ending, Endings};
use crate::event_loop::{EventLoop, LoopError, Signals};
use crate::events::Events;
use crate::host_devices::{self, HostDeviceError};
use crate::interrupts::{InterruptError, Interrupts};
use crate::kvm::{self, KvmError};
use crate::layout;
use crate::machine::handover::{Inheritance, Inherited};
use crate::machine::{Cpus, Machine};
use crate::memory::{self, Memory, MemoryError};
use crate::pci_host::{DeviceError, PciHost};
use crate::platform::Platform;
use crate::servers::{self, ServerError, Servers};
use crate::slots::{SlotError, Slots};
use crate::vcpu::{self, MsrIndices, Vcpu, VcpuContext, VcpuError};
use crate::vcpus::Vcpus;

/// Why a VM cannot be made, or cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// The configuration makes no sense.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// What is to be booted cannot be.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// KVM will not do.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// There is no RAM for the guest.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The host's CPU cannot address all that the VM has.
    #[error(
        "--memory: RAM and the PCI window beyond it need {needed} address bits, and this host's CPU has {available}; \\
         give the VM less"
    )]
    AddressBits {
        /// What the VM needs.
        needed: u32,
        /// What KVM offers.
        available: u32,
    },
    /// KVM has no room for the VM's memory.
    #[error("cannot set up KVM's memory slots")]
    Slots(#[from] SlotError),
    /// The interrupts cannot be set up.
    #[error("cannot set up the interrupts")]
    Interrupts(#[from] InterruptError),
    /// A vCPU cannot be made.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    /// A built-in device has no server.
    #[error(transparent)]
    Server(#[from] ServerError),
    /// A device of the host cannot be had.
    #[error(transparent)]
    HostDevice(#[from] HostDeviceError),
    /// A device cannot be attached.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The serial port cannot be connected.
    #[error(transparent)]
    Console(#[from] ConsoleError),
    /// The ACPI tables cannot be written.
    #[error(transparent)]
    Acpi(#[from] AcpiError),
    /// The event loop failed.
    #[error(transparent)]
    Loop(#[from] LoopError),
    /// The platform devices overlap; the layout is wrong.
    #[error("cannot put a platform device on the bus")]
    Platform(#[source] pci::Cause),
    /// An event could not be made.
    #[error("cannot make an event (too many open files? see `ulimit -n`)")]
    Event(#[source] std::io::Error),
    /// There is no thread to reset the devices in.
    #[error("cannot start a thread that resets the devices")]
    ResetThread(#[source] std::io::Error),
    /// Kicks of vCPUs cannot be caught.
    #[error("cannot catch the signal that kicks vCPUs")]
    Kicks(#[source] vmm_sys_util::errno::Error),
}

/// What is around a VM, and outlives it.
#[derive(Debug, Clone)]
pub(crate) struct Surroundings {
    pub(crate) endings: Arc<Endings>,
    pub(crate) signals: Arc<Signals>,
    pub(crate) events: Events,
}

impl Surroundings {
    /// Has runs of the VM end as `endings` says, or when a signal says so.
    pub(crate) fn new(endings: Arc<Endings>, events: Events) -> Result<Self, VmError> {
        let signals = Arc::new(Signals::catch(endings.clone())?);
        Ok(Self {
            endings,
            signals,
            events,
        })
    }
}

/// Where a VM comes from.
#[derive(Debug)]
pub(crate) enum Origin {
    /// From nowhere.
    New,
    /// From its saved state. It had CPUs like these.
    Saved(CpuProfile),
    /// From a VMM that runs it still, with what its built-in devices are on. It has CPUs like these.
    Elsewhere(CpuProfile),
    /// From a VMM of this host, which hands over all that is not to be noticed. It has CPUs like these.
    Handed(CpuProfile, Inheritance),
}

impl Origin {
    fn parts(self) -> (Option<CpuProfile>, Option<Inheritance>) {
        match self {
            Self::New => (None, None),
            Self::Saved(cpus) | Self::Elsewhere(cpus) => (Some(cpus), None),
            Self::Handed(cpus, inheritance) => (Some(cpus), Some(inheritance)),
        }
    }
}

/// A virtual machine.
pub struct Vm {
    /// The vCPUs, while they do not run.
    stopped: Vec<Vcpu>,
    event_loop: EventLoop,
    endings: Arc<Endings>,
    machine: Arc<Machine>,
    payload: Payload,
    acpi: acpi::Machine,
    /// Ends when nothing uses its devices any more.
    _servers: Servers,
}

impl Vm {
    /// Makes everything, loads the kernel and connects the devices. The guest does not run yet.
    pub fn new(config: &VmConfig) -> Result<Self, VmError> {
        let endings = Arc::new(Endings::new().map_err(VmError::Event)?);
        Self::within(config, &Surroundings::new(endings, Events::default())?)
    }

    /// As [`new`](Self::new), in a process that may make several VMs, one after the other.
    pub(crate) fn within(config: &VmConfig, surroundings: &Surroundings) -> Result<Self, VmError> {
        let mut vm = Self::assemble(config, Origin::New, surroundings)?;
        vm.load()?;
        Ok(vm)
    }

    /// Makes everything and connects the devices.
    fn assemble(
        config: &VmConfig,
        origin: Origin,
        surroundings: &Surroundings,
    ) -> Result<Self, VmError> {
        config.validate()?;
        let payload = Payload::open(&config.payload)?;
        // They start while the machine is made.
        let starting = match origin {
            Origin::Handed(..) => Vec::new(),
            _ => servers::start(config, matches!(origin, Origin::Elsewhere(_)))?,
        };
        // Its console may be on this host, and another process may still write to it.
        let goes_on = matches!(origin, Origin::Elsewhere(_) | Origin::Handed(..));
        let (saved, mut inheritance) = origin.parts();
        let kvm = kvm::open()?;
        let vm = kvm::create_vm(&kvm, config.vcpus)?;
        vcpu::catch_kicks().map_err(VmError::Kicks)?;
        let cpuid = match &saved {
            Some(saved) => saved.cpuid(),
            None => {
                let supported = CommonCpuid::new(&kvm, config.vcpus);
                let supported = supported.map_err(|source| KvmError::Step {
                    step: "tell the CPUID it supports",
                    source,
                })?;
                if config.nested {
                    supported
                } else {
                    supported.without_nesting()
                }
            }
        };
        let windows = layout::pci_windows(memory::end(config.memory.size));
        check_address_bits(windows.memory64, cpuid.address_bits())?;

        let slots = Slots::new(vm.clone(), kvm.get_nr_memslots())?;
        let memory = match &mut inheritance {
            Some(inheritance) => {
                let files = std::mem::take(&mut inheritance.ram);
                Memory::inherit(&config.memory, &slots, files)?
            }
            None => Memory::new(&config.memory, &slots)?,
        };
        kvm::create_chips(&vm)?;
        let interrupts = Interrupts::new(vm.clone())?;
        let (memory_bus, ports) = (Arc::new(Bus::default()), Arc::new(Bus::default()));
        let space = Space {
            vm: vm.clone(),
            slots: slots.clone(),
            memory: memory_bus.clone(),
            ports: ports.clone(),
            windows,
        };
        let mut pci = PciHost::new(space, interrupts.clone(), surroundings.events.clone())?;
        let endings = surroundings.endings.clone();
        let mut event_loop = EventLoop::new(endings.clone())?;
        let mut servers = Servers::default();
        for server in starting {
            let (device, process) = server.wait()?;
            let server = pci
                .attach_built_in(device, &memory)
                .inspect_err(|_| process.report_end_soon())?;
            servers.add(process.clone(), server.remote.clone());
            event_loop.add(Box::new(server));
            event_loop.add(Box::new(servers::Exit(process)));
        }
        if let Some(inheritance) = inheritance {
            for Inherited { attachment, server } in inheritance.devices {
                let device = pci.inherit(&attachment, &inheritance.descriptors, &memory)?;
                if let Some(process) = server {
                    servers.add(process.clone(), device.remote.clone());
                    event_loop.add(Box::new(servers::Exit(process)));
                }
                event_loop.add(Box::new(device));
            }
        } else {
            for device in host_devices::open(&config.devices, config.iommufd, &vm, &memory)? {
                event_loop.add(Box::new(pci.attach_host_device(device)?));
            }
            for device in &config.user_devices {
                event_loop.add(Box::new(pci.attach(device, &memory)?));
            }
        }

        let context = Arc::new(VcpuContext {
            memory: memory_bus,
            ports: ports.clone(),
            ram: memory.ram().clone(),
            slots,
            endings: endings.clone(),
        });
        let msrs = MsrIndices::new(&kvm).map_err(|source| KvmError::Step {
            step: "list its registers",
            source,
        })?;
        let stopped = (0..config.vcpus)
            .map(|id| Vcpu::new(&kvm, &vm, id, &cpuid, &msrs, context.clone()))
            .collect::<Result<_, _>>()?;

        let power_button = interrupts.edge(layout::POWER_BUTTON_GSI)?;
        let button = power_button.try_clone().map_err(VmError::Event)?;
        event_loop.add(Box::new(surroundings.signals.watch(Some(button))));
        // The terminal comes last: from now on nothing should fail.
        let com1 = interrupts.edge(layout::COM1_GSI)?;
        let console = Console::open(&config.serial, goes_on, com1, &endings)?;
        let serial = console.as_ref().map(|console| console.port.clone());
        if let Some(input) = console.and_then(|console| console.input) {
            event_loop.add(input);
        }
        let acpi = acpi::Machine {
            vcpus: config.vcpus,
            windows,
            serial: serial.is_some(),
        };
        let platform =
            Platform::new(vm.clone(), &ports, serial, &endings).map_err(VmError::Platform)?;
        let machine = Machine {
            vcpus: Vcpus::default(),
            pci,
            platform,
            memory,
            interrupts,
            power_button,
            vm,
            config: config.clone(),
            cpus: Cpus::new(cpuid, saved),
            servers: servers.processes(),
        };
        Ok(Self {
            stopped,
            event_loop,
            endings,
            machine: Arc::new(machine),
            payload,
            acpi,
            _servers: servers,
        })
    }

    /// The vCPUs, for whoever wants to pause them.
    pub fn vcpus(&self) -> Vcpus {
        self.machine.vcpus.clone()
    }

    /// Runs the guest until it ends in one way or another, and says in which.
    pub fn run(&mut self) -> Result<Ending, VmError> {
        self.start()?;
        let ending = self.event_loop.run();
        self.stop();
        Ok(ending?)
    }

    /// Starts the vCPUs.
    pub(crate) fn start(&mut self) -> Result<(), VmError> {
        let stopped = std::mem::take(&mut self.stopped);
        Ok(self.machine.vcpus.start(stopped)?)
    }

    /// Stops the vCPUs. What the guest did last is forgotten with the run.
    pub(crate) fn stop(&mut self) {
        self.stopped = self.machine.vcpus.stop();
        self.endings.forget_guest();
    }

    /// What the main thread waits for while there is this VM.
    pub(crate) fn event_loop(&mut self) -> &mut EventLoop {
        &mut self.event_loop
    }

    /// The parts that others may have to do with while it runs.
    pub(crate) fn machine(&self) -> Arc<Machine> {
        self.machine.clone()
    }

    /// Puts the machine back into its state at power-on, with the kernel loaded again; then it can be run again. The
    /// devices stay connected, and guest RAM stays where it is. If the user ends the VM meanwhile, returns that.
    pub fn reset(&mut self) -> Result<Option<Ending>, VmError> {
        if let Some(ending) = self.reset_devices()? {
            return Ok(Some(ending));
        }
        self.machine.platform.reset().map_err(VmError::Platform)?;
        for vcpu in &mut self.stopped {
            vcpu.reset()?;
        }
        self.load()?;
        Ok(None)
    }

    /// Resets the devices, and serves what comes while they take their time.
    fn reset_devices(&mut self) -> Result<Option<Ending>, VmError> {
        let done = Arc::new(AtomicBool::new(false));
        let report = {
            let (done, endings) = (done.clone(), self.endings.clone());
            move || {
                done.store(true, Ordering::Release);
                endings.wake();
            }
        };
        self.machine
            .pci
            .reset(report)
            .map_err(VmError::ResetThread)?;
        Ok(self.event_loop.run_until(|| done.load(Ordering::Acquire))?)
    }

    fn load(&mut self) -> Result<(), VmError> {
        let ram = self.machine.memory.ram();
        let rsdp = acpi::write_tables(ram, &self.acpi)?;
        let state = self.payload.load(ram, rsdp)?;
        for vcpu in &mut self.stopped {
            vcpu.boot(&state)?;
        }
        Ok(())
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.machine.vcpus.stop();
    }
}

impl std::fmt::Debug for Vm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vm")
            .field("machine", &self.machine)
            .finish_non_exhaustive()
    }
}

/// Whether the CPU can address all of the PCI window, which lies above all RAM.
fn check_address_bits(window: pci::Window, available: u32) -> Result<(), VmError> {
    let needed = u64::BITS - (window.start + (window.length - 1)).leading_zeros();
    if needed > available {
        Err(VmError::AddressBits { needed, available })
    } else {
        Ok(())
    }
}
