//! A bus with a demo device is saved and restored in another VM, with KVM's interrupt controllers and another server.

use std::path::PathBuf;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use device_servers::demo;
use devices::{DeviceState, Fallback, Next, transition};
use kvm_bindings::{KVM_IRQCHIP_IOAPIC, kvm_irqchip};
use kvm_ioctls::{VcpuFd, VmFd};
use pci::Endpoint as _;
use tempfile::TempDir;
use vfio_user_server::{Listener, Stopper};
use vm_memory::{Bytes, GuestAddress};
use zerocopy::{FromBytes, IntoBytes};

use super::PciState;
use crate::bars::Space;
use crate::bus::Bus;
use crate::config::{MemoryConfig, UserDeviceConfig};
use crate::events::Events;
use crate::interrupts::Interrupts;
use crate::memory::{self, Memory};
use crate::pci_host::PciHost;
use crate::slots::Slots;
use crate::{kvm, layout};

#[expect(unreachable_pub, reason = "the integration tests have it, too")]
#[path = "../../../../tests/src/skipped.rs"]
mod skipped;

/// Configuration space of the demo device, and its MSI-X capability.
const CONFIG: u64 = *layout::ECAM.start() + (1 << 15);
const MSIX: u64 = CONFIG + 0xb0;
/// Registers of the demo device.
const SCRATCH: u64 = 0x08;
const RAISE: u64 = 0x10;
const INTX: u64 = 0x14;
const RUNG: u64 = 0x80;
const DOORBELL: u64 = 0x800;
/// What vector 0 sends.
const VECTOR: u32 = 0x50;

const SIZE: u64 = 16 << 20;

/// Enough of a machine for a device: RAM, buses, interrupt controllers, and a vCPU that never runs.
struct Board {
    vm: Arc<VmFd>,
    memory: Memory,
    bus: Arc<Bus>,
    interrupts: Interrupts,
    pci: PciHost,
    vcpu: VcpuFd,
    // After its client.
    _server: DemoServer,
}

struct DemoServer {
    stopper: Stopper,
    thread: Option<JoinHandle<()>>,
    _folder: TempDir,
}

impl DemoServer {
    fn start() -> (Self, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("socket");
        let mut server = demo::server(&demo::Options::new(&socket)).unwrap();
        let listener = Listener::bind(&socket).unwrap();
        let stopper = server.stopper();
        let thread = thread::spawn(move || server.run(&listener).unwrap());
        let server = Self {
            stopper,
            thread: Some(thread),
            _folder: folder,
        };
        (server, socket)
    }
}

impl Drop for DemoServer {
    fn drop(&mut self) {
        self.stopper.stop();
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

impl Board {
    /// `None` if there is no KVM.
    fn new() -> Option<Self> {
        let kvm = match kvm::open() {
            Ok(kvm) => kvm,
            Err(error) => {
                skipped::skip(&error.to_string());
                return None;
            }
        };
        let vm = kvm::create_vm(&kvm, 1).unwrap();
        let slots = Slots::new(vm.clone(), kvm.get_nr_memslots()).unwrap();
        let config = MemoryConfig {
            size: SIZE,
            hugepages: false,
            prefault: false,
        };
        let memory = Memory::new(&config, &slots).unwrap();
        kvm::create_chips(&vm).unwrap();
        let interrupts = Interrupts::new(vm.clone()).unwrap();
        let bus = Arc::new(Bus::default());
        let space = Space {
            vm: vm.clone(),
            slots,
            memory: bus.clone(),
            ports: Arc::new(Bus::default()),
            windows: layout::pci_windows(memory::end(SIZE)),
        };
        let mut pci = PciHost::new(space, interrupts.clone(), Events::default()).unwrap();
        let (server, socket) = DemoServer::start();
        let id = "demo".to_owned();
        pci.attach(&UserDeviceConfig { id, socket }, &memory)
            .unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        let board = Self {
            vm,
            memory,
            bus,
            interrupts,
            pci,
            vcpu,
            _server: server,
        };
        board.forget_interrupts();
        Some(board)
    }

    fn read(&self, address: u64) -> u32 {
        let mut data = [0; 4];
        self.bus.read(address, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&self, address: u64, value: u32) {
        self.bus.write(address, &value.to_le_bytes());
    }

    /// Where the device's registers are.
    fn registers(&self) -> u64 {
        u64::from(self.read(CONFIG + 0x10))
    }

    /// Whether the vCPU's local APIC has been sent a vector.
    fn has(&self, vector: u32) -> bool {
        const IRR: usize = 0x200;
        let lapic = self.vcpu.get_lapic().unwrap();
        let byte = IRR + (vector / 32 * 16 + vector % 32 / 8) as usize;
        lapic.regs[byte].cast_unsigned() >> (vector % 8) & 1 != 0
    }

    fn gets(&self, vector: u32) -> bool {
        self.within(|| self.has(vector))
    }

    fn within(&self, condition: impl Fn() -> bool) -> bool {
        let end = Instant::now() + Duration::from_secs(20);
        while !condition() {
            if Instant::now() > end {
                return false;
            }
            thread::yield_now();
        }
        true
    }

    /// Empties the local APIC, which is enabled then.
    fn forget_interrupts(&self) {
        let mut lapic = self.vcpu.get_lapic().unwrap();
        for byte in &mut lapic.regs[0x200..0x280] {
            *byte = 0;
        }
        // The spurious interrupt vector register: enabled.
        lapic.regs[0xf0] = -1;
        lapic.regs[0xf1] = 1;
        self.vcpu.set_lapic(&lapic).unwrap();
    }

    /// Has a pin of the I/O APIC send a vector while it is asserted, as if it was not now.
    fn route_pin(&self, gsi: u32, vector: u8) {
        /// Where `struct kvm_irqchip` has the redirection table.
        const TABLE: usize = 8 + 24;
        const LEVEL_TRIGGERED: u64 = 1 << 15;
        let mut chip = kvm_irqchip {
            chip_id: KVM_IRQCHIP_IOAPIC,
            ..Default::default()
        };
        self.vm.get_irqchip(&mut chip).unwrap();
        let mut bytes = chip.as_bytes().to_vec();
        let entry = LEVEL_TRIGGERED | u64::from(vector);
        bytes[TABLE + 8 * gsi as usize..][..8].copy_from_slice(&entry.to_le_bytes());
        let chip = kvm_irqchip::read_from_bytes(&bytes).unwrap();
        self.vm.set_irqchip(&chip).unwrap();
    }

    fn go_to(&self, state: DeviceState) {
        let device = &self.pci.devices()[0];
        let migration = device.migration().unwrap();
        transition(migration, state, Fallback::Reset, || device.reset()).unwrap();
    }
}

#[test]
fn a_bus_goes_on_in_another_vm_with_nothing_lost_and_nothing_twice() {
    let (Some(there), Some(here)) = (Board::new(), Board::new()) else {
        return;
    };
    // A driver sets the device up, with two vectors.
    there.write(CONFIG + 4, 0x406);
    let table = u64::from(there.read(CONFIG + 0x14));
    for (vector, masked) in [(0, 0), (1, 0), (2, 0), (3, 1)] {
        for (word, value) in (0..).zip([layout::LOCAL_APIC, 0, VECTOR + vector, masked]) {
            there.write(table + u64::from(16 * vector + 4 * word), value);
        }
    }
    there.bus.write(MSIX + 2, &[0, 0x80]);
    there.write(table + 2 * 16 + 12, 1);
    let registers = there.registers();
    there.write(registers + SCRATCH, 0x1234_5678);
    there.write(registers + RAISE, 0);
    assert!(there.gets(VECTOR));
    there.forget_interrupts();

    // It stops, with an interrupt, two masked ones, of one of which only the device knows, and a doorbell on their way.
    there.pci.disconnect_interrupts().unwrap();
    there.write(registers + RAISE, 1);
    there.write(registers + RAISE, 2);
    there.write(registers + RAISE, 3);
    there.go_to(DeviceState::Stop);
    there.write(registers + DOORBELL, 1);
    there.go_to(DeviceState::StopCopy);
    let saved = serde_json::to_string(&there.pci.save().unwrap()).unwrap();
    let migration = there.pci.devices()[0].migration().unwrap();
    let mut data = vec![0; 1 << 20];
    let chunk = migration.read(&mut data).unwrap();
    assert_eq!(chunk.next, Next::End);
    data.truncate(chunk.length);
    assert!(!there.has(VECTOR + 1));

    // It goes on in the other VM.
    assert_eq!(here.pci.compare(&there.pci.fingerprints()), []);
    let saved: PciState = serde_json::from_str(&saved).unwrap();
    here.go_to(DeviceState::Resuming);
    here.pci.restore(&saved).unwrap();
    here.pci.devices()[0]
        .migration()
        .unwrap()
        .write(&data)
        .unwrap();
    here.go_to(DeviceState::Stop);
    let mut ram = vec![0; SIZE.try_into().unwrap()];
    here.memory
        .ram()
        .read_slice(&mut ram, GuestAddress(0))
        .unwrap();
    assert!(ram.iter().all(|byte| *byte == 0));
    assert!(!here.has(VECTOR + 1));
    for board in [&here, &there] {
        board.go_to(DeviceState::Running);
        board.pci.resume();
        assert!(board.gets(VECTOR + 1));
        assert_eq!(board.registers(), registers);
        assert_eq!(board.read(registers + SCRATCH), 0x1234_5678);
        assert!(board.within(|| board.read(registers + RUNG) == 1));
        // What was masked is still pending.
        assert_eq!(board.read(table + 0x800), 1 << 2);
        for vector in [2, 3] {
            board.write(table + u64::from(vector) * 16 + 12, 0);
            assert!(board.gets(VECTOR + vector));
        }
        assert_eq!(board.read(table + 0x800), 0);
        // And all works on.
        board.forget_interrupts();
        board.pci.resume();
        board.write(registers + RAISE, 0);
        assert!(board.gets(VECTOR));
        assert!((1..4).all(|vector| !board.has(VECTOR + vector)));
        assert_eq!(board.read(registers + RUNG), 1);
    }
    assert_eq!(here.pci.save().unwrap().endpoints.len(), 1);
}

#[test]
fn a_wired_interrupt_is_there_as_long_as_the_device_holds_it() {
    const PIN: u8 = 0x60;
    let (Some(there), Some(here)) = (Board::new(), Board::new()) else {
        return;
    };
    // Pin A of device 1.
    let gsi = layout::PCI_INTX_GSI + 1;
    let has = |board: &Board| board.has(PIN.into());
    let gets = |board: &Board| board.gets(PIN.into());
    for board in [&there, &here] {
        board.route_pin(gsi, PIN);
    }
    there.write(CONFIG + 4, 6);
    let registers = there.registers();
    there.write(registers + INTX, 1);
    assert!(gets(&there));
    // The guest has not served it when it is stopped. (Its vCPU knows nothing of it here.)
    there.pci.disconnect_interrupts().unwrap();
    there.go_to(DeviceState::StopCopy);
    let saved = there.pci.save().unwrap();
    let mut data = vec![0; 1 << 20];
    let migration = there.pci.devices()[0].migration().unwrap();
    let length = migration.read(&mut data).unwrap().length;

    here.go_to(DeviceState::Resuming);
    here.pci.restore(&saved).unwrap();
    let migration = here.pci.devices()[0].migration().unwrap();
    migration.write(&data[..length]).unwrap();
    for board in [&here, &there] {
        board.forget_interrupts();
        board.route_pin(gsi, PIN);
        board.go_to(DeviceState::Running);
        assert!(!has(board));
        board.pci.resume();
        assert!(gets(board));
        // And it is not if it does not.
        board.write(registers + INTX, 0);
        board.pci.disconnect_interrupts().unwrap();
        board.forget_interrupts();
        board.route_pin(gsi, PIN);
        board.pci.resume();
        assert_eq!(board.read(registers + INTX), 0);
        assert!(!has(board));
        board.write(registers + INTX, 1);
        assert!(gets(board));
    }
}

#[test]
fn another_bus_is_told_by_what_is_different() {
    let Some(board) = Board::new() else { return };
    let mut saved = board.pci.fingerprints();
    saved[0].id = "other".to_owned();
    let told: Vec<_> = board
        .pci
        .compare(&saved)
        .iter()
        .map(ToString::to_string)
        .collect();
    assert_eq!(
        told,
        [
            "other: it is not configured here",
            "demo: it is configured here, and was not there"
        ]
    );
    let mut state = board.pci.save().unwrap();
    state.endpoints[0].id = "other".to_owned();
    let refused = board.pci.restore(&state).unwrap_err().to_string();
    assert_eq!(refused, "demo is on the bus, and nothing was saved of it");
    state.endpoints.clear();
    let refused = board.pci.restore(&state).unwrap_err().to_string();
    assert_eq!(refused, "0 saved devices, and there are 1 on the bus");
}

#[test]
fn an_edge_waits_while_it_is_disconnected() {
    let Some(board) = Board::new() else { return };
    let edge = board.interrupts.edge(layout::COM1_GSI).unwrap();
    board.interrupts.set_edges_connected(false).unwrap();
    assert_eq!(board.interrupts.signalled_edges(), [0; 0]);
    edge.write(1).unwrap();
    assert_eq!(board.interrupts.signalled_edges(), [layout::COM1_GSI]);
    board.interrupts.set_edges_connected(true).unwrap();
    // KVM takes it.
    assert!(board.within(|| board.interrupts.signalled_edges().is_empty()));
    board.interrupts.set_edges_connected(false).unwrap();
    board
        .interrupts
        .signal_edges(&[layout::COM1_GSI, 99])
        .unwrap();
    assert_eq!(board.interrupts.signalled_edges(), [layout::COM1_GSI]);
}
