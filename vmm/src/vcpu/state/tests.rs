use std::time::Instant;

use kvm_bindings::KVM_MP_STATE_UNINITIALIZED;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::super::{VcpuError, ioctls};
use super::VcpuState;
use crate::chips::ChipsState;
use crate::clock::TimeAway;
use crate::ending::Ending;
use crate::kvm::only_emulates;
use crate::test_machine::{
    GONE_BACK, Guest, LONG, MSRS, Machine, ROUNDS, ROUNDS_AGAIN, Rest, STOP, Saved, TICKS, Timer,
    VECTORS, has_kvm, vector_word,
};

/// KVM's emulator of instructions has no SSE.
fn has_sse() -> bool {
    !only_emulates()
}

/// Whether KVM gives the guest a time stamp counter of its own. One that only emulates does not.
fn sets_tsc() -> bool {
    !only_emulates()
}

/// Sees a guest end that was paused or restored, and that it has missed nothing.
fn finish(machine: &Machine) {
    machine.wait_for_more(ROUNDS, 10);
    machine.wait_for_more(TICKS, 3);
    machine.set_word(STOP, 1);
    machine.wait_for_output(b"Y");
    let rounds = machine.word(ROUNDS);
    assert_eq!(rounds, machine.word(ROUNDS_AGAIN));
    assert_eq!(machine.word(GONE_BACK), 0);
    if has_sse() {
        for lane in 0..4 {
            for register in 0..4 {
                let word = machine.word(VECTORS + register * 16 + lane * 4);
                assert_eq!(word, vector_word(register, lane));
            }
            assert_eq!(machine.word(VECTORS + 64 + lane * 4), rounds);
        }
    }
}

/// All kinds of guests.
const KINDS: [(Timer, Rest); 4] = [
    (Timer::Periodic, Rest::Never),
    (Timer::Deadline, Rest::Never),
    (Timer::Periodic, Rest::UntilTick),
    (Timer::Deadline, Rest::UntilTick),
];

fn running(timer: Timer, rest: Rest) -> Machine {
    let mut machine = Machine::with_guest(1, &Guest::new(timer, rest, has_sse()));
    machine.run();
    machine.wait_for_more(ROUNDS, 10);
    machine.wait_for_more(TICKS, 3);
    machine
}

/// All that stays as it is while the guest stands still.
fn unmoving(saved: &Saved) -> Value {
    let mut value = serde_json::to_value(saved).unwrap();
    for vcpu in value["vcpus"].as_array_mut().unwrap() {
        vcpu["tsc"] = json!(null);
        // The timer's current count (Intel SDM, volume 3, table 10-1).
        let lapic = vcpu["lapic"].as_str().unwrap();
        vcpu["lapic"] = json!([lapic[..0x390 * 2], lapic[0x394 * 2..]]);
        // Hyper-V's reference counter, and for how long the vCPU has run.
        let msrs = vcpu["msrs"].as_array_mut().unwrap();
        msrs.retain(|msr| msr["index"] != 0x4000_0020 && msr["index"] != 0x4000_0010);
    }
    value["clock"] = json!(null);
    // When a channel's count was loaded, in the host's time, is in the last 8 of its 24 bytes.
    let pit = value["chips"]["pit"].as_str().unwrap();
    let channels: Vec<_> = (0..3).map(|n| &pit[n * 48..n * 48 + 32]).collect();
    value["chips"]["pit"] = json!([channels, pit[144..]]);
    value
}

fn assert_unmoved(one: &Saved, other: &Saved) {
    /// Piece by piece, so that a failure can be read.
    fn compare(path: &str, one: &Value, other: &Value) {
        match (one, other) {
            (Value::Object(ones), Value::Object(others)) => {
                assert!(ones.keys().eq(others.keys()));
                for (key, one) in ones {
                    compare(&format!("{path}/{key}"), one, &others[key]);
                }
            }
            _ => assert_eq!(one, other, "{path}"),
        }
    }
    let (one, other) = (unmoving(one), unmoving(other));
    let vcpus = [&one, &other].map(|saved| saved["vcpus"].as_array().unwrap());
    assert_eq!(vcpus[0].len(), vcpus[1].len());
    for (one, other) in vcpus[0].iter().zip(vcpus[1]) {
        compare("vcpu", one, other);
    }
    compare("chips", &one["chips"], &other["chips"]);
}

fn through_json(saved: &Saved) -> Saved {
    serde_json::from_str(&serde_json::to_string(saved).unwrap()).unwrap()
}

#[test]
fn guest_goes_on_in_another_vm() {
    if !has_kvm() {
        return;
    }
    for (timer, rest) in KINDS {
        let first = running(timer, rest);
        let saved = first.pause();
        assert_eq!(through_json(&saved), saved);
        let [vcpu] = saved.vcpus.as_slice() else {
            panic!("one vCPU")
        };
        for (index, data) in MSRS {
            let msr = vcpu.msrs.iter().find(|msr| msr.index == index);
            assert_eq!(msr.map(|msr| msr.data), Some(data), "MSR {index:#x}");
        }
        let new = ChipsState::save(&Machine::new(1).vm).unwrap();
        assert!(saved.chips.differs_everywhere(&new));
        assert_eq!(vcpu.debugregs.db, [0x1111, 0x2222, 0x3333, 0x4444]);
        assert_eq!(vcpu.regs.rsi, 0x5151_5151);

        let mut second = Machine::restored(&first, &through_json(&saved));
        let restored = second.read();
        assert_unmoved(&restored, &saved);
        assert!(restored.clock.kvmclock() >= saved.clock.kvmclock());
        second.run();
        finish(&second);
        // The saving has not touched the first.
        first.vcpus.resume();
        finish(&first);
    }
}

#[test]
fn guest_outlives_a_thousand_pauses() {
    if !has_kvm() {
        return;
    }
    for (timer, rest) in KINDS {
        let machine = running(timer, rest);
        for _ in 0..250 {
            let saved = machine.pause();
            let again = machine.vcpus.save().unwrap();
            assert_eq!(again[0].regs, saved.vcpus[0].regs);
            assert_eq!(again[0].xsave, saved.vcpus[0].xsave);
            machine.vcpus.resume();
            machine.wait_for_more(ROUNDS, 1);
        }
        finish(&machine);
    }
}

#[test]
fn guest_goes_through_many_vms() {
    if !has_kvm() {
        return;
    }
    let mut machine = running(Timer::Deadline, Rest::UntilTick);
    for _ in 0..20 {
        let saved = machine.pause();
        let mut next = Machine::restored(&machine, &saved);
        next.run();
        next.wait_for_more(ROUNDS, 1);
        machine = next;
    }
    finish(&machine);
}

#[test]
fn reset_brings_back_the_state_at_power_on() {
    if !has_kvm() {
        return;
    }
    let new = Machine::new(1).read();
    let mut machine = running(Timer::Periodic, Rest::Never);
    machine.stopped = machine.vcpus.stop();
    let used = machine.read();
    machine.stopped[0].reset().unwrap();
    let reset = machine.read();
    assert_unmoved(
        &Saved {
            chips: new.chips.clone(),
            ..reset.clone()
        },
        &new,
    );
    if sets_tsc() {
        let [used, reset] = [used, reset].map(|saved| saved.vcpus[0].tsc.unwrap());
        assert!(reset.value() < used.value(), "the counter starts again");
    }
}

#[test]
fn counters_stay_as_far_apart() {
    const DISTANCE: u64 = 12_345;
    if !has_kvm() {
        return;
    }
    let mut first = Machine::with_guest(2, &Guest::new(Timer::Periodic, Rest::Never, has_sse()));
    let fd = &first.stopped[1].fd;
    let offset = ioctls::tsc_offset(fd).unwrap();
    ioctls::set_tsc_offset(fd, offset.wrapping_add(DISTANCE)).unwrap();
    first.run();
    first.wait_for_more(ROUNDS, 10);
    first.wait_for_more(TICKS, 3);
    let saved = first.pause();
    let mut second = Machine::restored(&first, &saved);
    let restored = second.read();
    let waits = restored
        .vcpus
        .iter()
        .map(|vcpu| vcpu.mp_state)
        .collect::<Vec<_>>();
    assert_eq!(
        waits[1], KVM_MP_STATE_UNINITIALIZED,
        "it waits to be started"
    );
    if sets_tsc() {
        let offsets = [&saved, &restored].map(|saved| {
            let tscs = saved.vcpus.iter().map(|vcpu| vcpu.tsc.unwrap());
            tscs.map(|tsc| tsc.offset().unwrap()).collect::<Vec<_>>()
        });
        for offsets in &offsets {
            assert_eq!(offsets[1].wrapping_sub(offsets[0]), DISTANCE);
        }
        assert_ne!(offsets[0], offsets[1], "the host's counter has gone on");
    }
    second.run();
    finish(&second);
}

#[test]
fn time_away_is_counted_on_demand() {
    const AWAY: u64 = 1_000_000_000_000;
    if !has_kvm() {
        return;
    }
    let first = running(Timer::Periodic, Rest::Never);
    let mut saved = first.pause();
    saved.clock.age(AWAY);
    let clock = |machine: &Machine| machine.read().clock.kvmclock() - saved.clock.kvmclock();
    let tsc = |machine: &Machine| machine.read().vcpus[0].tsc.unwrap().value();

    let mut skipped = Machine::new(1);
    skipped.restore(&saved, TimeAway::Skipped).unwrap();
    assert!(clock(&skipped) < AWAY);
    let mut counted = Machine::new(1);
    let result = counted.restore(&saved, TimeAway::Counted);
    assert!(clock(&counted) >= AWAY);
    if sets_tsc() {
        result.unwrap();
        // A host's counter has a MHz at least.
        assert!(tsc(&counted) > tsc(&skipped) + AWAY / 1000);
    } else {
        // A guest that has the host's counter cannot be ahead of it.
        assert!(
            matches!(result, Err(VcpuError::TscGoesBack { .. })),
            "{result:?}"
        );
    }
}

#[test]
fn running_vcpu_is_not_saved() {
    if !has_kvm() {
        return;
    }
    let machine = running(Timer::Periodic, Rest::Never);
    let result = machine.vcpus.save();
    assert!(matches!(result, Err(VcpuError::NotPaused { vcpu: 0 })));
}

#[test]
fn crashed_vcpu_is_not_saved() {
    if !has_kvm() {
        return;
    }
    let mut machine = Machine::with_guest(1, &Guest::crashing());
    machine.run();
    assert_eq!(machine.wait_for_ending(), Ending::TripleFault { vcpu: 0 });
    machine.vcpus.pause();
    assert!(machine.vcpus.wait_paused(Instant::now() + LONG));
    let result = machine.vcpus.save();
    assert!(matches!(result, Err(VcpuError::Halted { vcpu: 0 })));
}

/// A saved vCPU, changed.
fn changed(change: impl FnOnce(&mut Value)) -> Result<VcpuState, String> {
    let machine = Machine::new(1);
    let mut value = serde_json::to_value(machine.stopped[0].save().unwrap()).unwrap();
    change(&mut value);
    serde_json::from_value(value).map_err(|error| error.to_string())
}

#[test]
fn corrupted_state_is_refused() {
    if !has_kvm() {
        return;
    }
    let longer = |value: &mut Value, digits: usize| {
        *value = json!(value.as_str().unwrap().to_owned() + &"0".repeat(digits));
    };
    let refused = |change: &dyn Fn(&mut Value)| changed(change).unwrap_err();
    for (error, part) in [
        (refused(&|v| longer(&mut v["regs"], 2)), "invalid length"),
        (
            refused(&|v| v["lapic"] = json!("00")),
            "expected 1024 bytes",
        ),
        (
            refused(&|v| longer(&mut v["xsave"], 1 << 20)),
            "expected 65536",
        ),
        (
            refused(&|v| v["msrs"] = vec![v["msrs"][0].clone(); 257].into()),
            "256 elements",
        ),
        (refused(&|v| v["mp_state"] = json!(-1)), "invalid value"),
        (refused(&|v| v["more"] = json!(1)), "unknown field `more`"),
        (
            refused(&|v| drop(v.as_object_mut().unwrap().remove("events"))),
            "missing field",
        ),
    ] {
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn state_of_another_cpu_is_refused() {
    if !has_kvm() {
        return;
    }
    let restore = |change: &dyn Fn(&mut Value)| {
        let error = Machine::new(1).stopped[0]
            .restore(&changed(change).unwrap())
            .unwrap_err();
        error.to_string()
    };
    // A register that no CPU has.
    let error = restore(&|value| {
        value["msrs"][0] = json!({ "index": 0xdead_0000_u32, "data": 1 });
    });
    assert!(
        error.contains("0x1 for MSR 0xdead0000 of vCPU 0, which is not there"),
        "{error}"
    );
    let error = restore(&|value| {
        let more = value["xsave"].as_str().unwrap().to_owned() + "00000000";
        value["xsave"] = json!(more);
    });
    assert!(error.contains("take the FPU's state"), "{error}");
    let error = restore(&|value| value["mp_state"] = json!(77));
    assert!(error.contains("take the MP state"), "{error}");
}

#[test]
fn untouched_register_of_another_kvm_is_left_out() {
    if !has_kvm() {
        return;
    }
    let state = changed(|value| {
        value["msrs"][0] = json!({ "index": 0xdead_0000_u32, "data": 0 });
    });
    Machine::new(1).stopped[0].restore(&state.unwrap()).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever a state says that can be parsed, KVM takes it or there is an error.
    #[test]
    fn no_state_panics(
        field in 0_usize..6,
        at in any::<prop::sample::Index>(),
        digits in "[0-9a-f]{1,16}",
    ) {
        if !has_kvm() {
            return Ok(());
        }
        let fields = ["regs", "sregs", "xsave", "debugregs", "lapic", "events"];
        let state = changed(|value| {
            let mut text = value[fields[field]].as_str().unwrap().to_owned();
            let at = at.index(text.len() - digits.len());
            text.replace_range(at..at + digits.len(), &digits);
            value[fields[field]] = json!(text);
        });
        let mut machine = Machine::new(1);
        let _ = machine.stopped[0].restore(&state.unwrap());
        machine.stopped[0].save().unwrap();
    }
}
