use std::collections::BTreeMap;

use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;

use super::*;

const MEMORY32: BarKind = BarKind::Memory32 {
    prefetchable: false,
};
const MEMORY64: BarKind = BarKind::Memory64 {
    prefetchable: false,
};

fn bar(number: u8) -> BarIndex {
    BarIndex::new(number).unwrap()
}

fn only(number: usize, kind: BarKind, size: u64) -> [Option<BarSpec>; 6] {
    let mut specs = [None; 6];
    specs[number] = Some(BarSpec { kind, size });
    specs
}

fn read(bars: &Bars, offset: u16) -> u32 {
    let mut data = [0; 4];
    bars.read(offset, &mut data);
    u32::from_le_bytes(data)
}

/// Any BARs that a function can have.
fn any_specs() -> impl Strategy<Value = [Option<BarSpec>; 6]> {
    let spec = prop_oneof![
        (2u32..=8).prop_map(|log2| BarSpec {
            kind: BarKind::Io,
            size: 1 << log2
        }),
        (4u32..=31, any::<bool>()).prop_map(|(log2, prefetchable)| BarSpec {
            kind: BarKind::Memory32 { prefetchable },
            size: 1 << log2
        }),
        (4u32..=63, any::<bool>()).prop_map(|(log2, prefetchable)| BarSpec {
            kind: BarKind::Memory64 { prefetchable },
            size: 1 << log2
        }),
    ];
    vec(option::of(spec), 6).prop_map(|list| {
        let mut specs = [None; 6];
        let mut next = 0;
        for spec in list {
            let registers = if spec.is_some_and(|spec| spec.is_64bit()) {
                2
            } else {
                1
            };
            if next + registers > 6 {
                break;
            }
            specs[next] = spec;
            next += registers;
        }
        specs
    })
}

/// The registers as bytes: a write stores all of its bits, and then what cannot be written is restored.
struct NaiveBars {
    specs: [Option<BarSpec>; 6],
    bytes: [u8; 24],
}

impl NaiveBars {
    fn new(specs: [Option<BarSpec>; 6]) -> Self {
        let mut naive = Self {
            specs,
            bytes: [0; 24],
        };
        naive.restore();
        naive
    }

    fn write(&mut self, offset: usize, data: &[u8]) {
        for (index, byte) in data.iter().enumerate() {
            if let Some(to) = (offset + index)
                .checked_sub(0x10)
                .and_then(|i| self.bytes.get_mut(i))
            {
                *to = *byte;
            }
        }
        self.restore();
    }

    fn restore(&mut self) {
        let stored = self.bytes;
        self.bytes = [0; 24];
        for (index, spec) in self.specs.iter().enumerate() {
            let Some(spec) = spec else { continue };
            let at = index * 4;
            let (width, type_bits) = match spec.kind {
                BarKind::Io => (4, 1),
                BarKind::Memory32 { prefetchable } => (4, u64::from(prefetchable) * 8),
                BarKind::Memory64 { prefetchable } => (8, 4 + u64::from(prefetchable) * 8),
            };
            let mut raw = [0; 8];
            raw[..width].copy_from_slice(&stored[at..at + width]);
            let address = u64::from_le_bytes(raw) / spec.size * spec.size;
            let register = (address + type_bits).to_le_bytes();
            self.bytes[at..at + width].copy_from_slice(&register[..width]);
        }
    }

    fn decoded(&self, command: Command) -> BTreeMap<usize, u64> {
        let mut decoded = BTreeMap::new();
        for (index, spec) in self.specs.iter().enumerate() {
            let Some(spec) = spec else { continue };
            let mut raw = [0; 8];
            let (width, enable, space) = match spec.kind {
                BarKind::Io => (4, Command::IO_SPACE, 1u128 << 16),
                BarKind::Memory32 { .. } => (4, Command::MEMORY_SPACE, 1 << 32),
                BarKind::Memory64 { .. } => (8, Command::MEMORY_SPACE, 1 << 64),
            };
            raw[..width].copy_from_slice(&self.bytes[index * 4..][..width]);
            let address = u64::from_le_bytes(raw) / spec.size * spec.size;
            let end = u128::from(address) + u128::from(spec.size);
            if command.contains(enable) && address != 0 && end <= space {
                decoded.insert(index, address);
            }
        }
        decoded
    }
}

/// An offset and data that start within the BARs, of any alignment, and values that are likely to matter.
fn any_write() -> impl Strategy<Value = (u16, Vec<u8>)> {
    let byte = prop_oneof![Just(0x00), Just(0xff), any::<u8>()];
    (0x10u16..0x28, vec(byte, 1..=4))
}

proptest! {
    #[test]
    fn behave_as_a_naive_model_does(
        specs in any_specs(),
        writes in vec((any_write(), 0u16..8), 0..32),
    ) {
        let mut bars = Bars::new(specs).unwrap();
        let mut naive = NaiveBars::new(specs);
        for ((offset, data), command) in writes {
            bars.write(offset, &data);
            naive.write(offset.into(), &data);

            let mut bytes = [0; 24];
            bars.read(0x10, &mut bytes);
            prop_assert_eq!(bytes, naive.bytes);

            let command = Command::from_bits_retain(command);
            let decoded = bars.decoded(command);
            let naive = naive.decoded(command);
            for bar in BarIndex::ALL {
                prop_assert_eq!(decoded.address(bar), naive.get(&bar.index()).copied());
            }
        }
    }

    #[test]
    fn sizing_tells_what_they_are(specs in any_specs()) {
        let mut bars = Bars::new(specs).unwrap();
        for offset in (0x10..0x28).step_by(4) {
            bars.write(offset, &[0xff; 4]);
        }
        let registers = [0x10, 0x14, 0x18, 0x1c, 0x20, 0x24].map(|offset| read(&bars, offset));
        // The mask of a 64-bit BAR is in two registers, and each is meaningless on its own.
        let sizes = specs.map(|spec| spec.map_or(0, |spec| spec.size));
        for (index, spec) in specs.iter().enumerate() {
            let Some(spec) = spec else { continue };
            let mask = match spec.kind {
                BarKind::Io => !3 & registers[index],
                _ => !15 & registers[index],
            };
            let high = if spec.is_64bit() { registers[index + 1] } else { u32::MAX };
            let mask = u64::from(high) << 32 | u64::from(mask);
            prop_assert_eq!(mask.wrapping_neg(), spec.size);
        }
        prop_assert_eq!(BarSpec::from_registers(registers, sizes), Ok(specs));
    }

    #[test]
    fn an_assigned_address_reads_back(specs in any_specs(), address: u64) {
        let mut bars = Bars::new(specs).unwrap();
        for (index, spec) in specs.iter().enumerate() {
            let Some(spec) = spec else { continue };
            let index = bar(index.try_into().unwrap());
            let space = if spec.is_64bit() { u64::MAX } else { u32::MAX.into() };
            bars.set_address(index, address);
            prop_assert_eq!(bars.address(index), Some(address & (space / spec.size * spec.size)));
        }
    }

    #[test]
    fn changes_lead_from_one_to_the_other(
        old in vec(option::of(1u64..4), 7),
        new in vec(option::of(1u64..4), 7),
    ) {
        let (old, new) = (Decoded(old.try_into().unwrap()), Decoded(new.try_into().unwrap()));
        let (unmap, map) = old.changes(&new);
        let mut mapped = old.0;
        for bar in unmap {
            prop_assert!(mapped[bar.index()].take().is_some());
            prop_assert_ne!(old.address(bar), new.address(bar));
        }
        for (bar, address) in map {
            prop_assert_eq!(mapped[bar.index()].replace(address), None);
        }
        prop_assert_eq!(Decoded(mapped), new);
    }
}

#[test]
fn a_bar_being_sized_decodes_at_the_top_of_its_space() {
    let mut bars = Bars::new(only(0, MEMORY32, 0x1000)).unwrap();
    bars.write(0x10, &[0xff; 4]);
    assert_eq!(read(&bars, 0x10), 0xffff_f000);
    assert_eq!(
        bars.decoded(Command::MEMORY_SPACE).address(bar(0)),
        Some(0xffff_f000)
    );
}

#[test]
fn ports_beyond_64_ki_are_not_decoded() {
    let mut bars = Bars::new(only(2, BarKind::Io, 32)).unwrap();
    bars.set_address(bar(2), 0xffe0);
    assert_eq!(
        bars.decoded(Command::IO_SPACE).address(bar(2)),
        Some(0xffe0)
    );
    bars.set_address(bar(2), 0x1_0000);
    assert_eq!(bars.decoded(Command::IO_SPACE), Decoded::default());
}

#[test]
fn reads_and_writes_around_the_registers_touch_nothing() {
    let mut bars = Bars::new(only(5, MEMORY32, 16)).unwrap();
    bars.write(0x28, &[0xff; 4]);
    bars.write(0x0c, &[0xff; 4]);
    assert_eq!(bars, Bars::new(only(5, MEMORY32, 16)).unwrap());

    let mut data = [0xaa; 4];
    bars.read(0x28, &mut data);
    bars.read(0x0c, &mut data);
    assert_eq!(data, [0xaa; 4]);
}

#[test]
fn impossible_bars_are_refused() {
    for (kind, size) in [
        (BarKind::Io, 2),
        (BarKind::Io, 512),
        (MEMORY32, 8),
        (MEMORY32, 0x1800),
        (MEMORY32, 1 << 32),
        (MEMORY64, 0),
    ] {
        let refused = Bars::new(only(1, kind, size)).unwrap_err();
        assert!(matches!(refused, BarError::Size { .. }), "{refused}");
    }
    assert_eq!(
        Bars::new(only(5, MEMORY64, 0x1000)),
        Err(BarError::NoUpperHalf)
    );

    let mut specs = only(0, MEMORY64, 0x1000);
    specs[1] = Some(BarSpec {
        kind: BarKind::Io,
        size: 16,
    });
    let refused = BarError::UpperHalf {
        bar: bar(1),
        lower: bar(0),
    };
    assert_eq!(Bars::new(specs), Err(refused));
}

#[test]
fn a_device_tells_its_bars() {
    // As libvfio-user has them: 1 where there is no BAR, and in an upper half that was never written.
    let registers = [
        0x0000_0004,
        0x0000_0001,
        0x0000_0001,
        0x0000_0001,
        0x0000_0008,
        0x0000_0001,
    ];
    let sizes = [0x1800, 0x40, 0, 0x20, 1, 0];
    assert_eq!(
        BarSpec::from_registers(registers, sizes),
        Ok([
            Some(BarSpec {
                kind: MEMORY64,
                size: 0x2000
            }),
            None,
            None,
            Some(BarSpec {
                kind: BarKind::Io,
                size: 0x20
            }),
            Some(BarSpec {
                kind: BarKind::Memory32 { prefetchable: true },
                size: 16
            }),
            None,
        ])
    );
}

#[test]
fn a_device_with_impossible_bars_is_refused() {
    let reserved = BarError::ReservedType {
        bar: bar(0),
        register: 0xfe00_0002,
    };
    let below_1m = [0xfe00_0002, 0, 0, 0, 0, 0];
    assert_eq!(
        BarSpec::from_registers(below_1m, [0x1000, 0, 0, 0, 0, 0]),
        Err(reserved)
    );

    let last = BarSpec::from_registers([4; 6], [0, 0, 0, 0, 0, 0x1000]).unwrap();
    assert_eq!(Bars::new(last), Err(BarError::NoUpperHalf));

    let huge = BarSpec::from_registers([4; 6], [u64::MAX, 0, 0, 0, 0, 0]).unwrap();
    assert!(matches!(Bars::new(huge), Err(BarError::Size { .. })));
}

#[test]
fn a_rom_answers_only_while_it_is_enabled_by_both_bits() {
    let bars = || Bars::new([None; 6]).unwrap();
    let mut bars = bars().with_rom(0x9001).unwrap();
    assert_eq!(bars.spec(BarIndex::ROM).unwrap().size, 0x1_0000);
    bars.write(0x30, &[0xff; 4]);
    assert_eq!(read(&bars, 0x30), 0xffff_0001);
    bars.write(0x30, &[0; 4]);
    bars.set_address(BarIndex::ROM, 0xc012_3000);
    assert_eq!(read(&bars, 0x30), 0xc012_0000);
    assert_eq!(bars.address(BarIndex::ROM), Some(0xc012_0000));
    let answers = |bars: &Bars, command| bars.decoded(command).address(BarIndex::ROM);
    assert_eq!(answers(&bars, Command::MEMORY_SPACE), None);
    bars.write(0x30, &[1]);
    assert_eq!(answers(&bars, Command::IO_SPACE), None);
    assert_eq!(answers(&bars, Command::MEMORY_SPACE), Some(0xc012_0000));
    bars.set_address(BarIndex::ROM, 0xc100_0000);
    assert_eq!(answers(&bars, Command::MEMORY_SPACE), Some(0xc100_0000));
    // The registers around it are not its.
    bars.write(0x2c, &[0xff; 4]);
    bars.write(0x34, &[0xff; 4]);
    assert_eq!(read(&bars, 0x30), 0xc100_0001);
}

#[test]
fn roms_have_sizes_that_they_can_have() {
    let rom = |size| {
        let bars = Bars::new([None; 6]).unwrap().with_rom(size)?;
        Ok::<_, BarError>(bars.spec(BarIndex::ROM).map(|spec| spec.size))
    };
    assert_eq!(rom(1), Ok(Some(2048)));
    assert_eq!(rom(16 << 20), Ok(Some(16 << 20)));
    assert!(rom((16 << 20) + 1).is_err());
    let mut none = Bars::new([None; 6]).unwrap();
    none.write(0x30, &[0xff; 4]);
    assert_eq!(read(&none, 0x30), 0);
}
