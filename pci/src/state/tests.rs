//! What is saved of anything comes back, and what has been tampered with is refused or is what it says.

use std::fmt::Debug;
use std::sync::Arc;

use proptest::collection::vec;
use proptest::prelude::*;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::{
    BarKind, BarSpec, Bars, ConfigPorts, ConfigSpace, ConfigSpaceState, Endpoint, HostBridge, Msi,
    Msix, Segment, StateError,
};

/// Saves, restores and saves again, with what `tamper` makes of what was saved in between.
fn check<Live, State>(
    live: &Live,
    save: impl Fn(&Live) -> State,
    restored: impl Fn(&State) -> Result<Live, StateError>,
    tamper: &Tamper,
) where
    Live: Debug + PartialEq,
    State: Debug + PartialEq + Serialize + DeserializeOwned,
{
    let saved = save(live);
    let mut text = serde_json::to_value(&saved).unwrap();
    let parsed: State = serde_json::from_value(text.clone()).unwrap();
    assert_eq!(parsed, saved);
    assert_eq!(restored(&parsed).unwrap(), *live);

    tamper.apply(&mut text);
    if let Ok(tampered) = serde_json::from_value(text)
        && let Ok(live) = restored(&tampered)
    {
        assert_eq!(save(&live), tampered);
    }
}

/// A change of one number, or of the length of one list.
#[derive(Debug, Clone)]
struct Tamper {
    which: usize,
    value: u64,
}

fn tamper() -> impl Strategy<Value = Tamper> {
    let values = prop_oneof![
        Just(0),
        Just(u64::MAX),
        any::<u64>(),
        (0..64_u32).prop_map(|bit| 1 << bit)
    ];
    (any::<usize>(), values).prop_map(|(which, value)| Tamper { which, value })
}

impl Tamper {
    fn apply(&self, value: &mut Value) {
        let count = places(value);
        let mut left = self.which % count.max(1);
        self.visit(value, &mut left);
    }

    fn visit(&self, value: &mut Value, left: &mut usize) -> bool {
        let here = matches!(value, Value::Number(_) | Value::Array(_));
        if here && *left == 0 {
            match value {
                Value::Array(list) if self.value.is_multiple_of(2) => drop(list.pop()),
                Value::Array(list) => list.extend(list.first().cloned()),
                number => {
                    let old = number.as_u64().unwrap();
                    *number = (old ^ (self.value & 0xffff_ffff >> (self.value % 4 * 8))).into();
                }
            }
            return true;
        }
        *left -= usize::from(here);
        match value {
            Value::Array(list) => list.iter_mut().any(|value| self.visit(value, left)),
            Value::Object(map) => map.values_mut().any(|value| self.visit(value, left)),
            _ => false,
        }
    }
}

/// How many numbers and lists there are.
fn places(value: &Value) -> usize {
    match value {
        Value::Number(_) => 1,
        Value::Array(list) => 1 + list.iter().map(places).sum::<usize>(),
        Value::Object(map) => map.values().map(places).sum(),
        _ => 0,
    }
}

fn writes() -> impl Strategy<Value = Vec<(u16, Vec<u8>)>> {
    vec((0..0x40_u16, vec(any::<u8>(), 1..=8)), 0..16)
}

proptest! {
    #[test]
    fn bars_come_back(writes in writes(), with_rom: bool, tamper in tamper()) {
        let spec = |kind, size| Some(BarSpec { kind, size });
        let memory = BarKind::Memory64 { prefetchable: true };
        let specs = [spec(memory, 1 << 33), None, spec(BarKind::Io, 64), None, None, None];
        let fresh = Bars::new(specs).unwrap();
        let fresh = if with_rom { fresh.with_rom(4096).unwrap() } else { fresh };
        let mut bars = fresh.clone();
        for (offset, data) in writes {
            bars.write(offset, &data);
        }
        check(&bars, Bars::save, |state| fresh.restored(state), &tamper);
    }

    #[test]
    fn configuration_space_comes_back(writes in writes(), tamper in tamper()) {
        let mut fresh = ConfigSpace::new();
        fresh.set(0, &[0x5a; 64]);
        fresh.set_writable(4, &[0xff, 0x0f, 0xf0]);
        fresh.set_clearable(8, &[3]);
        let mut space = fresh.clone();
        for (offset, data) in writes {
            space.write(offset, &data);
        }
        check(&space, ConfigSpace::save, |state| fresh.restored(state), &tamper);
    }

    #[test]
    fn msi_comes_back(control: u16, writes in writes(), tamper in tamper()) {
        let fresh = Msi::new(control);
        let mut msi = fresh.clone();
        for (offset, data) in writes {
            msi.write(offset % 24, &data);
        }
        check(&msi, Msi::save, |state| fresh.restored(state), &tamper);
    }

    #[test]
    fn msix_comes_back(
        vectors in 1..6_u16,
        control: u16,
        writes in writes(),
        tamper in tamper(),
    ) {
        let fresh = Msix::new(vectors);
        let mut msix = fresh.clone();
        msix.set_control(control);
        for (offset, data) in writes {
            msix.write_table(offset.into(), &data);
        }
        check(&msix, Msix::save, |state| fresh.restored(state), &tamper);
    }
}

#[test]
fn a_byte_that_is_there_twice_does_not_stand_for_another() {
    let mut space = ConfigSpace::new();
    space.set_writable(4, &[0xff, 0xff]);
    let mut state = space.save();
    state.bytes[1] = state.bytes[0];
    let error = StateError::Unexpected { offset: 4 };
    assert_eq!(space.restored(&state), Err(error));
}

#[test]
fn a_table_of_another_length_is_refused() {
    let state = Msix::new(4).save();
    let error = Msix::new(5).restored(&state).unwrap_err();
    // The number of vectors is in the control register, too.
    assert!(matches!(error, StateError::Impossible { .. }), "{error}");
    let mut state = Msix::new(5).save();
    state.table.pop();
    let error = Msix::new(5).restored(&state).unwrap_err();
    assert_eq!(
        error.to_string(),
        "entries of the MSI-X table: 4 saved, and there are 5"
    );
}

#[test]
fn what_a_newer_version_has_more_is_not_overlooked() {
    let text = r#"{"bytes": [], "more": 1}"#;
    assert!(serde_json::from_str::<ConfigSpaceState>(text).is_err());
}

#[test]
fn the_host_bridge_and_its_ports_come_back() {
    let there = HostBridge::new();
    there.config_write(4, &[0xff; 2]);
    let here = HostBridge::new();
    here.restore(&there.save()).unwrap();
    assert_eq!(here.save(), there.save());
    let mut state = there.save();
    state.bytes[0].value = 0;
    assert!(here.restore(&state).is_err());
    assert_eq!(here.save(), there.save());

    let ports = ConfigPorts::new(Arc::new(Segment::new()));
    ports.restore(0x8000_1110).unwrap();
    let mut address = [0; 4];
    ports.read(0, &mut address);
    assert_eq!(u32::from_le_bytes(address), ports.save());
    assert!(ports.restore(1).is_err());
    assert_eq!(ports.save(), 0x8000_1110);
}
