use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::endpoint::BarIndex;

const MEMORY32: BarKind = BarKind::Memory32 {
    prefetchable: false,
};
const MEMORY64: BarKind = BarKind::Memory64 { prefetchable: true };

const WINDOWS: Windows = Windows {
    io: Window {
        start: 0x1000,
        length: 0xf000,
    },
    memory32: Window {
        start: 0xc000_0000,
        length: 0x3c00_0000,
    },
    memory64: Window {
        start: 0x40_0000_0000,
        length: 0x40_0000_0000,
    },
};

fn any_spec() -> impl Strategy<Value = BarSpec> {
    prop_oneof![
        (2u32..=8).prop_map(|log2| BarSpec {
            kind: BarKind::Io,
            size: 1 << log2
        }),
        (4u32..=31).prop_map(|log2| BarSpec {
            kind: MEMORY32,
            size: 1 << log2
        }),
        (4u32..=39).prop_map(|log2| BarSpec {
            kind: MEMORY64,
            size: 1 << log2
        }),
    ]
}

/// Whether two placed BARs are in the same space and share a page, or a port.
fn share(a: &(BarSpec, u64), b: &(BarSpec, u64)) -> bool {
    let range = |(spec, address): &(BarSpec, u64)| {
        let unit = if spec.kind == BarKind::Io { 1 } else { 4096 };
        (unit, address / unit, (address + spec.size - 1) / unit)
    };
    let ((unit, first, last), (other_unit, other_first, other_last)) = (range(a), range(b));
    unit == other_unit && first <= other_last && other_first <= last
}

proptest! {
    #[test]
    fn placed_bars_are_aligned_and_apart(specs in vec((any_spec(), any::<bool>()), 0..64)) {
        let mut allocator = BarAllocator::new(&WINDOWS).unwrap();
        let mut placed: Vec<(BarSpec, u64)> = Vec::new();
        for (spec, free_one) in specs {
            if free_one && !placed.is_empty() {
                let (spec, address) = placed.swap_remove(placed.len() / 2);
                prop_assert_eq!(allocator.free(&spec, address), Ok(()));
            }
            let Ok(address) = allocator.allocate(&spec) else { continue };
            prop_assert_eq!(address % spec.size, 0);
            prop_assert!(WINDOWS.contain(&spec, address));
            let new = (spec, address);
            prop_assert!(!placed.iter().any(|old| share(old, &new)));
            placed.push(new);
        }
        for (spec, address) in placed {
            prop_assert_eq!(allocator.free(&spec, address), Ok(()));
        }
        let all = [&allocator.io, &allocator.memory32, &allocator.memory64];
        let free = all.map(|pool| pool.free);
        prop_assert_eq!(free, [0xf000, 0x3c00_0000, 0x40_0000_0000]);
    }
}

#[test]
fn a_function_is_assigned_largest_first() {
    let mut allocator = BarAllocator::new(&WINDOWS).unwrap();
    let spec = |size| {
        Some(BarSpec {
            kind: MEMORY32,
            size,
        })
    };
    let specs = [spec(0x1000), spec(0x10_0000), spec(16), None, None, None];
    let mut bars = Bars::new(specs).unwrap();
    allocator.assign(&mut bars).unwrap();
    let addresses: Vec<_> = bars
        .specs()
        .map(|(bar, _)| bars.address(bar).unwrap())
        .collect();
    assert_eq!(addresses, [0xc010_0000, 0xc000_0000, 0xc010_1000]);
}

#[test]
fn functions_are_assigned_apart() {
    let mut allocator = BarAllocator::new(&WINDOWS).unwrap();
    let spec = Some(BarSpec {
        kind: MEMORY64,
        size: 0x1000,
    });
    let addresses = [(); 2].map(|()| {
        let mut bars = Bars::new([spec, None, None, None, None, None]).unwrap();
        allocator.assign(&mut bars).unwrap();
        bars.address(BarIndex::ALL[0])
    });
    assert_eq!(addresses, [Some(0x40_0000_0000), Some(0x40_0000_1000)]);
}

#[test]
fn a_function_that_does_not_fit_leaves_no_trace() {
    let mut allocator = BarAllocator::new(&WINDOWS).unwrap();
    let huge = Some(BarSpec {
        kind: MEMORY32,
        size: 0x2000_0000,
    });
    let small = Some(BarSpec {
        kind: BarKind::Io,
        size: 256,
    });
    let mut bars = Bars::new([huge, huge, small, None, None, None]).unwrap();
    let untouched = bars.clone();
    let full = allocator.assign(&mut bars).unwrap_err();
    assert_eq!(
        full.to_string(),
        "no room for a BAR of 0x20000000 bytes in the 32-bit memory window, \
         where 0x1c000000 bytes are left"
    );
    assert_eq!(bars, untouched);
    assert_eq!(allocator.memory32.free, WINDOWS.memory32.length);
}

#[test]
fn a_64_bit_bar_goes_below_4_gib_only_when_it_must() {
    let mut allocator = BarAllocator::new(&WINDOWS).unwrap();
    let spec = BarSpec {
        kind: MEMORY64,
        size: 0x20_0000_0000,
    };
    assert_eq!(allocator.allocate(&spec), Ok(0x40_0000_0000));
    assert_eq!(allocator.allocate(&spec), Ok(0x60_0000_0000));
    let full = WindowError::Full {
        kind: WindowKind::Memory64,
        size: spec.size,
        free: 0,
    };
    assert_eq!(allocator.allocate(&spec), Err(full));

    let small = BarSpec {
        kind: MEMORY64,
        size: 0x1000,
    };
    assert_eq!(allocator.allocate(&small), Ok(0xc000_0000));
    assert_eq!(allocator.free(&small, 0xc000_0000), Ok(()));
}

#[test]
fn only_what_was_placed_can_be_freed() {
    let mut allocator = BarAllocator::new(&WINDOWS).unwrap();
    let spec = BarSpec {
        kind: MEMORY32,
        size: 0x1000,
    };
    for address in [0, 0xc000_0000, 0x40_0000_0000, u64::MAX] {
        let not_allocated = WindowError::NotAllocated {
            address,
            size: 0x1000,
        };
        assert_eq!(allocator.free(&spec, address), Err(not_allocated));
    }
}

#[test]
fn windows_that_are_none_are_refused() {
    for window in [
        Window {
            start: 0x1000,
            length: 0,
        },
        Window {
            start: u64::MAX,
            length: 2,
        },
    ] {
        let refused = BarAllocator::new(&Windows {
            memory64: window,
            ..WINDOWS
        })
        .unwrap_err();
        assert_eq!(
            refused,
            WindowError::Invalid {
                kind: WindowKind::Memory64,
                window
            }
        );
    }
}

#[test]
fn a_window_contains_what_ends_within_it() {
    let window = Window {
        start: 0x1000,
        length: 0x1000,
    };
    assert!(window.contains(0x1000, 0x1000));
    assert!(!window.contains(0xfff, 1));
    assert!(!window.contains(0x1001, 0x1000));
    assert!(!window.contains(0x1fff, u64::MAX));
}
