//! Interrupt routing: the one owner of the VM's GSIs and of the way from events to interrupt controllers.
//!
//! GSIs 0 to 23 are the I/O APIC's pins. Each message signalled interrupt in use has one of its own beyond those.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use devices::{EventVectors, InterruptLine, InterruptSource, LineEvents};
use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_irqchip,
    kvm_irq_routing_msi,
};
use kvm_ioctls::VmFd;
use pci::{Cause, InterruptPin, MsiMessage, Vectors};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::kvm_ext;
use crate::layout::{IO_APIC_PINS, PCI_INTX_GSI};

/// KVM's own limit on routes (`KVM_MAX_IRQ_ROUTES` in linux/kvm_host.h), and so on GSIs.
const MAX_GSIS: u32 = 4096;

/// Why an interrupt could not be routed.
#[derive(Debug, thiserror::Error)]
pub enum InterruptError {
    /// More message signalled interrupts than KVM has routes.
    #[error("all of KVM's {MAX_GSIS} interrupt routes are taken")]
    Exhausted,
    /// An event could not be made.
    #[error("cannot make an event (too many open files? see `ulimit -n`)")]
    Event(#[source] io::Error),
    /// KVM refused the routing table.
    #[error("KVM does not take the interrupt routes")]
    Routes(#[source] kvm_ioctls::Error),
    /// KVM refused to connect an event.
    #[error("KVM does not connect an event to GSI {gsi}")]
    Connect {
        /// The interrupt.
        gsi: u32,
        /// What KVM says.
        #[source]
        source: kvm_ioctls::Error,
    },
}

/// All interrupt routes of a VM.
#[derive(Debug, Clone)]
pub(crate) struct Interrupts {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    vm: Arc<VmFd>,
    /// The message that each GSI in use beyond the I/O APIC's sends; one that is masked keeps its last.
    messages: Mutex<BTreeMap<u32, MsiMessage>>,
    edges: Mutex<Vec<Edge>>,
}

/// An edge-triggered interrupt of the I/O APIC.
#[derive(Debug)]
struct Edge {
    event: EventFd,
    gsi: u32,
    connected: bool,
}

impl Interrupts {
    /// Routes the I/O APIC's pins of `vm`.
    pub(crate) fn new(vm: Arc<VmFd>) -> Result<Self, InterruptError> {
        let interrupts = Self {
            shared: Arc::new(Shared {
                vm,
                messages: Mutex::default(),
                edges: Mutex::default(),
            }),
        };
        interrupts.shared.install(&interrupts.shared.messages())?;
        Ok(interrupts)
    }

    /// An event that raises the edge-triggered interrupt `gsi` of the I/O APIC.
    pub(crate) fn edge(&self, gsi: u32) -> Result<EventFd, InterruptError> {
        let event = event()?;
        self.shared.connect(&event, gsi)?;
        self.shared.edges().push(Edge {
            event: event.try_clone().map_err(InterruptError::Event)?,
            gsi,
            connected: true,
        });
        Ok(event)
    }

    /// Takes all [edges](Self::edge) off the interrupt controllers, or, if `connected`, connects them again. What is
    /// signalled meanwhile waits.
    pub(crate) fn set_edges_connected(&self, connected: bool) -> Result<(), InterruptError> {
        for edge in self.shared.edges().iter_mut() {
            let (event, gsi) = (&edge.event, edge.gsi);
            match (connected, edge.connected) {
                (true, false) => connect_once(event, || self.shared.connect(event, gsi))?,
                (false, true) => self.shared.disconnect(event, gsi)?,
                _ => {}
            }
            edge.connected = connected;
        }
        Ok(())
    }

    /// The edges that have been signalled while they are disconnected, by their GSIs.
    pub(crate) fn signalled_edges(&self) -> Vec<u32> {
        let edges = self.shared.edges();
        let signalled = edges.iter().filter(|edge| is_signalled(&edge.event));
        signalled.map(|edge| edge.gsi).collect()
    }

    /// Signals the edges with these GSIs, as far as there are such.
    pub(crate) fn signal_edges(&self, gsis: &[u32]) -> Result<(), InterruptError> {
        for edge in self.shared.edges().iter() {
            if gsis.contains(&edge.gsi) {
                edge.event.write(1).map_err(InterruptError::Event)?;
            }
        }
        Ok(())
    }

    /// The interrupts of the function that is device number `device` on the root bus.
    pub(crate) fn of_device(&self, device: u8) -> DeviceInterrupts {
        DeviceInterrupts {
            interrupts: self.clone(),
            device,
        }
    }
}

impl Shared {
    fn messages(&self) -> MutexGuard<'_, BTreeMap<u32, MsiMessage>> {
        self.messages.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn edges(&self) -> MutexGuard<'_, Vec<Edge>> {
        self.edges.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets all routes: KVM knows no smaller change.
    fn install(&self, messages: &BTreeMap<u32, MsiMessage>) -> Result<(), InterruptError> {
        let mut entries: Vec<_> = (0..IO_APIC_PINS).flat_map(pin_routes).collect();
        entries.extend(
            messages
                .iter()
                .map(|(&gsi, message)| message_route(gsi, *message)),
        );
        let routing =
            KvmIrqRouting::from_entries(&entries).map_err(|_| InterruptError::Exhausted)?;
        self.vm
            .set_gsi_routing(&routing)
            .map_err(InterruptError::Routes)
    }

    fn connect(&self, event: &EventFd, gsi: u32) -> Result<(), InterruptError> {
        self.vm
            .register_irqfd(event, gsi)
            .map_err(|source| InterruptError::Connect { gsi, source })
    }

    /// When this returns, KVM has injected all that it has heard.
    fn disconnect(&self, event: &EventFd, gsi: u32) -> Result<(), InterruptError> {
        self.vm
            .unregister_irqfd(event, gsi)
            .map_err(|source| InterruptError::Connect { gsi, source })
    }
}

/// A pin of the I/O APIC; the first sixteen are the 8259s' too, though no guest of ours uses them.
fn pin_routes(pin: u32) -> impl Iterator<Item = kvm_irq_routing_entry> {
    let pic = match pin {
        0..8 => Some((KVM_IRQCHIP_PIC_MASTER, pin)),
        8..16 => Some((KVM_IRQCHIP_PIC_SLAVE, pin - 8)),
        _ => None,
    };
    pic.into_iter()
        .chain([(KVM_IRQCHIP_IOAPIC, pin)])
        .map(move |(irqchip, pin_of_chip)| {
            let mut entry = kvm_irq_routing_entry {
                gsi: pin,
                type_: KVM_IRQ_ROUTING_IRQCHIP,
                ..Default::default()
            };
            entry.u.irqchip = kvm_irq_routing_irqchip {
                irqchip,
                pin: pin_of_chip,
            };
            entry
        })
}

fn message_route(gsi: u32, message: MsiMessage) -> kvm_irq_routing_entry {
    let [address_lo, address_hi] = halves(message.address);
    let mut entry = kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        ..Default::default()
    };
    entry.u.msi = kvm_irq_routing_msi {
        address_lo,
        address_hi,
        data: message.data,
        ..Default::default()
    };
    entry
}

#[expect(clippy::cast_possible_truncation, reason = "it takes the number apart")]
fn halves(value: u64) -> [u32; 2] {
    [value as u32, (value >> 32) as u32]
}

fn event() -> Result<EventFd, InterruptError> {
    EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).map_err(InterruptError::Event)
}

/// An event that a device has been given elsewhere. What it is, KVM will say; here it must not keep anybody waiting.
fn adopted(event: OwnedFd) -> Result<EventFd, InterruptError> {
    fcntl_getfl(&event)
        .and_then(|flags| fcntl_setfl(&event, flags | OFlags::NONBLOCK))
        .map_err(|errno| InterruptError::Event(errno.into()))?;
    Ok(kvm_ext::event(event))
}

fn is_signalled(event: &EventFd) -> bool {
    let event = kvm_ext::borrow(event);
    let mut fds = [PollFd::from_borrowed_fd(event, PollFlags::IN)];
    poll(&mut fds, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
}

/// Has KVM `connect` an event. It injects a signal that it finds there, but leaves it, and would inject it again the next
/// time. So the signal is taken out first and given back afterwards.
fn connect_once(
    event: &EventFd,
    connect: impl FnOnce() -> Result<(), InterruptError>,
) -> Result<(), InterruptError> {
    let signalled = event.read().is_ok();
    let connected = connect();
    if signalled {
        event.write(1).map_err(InterruptError::Event)?;
    }
    connected
}

/// The interrupts of one function.
#[derive(Debug)]
pub(crate) struct DeviceInterrupts {
    interrupts: Interrupts,
    device: u8,
}

impl InterruptSource for DeviceInterrupts {
    fn vectors(&self, count: u16) -> Result<Box<dyn EventVectors>, Cause> {
        let vectors = (0..count).map(|_| OnceLock::new()).collect();
        Ok(Box::new(VectorGroup {
            shared: self.interrupts.shared.clone(),
            vectors,
            connected: AtomicBool::new(true),
        }))
    }

    fn line(&self, pin: InterruptPin, events: LineEvents) -> Result<Box<dyn InterruptLine>, Cause> {
        let shared = self.interrupts.shared.clone();
        let gsi = PCI_INTX_GSI + u32::from(pin.line(self.device));
        let is_new = events.is_empty();
        let line = Line {
            shared,
            gsi,
            trigger: events.trigger.map_or_else(event, adopted)?,
            resample: events.resample.map_or_else(event, adopted)?,
            connected: Mutex::new(false),
        };
        line.connect(is_new)?;
        Ok(Box::new(line))
    }
}

/// The vectors of one MSI or MSI-X capability. A vector gets its event and its GSI when it is first used, so that
/// those a driver leaves alone cost nothing.
#[derive(Debug)]
struct VectorGroup {
    shared: Arc<Shared>,
    vectors: Box<[OnceLock<Vector>]>,
    /// Whether vectors that are not masked are connected.
    connected: AtomicBool,
}

#[derive(Debug)]
struct Vector {
    event: EventFd,
    route: Mutex<Route>,
}

/// Where a vector's event leads.
#[derive(Debug, Default)]
struct Route {
    gsi: Option<u32>,
    /// Whether its message is to be sent when it is signalled.
    unmasked: bool,
    connected: bool,
}

impl VectorGroup {
    /// The vector, made if this is the first it is heard of.
    fn vector(&self, vector: u16) -> Result<&Vector, InterruptError> {
        let cell = self
            .vectors
            .get(usize::from(vector))
            .ok_or(InterruptError::Exhausted)?;
        if let Some(vector) = cell.get() {
            return Ok(vector);
        }
        let new = Vector {
            event: event()?,
            route: Mutex::default(),
        };
        Ok(cell.get_or_init(|| new))
    }

    fn known(&self, vector: u16) -> Option<&Vector> {
        self.vectors.get(usize::from(vector))?.get()
    }

    fn all_known(&self) -> impl Iterator<Item = &Vector> {
        self.vectors.iter().filter_map(OnceLock::get)
    }
}

impl Vectors for VectorGroup {
    fn program(&self, changes: &[(u16, Option<MsiMessage>)]) -> Result<(), Cause> {
        let mut messages = self.shared.messages();
        let mut rerouted = false;
        for &(vector, message) in changes {
            if let Some(message) = message {
                let gsi = self.vector(vector)?.gsi(&messages)?;
                rerouted |= messages.insert(gsi, message) != Some(message);
            }
        }
        if rerouted {
            self.shared.install(&messages)?;
        }
        let connected = self.connected.load(Ordering::Acquire);
        for &(vector, message) in changes {
            if let Some(vector) = self.known(vector) {
                vector.route().unmasked = message.is_some();
                vector.connect(&self.shared, connected)?;
            }
        }
        Ok(())
    }

    fn pending(&self, vector: u16) -> bool {
        self.known(vector)
            .is_some_and(|vector| is_signalled(&vector.event))
    }
}

impl EventVectors for VectorGroup {
    fn event(&self, vector: u16) -> Result<BorrowedFd<'_>, Cause> {
        Ok(kvm_ext::borrow(&self.vector(vector)?.event))
    }

    fn adopt(&self, vector: u16, event: OwnedFd) -> Result<(), Cause> {
        let cell = self.vectors.get(usize::from(vector));
        let cell = cell.ok_or("there is no such vector")?;
        let adopted = Vector {
            event: adopted(event)?,
            route: Mutex::default(),
        };
        Ok(cell
            .set(adopted)
            .map_err(|_| "the vector has an event already")?)
    }

    fn set_connected(&self, connected: bool) -> Result<(), Cause> {
        self.connected.store(connected, Ordering::Release);
        for vector in self.all_known() {
            vector.connect(&self.shared, connected)?;
        }
        Ok(())
    }
}

impl Drop for VectorGroup {
    fn drop(&mut self) {
        for vector in self.all_known() {
            if let Err(error) = vector.connect(&self.shared, false) {
                log::warn!("{error}");
            }
            if let Some(gsi) = vector.route().gsi {
                self.shared.messages().remove(&gsi);
            }
        }
    }
}

impl Vector {
    fn route(&self) -> MutexGuard<'_, Route> {
        self.route.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The vector's GSI, one that has no message yet if it had none.
    fn gsi(&self, messages: &BTreeMap<u32, MsiMessage>) -> Result<u32, InterruptError> {
        let mut route = self.route();
        if let Some(gsi) = route.gsi {
            return Ok(gsi);
        }
        let gsi = (IO_APIC_PINS..MAX_GSIS)
            .find(|gsi| !messages.contains_key(gsi))
            .ok_or(InterruptError::Exhausted)?;
        Ok(*route.gsi.insert(gsi))
    }

    /// Connects the event to its GSI, unless it is masked, or takes it off, if it is not so already: both are slow.
    fn connect(&self, shared: &Shared, connect: bool) -> Result<(), InterruptError> {
        let mut route = self.route();
        let connect = connect && route.unmasked;
        let Some(gsi) = route.gsi.filter(|_| route.connected != connect) else {
            return Ok(());
        };
        if connect {
            connect_once(&self.event, || shared.connect(&self.event, gsi))?;
        } else {
            shared.disconnect(&self.event, gsi)?;
        }
        route.connected = connect;
        Ok(())
    }
}

/// An interrupt pin of a function, connected to the I/O APIC.
#[derive(Debug)]
struct Line {
    shared: Arc<Shared>,
    gsi: u32,
    trigger: EventFd,
    resample: EventFd,
    connected: Mutex<bool>,
}

impl Line {
    fn connect(&self, connect: bool) -> Result<(), InterruptError> {
        let mut connected = self
            .connected
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let (shared, gsi) = (&self.shared, self.gsi);
        if connect && !*connected {
            connect_once(&self.trigger, || {
                shared
                    .vm
                    .register_irqfd_with_resample(&self.trigger, &self.resample, gsi)
                    .map_err(|source| InterruptError::Connect { gsi, source })
            })?;
        } else if !connect && *connected {
            // The line goes down with its last event.
            shared.disconnect(&self.trigger, gsi)?;
        }
        *connected = connect;
        Ok(())
    }
}

impl InterruptLine for Line {
    fn trigger(&self) -> BorrowedFd<'_> {
        kvm_ext::borrow(&self.trigger)
    }

    fn resample(&self) -> BorrowedFd<'_> {
        kvm_ext::borrow(&self.resample)
    }

    fn set_connected(&self, connected: bool) -> Result<(), Cause> {
        Ok(self.connect(connected)?)
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        if let Err(error) = self.connect(false) {
            log::warn!("{error}");
        }
    }
}
