//! An endpoint is saved, and restored in another machine: nothing is lost on the way, nothing comes twice, and nothing
//! that cannot be is believed.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use std::sync::Arc;

use devices::{
    Difference, EndpointState, Fingerprint, Irq, IrqInfo, MessageControl, RestoreError,
    RungDoorbell, SaveError,
};
use pci::{ByteState, Endpoint, TreePath};
use proptest::collection::vec;
use proptest::prelude::*;
use rustix::event::{EventfdFlags, eventfd};

use support::{DOORBELLS, Device, MEMORY, MSI, MSIX, POWER, Rig, TABLE, VECTORS, signal};

/// Makes a state one that cannot be.
type Change = fn(&mut EndpointState);

/// What has been saved arrives as text.
fn moved(state: &EndpointState) -> EndpointState {
    serde_json::from_str(&serde_json::to_string(state).unwrap()).unwrap()
}

/// All that a guest can see of what the VMM owns.
fn seen(rig: &Rig) -> Vec<u32> {
    let config = (0..0x100).step_by(4).map(|offset| rig.config(offset));
    let end = TABLE + 16 * u64::from(VECTORS);
    let table = (TABLE..end).step_by(4).map(|offset| {
        let mut data = [0; 4];
        rig.endpoint.bar_read(MEMORY, offset, &mut data);
        u32::from_le_bytes(data)
    });
    config.chain(table).collect()
}

#[test]
fn interrupts_of_a_stopped_device_come_once_where_it_goes_on() {
    let there = Rig::new();
    there.enable_msix(&[0, 2, 3]);
    there.set_entry(1, true);
    there.device.signal(Irq::Msix, 0);
    assert_eq!(there.machine.delivered(), [0x40]);

    there.endpoint.disconnect_interrupts().unwrap();
    // Twice is once, as with KVM.
    there.device.signal(Irq::Msix, 2);
    there.device.signal(Irq::Msix, 2);
    there.device.signal(Irq::Msix, 3);
    assert_eq!(there.machine.delivered(), [0; 0]);
    let state = moved(&there.endpoint.save().unwrap());
    assert_eq!(state.signalled, [2, 3]);

    let here = Rig::new();
    here.endpoint.restore(&state).unwrap();
    assert_eq!(seen(&here), seen(&there));
    assert_eq!(here.machine.mapped(), there.machine.mapped());
    // The device may signal before the guest runs.
    here.device.signal(Irq::Msix, 0);
    assert_eq!(here.machine.delivered(), [0; 0]);
    here.endpoint.resume().unwrap();
    assert_eq!(here.machine.delivered(), [0x40, 0x42, 0x43]);
    here.device.signal(Irq::Msix, 3);
    assert_eq!(here.machine.delivered(), [0x43]);

    // The same if it stays.
    there.endpoint.resume().unwrap();
    assert_eq!(there.machine.delivered(), [0x42, 0x43]);
    there.endpoint.resume().unwrap();
    assert_eq!(there.machine.delivered(), [0; 0]);
}

#[test]
fn what_is_pending_while_masked_stays_pending() {
    let there = Rig::new();
    there.enable_msix(&[0, 65]);
    there.set_entry(65, true);
    there.device.signal(Irq::Msix, 65);
    assert_eq!(there.machine.delivered(), [0; 0]);
    there.endpoint.disconnect_interrupts().unwrap();
    let state = moved(&there.endpoint.save().unwrap());
    assert_eq!(state.signalled, [65]);

    let here = Rig::new();
    here.endpoint.restore(&state).unwrap();
    here.endpoint.resume().unwrap();
    assert_eq!(here.machine.delivered(), [0; 0]);
    let mut pending = [0; 8];
    here.endpoint.bar_read(MEMORY, 0x1008, &mut pending);
    assert_eq!(pending, [2, 0, 0, 0, 0, 0, 0, 0]);
    here.set_entry(65, false);
    assert_eq!(here.machine.delivered(), [0x40 + 65]);
}

#[test]
fn msi_moves_too() {
    let there = Rig::new();
    there.endpoint.config_write(0x04, &[7, 4]);
    for (offset, value) in [(4, 0xfee0_0000_u32), (8, 0), (12, 0x60), (16, 0)] {
        there
            .endpoint
            .config_write(MSI + offset, &value.to_le_bytes());
    }
    there.endpoint.config_write(MSI + 2, &[0x11, 0]);
    there.endpoint.disconnect_interrupts().unwrap();
    there.device.signal(Irq::Msi, 1);
    let state = moved(&there.endpoint.save().unwrap());
    assert_eq!(state.signalled, [1]);
    let here = Rig::new();
    here.endpoint.restore(&state).unwrap();
    here.endpoint.resume().unwrap();
    assert_eq!(here.machine.delivered(), [0x61]);
    let sees = [
        (0x04, vec![7, 4]),
        (u64::from(MSI) + 2, vec![0x95, 1]),
        (u64::from(MSIX) + 2, vec![VECTORS.to_le_bytes()[0] - 1, 0]),
    ];
    assert_eq!(here.device.take_writes(), sees);
}

#[test]
fn msi_sends_what_it_sends_however_many_vectors_are_granted() {
    let rig = Rig::new();
    rig.endpoint.config_write(0x04, &[7, 4]);
    for (offset, value) in [(4, 0xfee0_0000_u32), (12, 0x60)] {
        rig.endpoint
            .config_write(MSI + offset, &value.to_le_bytes());
    }
    for (control, granted) in [(0x01, 1), (0x21, 4), (0x11, 2)] {
        rig.endpoint.config_write(MSI + 2, &[control, 0]);
        for vector in 0..granted {
            rig.device.signal(Irq::Msi, vector);
            assert_eq!(rig.machine.delivered(), [0x60 + u32::from(vector)]);
        }
    }
}

#[test]
fn a_wired_interrupt_comes_again_while_there_is_something_to_say() {
    for automasked in [true, false] {
        let device = || {
            let mut device = Device::new();
            device.irqs[0] = IrqInfo {
                count: 1,
                automasked,
            };
            device
        };
        let there = Rig::of(device());
        there.endpoint.config_write(0x04, &[7, 0]);
        there.device.signal(Irq::Intx, 0);
        assert!(there.machine.is_asserted());
        there.endpoint.disconnect_interrupts().unwrap();
        let state = moved(&there.endpoint.save().unwrap());
        let here = Rig::of(device());
        here.endpoint.restore(&state).unwrap();
        for rig in [&here, &there] {
            assert!(!rig.machine.is_asserted());
            rig.device.take_unmasked();
            rig.endpoint.resume().unwrap();
            // A device that masks itself is asked; of the other, nobody knows.
            assert_eq!(rig.device.take_unmasked(), usize::from(automasked));
            assert_eq!(rig.machine.is_asserted(), !automasked);
            rig.device.signal(Irq::Intx, 0);
            assert!(rig.machine.is_asserted());
        }
    }
}

/// Such a device forgets what it has to say while it is masked, so the guest looks once more after it has served an interrupt
/// of it, also where it only ends serving one.
#[test]
fn a_device_without_an_event_to_unmask_it_is_looked_at_again() {
    let device = || {
        let mut device = Device::new();
        device.unmasks_on_event = false;
        device
    };
    let there = Rig::of(device());
    there.endpoint.config_write(0x04, &[7, 0]);
    there.device.signal(Irq::Intx, 0);
    there.machine.await_asserted();
    // The guest is serving it.
    there.endpoint.disconnect_interrupts().unwrap();
    let state = moved(&there.endpoint.save().unwrap());
    let here = Rig::of(device());
    here.endpoint.restore(&state).unwrap();
    for rig in [&here, &there] {
        rig.endpoint.resume().unwrap();
        // What is signalled now is seen no more than the end of what the guest is serving.
        assert!(rig.machine.is_asserted());
        rig.machine.serve();
        rig.machine.await_asserted();
        rig.device.take_unmasked();
        rig.machine.serve();
        // What it signalled before that would be seen with what the guest has served.
        rig.device.await_unmasked();
        rig.device.signal(Irq::Intx, 0);
        for _ in 0..2 {
            rig.machine.await_asserted();
            rig.machine.serve();
        }
    }
}

#[test]
fn doorbells_that_nobody_heard_ring_where_the_device_goes_on() {
    let there = Rig::new();
    there.enable_msix(&[0]);
    assert_eq!(there.device.hear(), [0, 0]);
    signal(&there.device.doorbells[1]);
    let state = moved(&there.endpoint.save().unwrap());
    assert_eq!(state.rung, [RungDoorbell { bar: 0, index: 1 }]);
    let here = Rig::new();
    here.endpoint.restore(&state).unwrap();
    assert_eq!(here.device.hear(), [0, 0]);
    // It may be saved again before it runs.
    assert_eq!(here.endpoint.save().unwrap().rung, state.rung);
    for rig in [&here, &there] {
        rig.endpoint.resume().unwrap();
        assert_eq!(rig.device.hear(), [0, 1]);
        rig.endpoint.resume().unwrap();
        assert_eq!(rig.device.hear(), [0, 0]);
    }
}

/// A server may have made an event that blocks whoever reads it.
#[test]
fn a_quiet_doorbell_keeps_nobody_waiting() {
    let mut device = Device::new();
    device.doorbells[0] = Arc::new(eventfd(0, EventfdFlags::CLOEXEC).unwrap());
    let rig = Rig::of(device);
    assert_eq!(rig.endpoint.save().unwrap().rung, []);
    signal(&rig.device.doorbells[0]);
    let rung = [RungDoorbell { bar: 0, index: 0 }];
    assert_eq!(rig.endpoint.save().unwrap().rung, rung);
}

#[test]
fn the_device_sees_again_what_it_has_to_see() {
    let there = Rig::new();
    there.enable_msix(&[0]);
    there.endpoint.config_write(POWER + 4, &[3, 0]);
    let state = moved(&there.endpoint.save().unwrap());
    let msix_control = vec![VECTORS.to_le_bytes()[0] - 1, 0x80];
    for message_control in [MessageControl::Forwarded, MessageControl::Arming] {
        let mut device = Device::new();
        device.message_control = message_control;
        let here = Rig::of(device);
        here.endpoint.restore(&state).unwrap();
        // A function that is not powered decodes nothing.
        assert!(here.machine.mapped().is_empty());
        let mut sees = vec![(0x04, vec![7, 0])];
        if message_control == MessageControl::Forwarded {
            sees.push((u64::from(MSI) + 2, vec![0x84, 1]));
            sees.push((u64::from(MSIX) + 2, msix_control.clone()));
        }
        sees.push((u64::from(POWER) + 4, vec![3, 0]));
        assert_eq!(here.device.take_writes(), sees);
        here.endpoint.config_write(POWER + 4, &[0, 0]);
        assert_eq!(here.machine.mapped().len(), 2);
    }
}

#[test]
fn what_cannot_be_is_refused_and_changes_nothing() {
    let there = Rig::new();
    there.enable_msix(&[0]);
    let state = there.endpoint.save().unwrap();
    let here = Rig::new();
    let as_new = seen(&here);
    let refused = |change: Change| {
        let mut state = state.clone();
        change(&mut state);
        let error = here.endpoint.restore(&state).unwrap_err();
        assert_eq!(seen(&here), as_new, "after {error}");
        assert!(here.machine.mapped().is_empty());
        assert!(here.device.take_writes().is_empty(), "{error}");
        error
    };
    use RestoreError::{Capability, Doorbell, OtherDevice, PowerState, Registers, Vector};
    let change: Change = |state| state.id.push('!');
    assert!(matches!(refused(change), OtherDevice { .. }));
    let change: Change = |state| state.path = TreePath::new(vec![(2, 0)]).unwrap();
    assert!(matches!(refused(change), OtherDevice { .. }));
    assert!(matches!(
        refused(|state| state.config.msi = None),
        Capability("MSI")
    ));
    assert!(matches!(
        refused(|state| state.config.msix = None),
        Capability("MSI-X")
    ));
    assert!(matches!(
        refused(|state| state.config.power_state = 4),
        PowerState(4)
    ));
    let changes: [Change; 3] = [
        |state| state.signalled = vec![VECTORS],
        |state| state.signalled = vec![1, 1],
        |state| state.signalled = vec![1, 0],
    ];
    for change in changes {
        assert!(matches!(refused(change), Vector(_)));
    }
    let changes: [Change; 3] = [
        |state| state.rung = vec![RungDoorbell { bar: 0, index: 2 }],
        |state| state.rung = vec![RungDoorbell { bar: 1, index: 0 }],
        |state| state.rung = vec![RungDoorbell { bar: 0, index: 1 }; 2],
    ];
    for change in changes {
        assert!(matches!(refused(change), Doorbell(_)));
    }
    let changes: [Change; 13] = [
        |state| state.config.bars.registers[1] = 0x1000,
        |state| state.config.bars.registers[2] = 0x1000,
        |state| state.config.bars.rom = 1,
        |state| state.config.space.bytes[0].offset = 0,
        |state| state.config.space.bytes.truncate(1),
        |state| state.config.space.bytes[1].value = 0xff,
        |state| {
            let byte = state.config.space.bytes[0];
            state.config.space.bytes.fill(byte);
        },
        |state| {
            state.config.space.bytes.push(ByteState {
                offset: 0xfff,
                value: 0,
            });
        },
        |state| state.config.msi.as_mut().unwrap().control |= 2,
        |state| state.config.msi.as_mut().unwrap().mask = 0x10,
        |state| state.config.msix.as_mut().unwrap().control ^= 1,
        |state| state.config.msix.as_mut().unwrap().table.truncate(1),
        |state| state.config.msix.as_mut().unwrap().table[0][3] = 2,
    ];
    for change in changes {
        let error = refused(change);
        assert!(matches!(error, Registers(_)), "{error:?}");
    }
}

#[test]
fn a_device_that_does_not_go_along_is_as_after_a_reset() {
    let there = Rig::new();
    there.enable_msix(&[0]);
    let state = there.endpoint.save().unwrap();
    let mut device = Device::new();
    device.refuses = true;
    let here = Rig::of(device);
    let error = here.endpoint.restore(&state).unwrap_err();
    assert!(matches!(error, RestoreError::Step { .. }), "{error}");
    assert!(here.machine.mapped().is_empty());
    assert_eq!(seen(&here), seen(&Rig::new()));
}

#[test]
fn what_has_been_restored_is_brought_up_to_date() {
    let there = Rig::new();
    there.enable_msix(&[0, 1]);
    there.endpoint.disconnect_interrupts().unwrap();
    there.device.signal(Irq::Msix, 0);
    let early = there.endpoint.save().unwrap();
    there.endpoint.resume().unwrap();
    there.machine.delivered();
    there.endpoint.config_write(0x14, &0x2000_u32.to_le_bytes());
    there.endpoint.disconnect_interrupts().unwrap();
    there.device.signal(Irq::Msix, 1);
    let late = there.endpoint.save().unwrap();

    let here = Rig::new();
    here.endpoint.restore(&early).unwrap();
    assert_eq!(here.machine.take_maps(), 2);
    here.endpoint.restore(&late).unwrap();
    // Only one of the two has moved.
    assert_eq!(here.machine.take_maps(), 1);
    assert_eq!(here.machine.mapped(), there.machine.mapped());
    assert_eq!(here.endpoint.save().unwrap(), late);
    here.endpoint.resume().unwrap();
    assert_eq!(here.machine.delivered(), [0x41]);
}

/// A guest may put a BAR where none can be, which does not keep it from being moved.
#[test]
fn a_bar_that_is_nowhere_stays_so() {
    let there = Rig::new();
    there.enable_msix(&[0]);
    let here = Rig::new();
    here.machine.take_address(0x1000);
    here.endpoint
        .restore(&there.endpoint.save().unwrap())
        .unwrap();
    assert_eq!(here.machine.mapped().len(), 1);
    assert_eq!(seen(&here), seen(&there));
}

#[test]
fn nothing_is_saved_of_a_lost_device() {
    let rig = Rig::new();
    let state = rig.endpoint.save().unwrap();
    rig.endpoint.give_up(&"for a test");
    assert!(matches!(rig.endpoint.save(), Err(SaveError::Lost)));
    let restored = rig.endpoint.restore(&state);
    assert!(matches!(restored, Err(RestoreError::Lost)));
    rig.endpoint.disconnect_interrupts().unwrap();
    rig.endpoint.resume().unwrap();
}

#[test]
fn a_device_of_another_kind_is_told_by_what_is_different() {
    let there = Rig::new();
    let compare = |rig: &Rig| {
        let saved = serde_json::to_string(there.endpoint.fingerprint()).unwrap();
        let saved: Fingerprint = serde_json::from_str(&saved).unwrap();
        Fingerprint::compare(&saved, rig.endpoint.fingerprint())
    };
    assert_eq!(compare(&there), []);
    // Whatever its guest has done.
    let used = Rig::new();
    used.enable_msix(&[0]);
    used.endpoint.config_write(0x3c, &[7]);
    assert_eq!(compare(&used), []);

    let different = |change: fn(&mut Device)| {
        let mut device = Device::new();
        change(&mut device);
        let found = compare(&Rig::of(device));
        assert_eq!(found.len(), 1, "{found:?}");
        found[0].to_string()
    };
    let said = different(|device| device.config[2] = 0x35);
    assert_eq!(
        said,
        "it: configuration space at 0x0 was 0x12344f52, and is 0x12354f52"
    );
    // What it can, in its own registers.
    let said = different(|device| device.config[usize::from(POWER) + 2] = 2);
    assert!(said.contains("at 0x70"), "{said}");
    let said = different(|device| device.config[usize::from(MSI) + 2] = 0x86);
    assert!(said.contains("at 0x50"), "{said}");
    let said = different(|device| device.irqs[2].count -= 1);
    assert_eq!(said, "it: it had 70 vectors of MSI-X, and has 69");
    let said = different(|device| drop(device.doorbells.pop()));
    assert!(
        said.contains("BAR0") && said.contains("doorbell at 0x104"),
        "{said}"
    );
    let said = different(|device| device.config[0x10] = 8);
    assert!(
        said.contains("of kind 0x0") && said.contains("of kind 0x8"),
        "{said}"
    );
    let said = different(|device| device.config.truncate(0xf0));
    assert!(said.contains("had 256 bytes, and has 240"), "{said}");
}

#[test]
fn a_fingerprint_may_say_anything() {
    let here = Rig::new().endpoint.fingerprint().clone();
    let mut saved = here.clone();
    saved.bars.insert(255, saved.bars[&0].clone());
    saved.registers.insert(0xffff, 1);
    saved.migration = u64::MAX;
    saved.id = "other".to_owned();
    let differences: Vec<_> = Fingerprint::compare(&saved, &here)
        .into_iter()
        .map(|mismatch| mismatch.difference)
        .collect();
    assert!(matches!(
        differences[..],
        [
            Difference::Name { .. },
            Difference::Register { offset: 0xffff, .. },
            Difference::Bar { bar: 255, .. },
            Difference::NoMigration,
            Difference::NoPrecopy,
        ]
    ));
}

/// What a guest may do.
#[derive(Debug, Clone)]
enum Step {
    Config(u16, Vec<u8>),
    Table(u64, u32),
    Signal(u16),
    Ring(usize),
}

fn step() -> impl Strategy<Value = Step> {
    let interesting = prop_oneof![
        Just(0x04_u16),
        Just(MSIX),
        Just(MSI),
        Just(POWER + 4),
        0..0x40_u16
    ];
    prop_oneof![
        (interesting, vec(any::<u8>(), 4)).prop_map(|(at, data)| Step::Config(at & !3, data)),
        (0..u64::from(VECTORS) * 4, any::<u32>()).prop_map(|(at, value)| Step::Table(at, value)),
        (0..VECTORS).prop_map(Step::Signal),
        (0..DOORBELLS.len()).prop_map(Step::Ring),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn whatever_a_guest_has_done_is_there_after_the_move(steps in vec(step(), 0..40)) {
        let there = Rig::new();
        there.enable_msix(&[0, 1, 2]);
        for step in steps {
            match step {
                Step::Config(offset, data) => there.endpoint.config_write(offset, &data),
                Step::Table(word, value) => {
                    let data = value.to_le_bytes();
                    there.endpoint.bar_write(MEMORY, TABLE + 4 * word, &data);
                }
                Step::Signal(vector) => there.device.signal_if_armed(Irq::Msix, vector),
                Step::Ring(bell) => signal(&there.device.doorbells[bell]),
            }
        }
        there.endpoint.disconnect_interrupts().unwrap();
        there.machine.delivered();
        let state = moved(&there.endpoint.save().unwrap());
        let here = Rig::new();
        here.endpoint.restore(&state).unwrap();
        prop_assert_eq!(seen(&here), seen(&there));
        prop_assert_eq!(here.machine.mapped(), there.machine.mapped());
        prop_assert_eq!(here.endpoint.save().unwrap(), state);
        there.endpoint.resume().unwrap();
        here.endpoint.resume().unwrap();
        prop_assert_eq!(here.machine.delivered(), there.machine.delivered());
    }
}
