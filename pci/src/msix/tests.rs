use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

const VECTORS: u16 = 70;

/// The table as its bytes, and what each vector sends worked out anew every time.
struct NaiveMsix {
    table: Vec<u8>,
    control: u16,
}

impl NaiveMsix {
    fn new() -> Self {
        let mut table = vec![0; usize::from(VECTORS) * 16];
        for entry in table.chunks_mut(16) {
            entry[12] = 1;
        }
        Self { table, control: 0 }
    }

    fn write(&mut self, offset: usize, data: &[u8]) {
        for ((at, to), byte) in self.table.iter_mut().enumerate().skip(offset).zip(data) {
            *to = match at % 16 {
                0 => byte & 0xfc,
                12 => byte & 0x01,
                13..16 => 0,
                _ => *byte,
            };
        }
    }

    fn messages(&self) -> Vec<Option<MsiMessage>> {
        let entries = self.table.chunks(16).map(|entry| {
            let message = MsiMessage {
                address: u64::from_le_bytes(entry[..8].try_into().unwrap()),
                data: u32::from_le_bytes(entry[8..12].try_into().unwrap()),
            };
            (self.control >> 14 == 0b10 && entry[12] == 0).then_some(message)
        });
        entries.collect()
    }

    fn pending(&self, signalled: u128) -> Vec<u8> {
        let mut pba = vec![0; usize::from(VECTORS).div_ceil(64) * 8];
        for (vector, message) in self.messages().iter().enumerate() {
            if self.control & 0x8000 != 0 && message.is_none() && signalled >> vector & 1 == 1 {
                pba[vector / 8] |= 1 << (vector % 8);
            }
        }
        pba
    }
}

#[derive(Debug, Clone)]
enum Step {
    Write(u64, Vec<u8>),
    Control(u16),
    Reset,
}

fn step() -> impl Strategy<Value = Step> {
    let byte = prop_oneof![Just(0x00), Just(0x01), any::<u8>()];
    // Few entries, so that some are complete; the last of the table too; and past its end.
    let offset = prop_oneof![0u64..64, 1100u64..1130, Just(u64::MAX)];
    prop_oneof![
        12 => (offset, vec(byte, 1..=8)).prop_map(|(offset, data)| Step::Write(offset, data)),
        2 => (0u64..4).prop_map(|vector| Step::Write(vector * 16 + 12, vec![0])),
        4 => any::<u16>().prop_map(Step::Control),
        1 => Just(Step::Control(ENABLE)),
        1 => Just(Step::Reset),
    ]
}

proptest! {
    #[test]
    fn behaves_as_a_naive_model_does(steps in vec(step(), 0..64), signalled: u128) {
        let mut msix = Msix::new(VECTORS);
        let mut naive = NaiveMsix::new();
        for step in steps {
            let before = naive.messages();
            let changes = match step {
                Step::Write(offset, data) => {
                    naive.write(usize::try_from(offset).unwrap(), &data);
                    msix.write_table(offset, &data)
                }
                Step::Control(control) => {
                    naive.control = control & 0xc000;
                    msix.set_control(control)
                }
                Step::Reset => {
                    naive = NaiveMsix::new();
                    msix.reset()
                }
            };
            let after = naive.messages();
            let naive_changes: Vec<_> = (0..VECTORS)
                .filter(|&vector| before[usize::from(vector)] != after[usize::from(vector)])
                .map(|vector| (vector, after[usize::from(vector)]))
                .collect();
            prop_assert_eq!(changes, naive_changes);
            prop_assert_eq!((0..VECTORS).map(|v| msix.message(v)).collect::<Vec<_>>(), after);
            prop_assert_eq!(msix.control(), naive.control | (VECTORS - 1));
            prop_assert_eq!(msix.enabled(), naive.control & 0x8000 != 0);

            let mut table = vec![0; naive.table.len()];
            msix.read_table(0, &mut table);
            prop_assert_eq!(&table, &naive.table);

            let mut pba = [0xff; 16];
            msix.read_pba(0, &mut pba, |vector| signalled >> vector & 1 == 1);
            prop_assert_eq!(&pba[..], naive.pending(signalled));
        }
    }

    #[test]
    fn partial_reads_are_parts_of_the_whole(offset in 0u64..32, length in 1usize..=8) {
        let mut msix = Msix::new(2);
        msix.write_table(0, &[0x55; 32]);
        let mut table = [0; 32];
        msix.read_table(0, &mut table);

        let mut data = [0xaa; 8];
        msix.read_table(offset, &mut data[..length]);
        for (at, byte) in (offset..).zip(&data[..length]) {
            let whole = table.get(usize::try_from(at).unwrap()).unwrap_or(&0xaa);
            prop_assert_eq!(byte, whole);
        }
    }
}

#[test]
fn only_vectors_that_may_be_pending_are_asked_for() {
    let mut msix = Msix::new(9);
    let mut pba = [0xff; 8];
    msix.read_pba(0, &mut pba, |_| panic!("disabled"));
    assert_eq!(pba, [0; 8]);

    msix.set_control(ENABLE);
    msix.write_table(12, &[0; 4]);
    msix.read_pba(0, &mut pba, |vector| {
        assert_ne!(vector, 0);
        true
    });
    assert_eq!(pba, [0xfe, 0x01, 0, 0, 0, 0, 0, 0]);

    let mut beyond = [0xff; 8];
    msix.read_pba(u64::MAX, &mut beyond, |_| true);
    assert_eq!(beyond, [0; 8]);
}

/// A capability at 0x40 with these registers.
fn capability(control: u16, table: u32, pba: u32) -> ConfigSpace {
    let mut config = ConfigSpace::new();
    config.set(0x42, &control.to_le_bytes());
    config.set(0x44, &table.to_le_bytes());
    config.set(0x48, &pba.to_le_bytes());
    config
}

#[test]
fn the_capability_tells_the_layout() {
    let layout = MsixLayout::parse(&capability(0xc7ff, 0x2001, 0x1_0004), 0x40).unwrap();
    assert_eq!(layout.vectors, 2048);
    assert_eq!(
        (layout.table_bar, layout.table_offset),
        (BarIndex::ALL[1], 0x2000)
    );
    assert_eq!(
        (layout.pba_bar, layout.pba_offset),
        (BarIndex::ALL[4], 0x1_0000)
    );
    assert_eq!(layout.table_range(), 0x2000..0xa000);
    assert_eq!(layout.pba_range(), 0x1_0000..0x1_0100);
}

#[test]
fn reserved_bars_are_refused() {
    for (table, pba) in [(6, 0), (0, 7)] {
        let refused = MsixLayout::parse(&capability(0, table, pba), 0x40).unwrap_err();
        assert!(matches!(refused, MsixError::ReservedBir { bir: 6 | 7 }));
    }
}

#[test]
fn overlapping_structures_are_refused() {
    // Four vectors: the table takes 64 bytes, the pending bits 8.
    let parse = |table, pba| MsixLayout::parse(&capability(3, table, pba), 0x40);
    let overlap = Err(MsixError::Overlap {
        bar: BarIndex::ALL[0],
    });
    assert_eq!(parse(0x1000, 0x1038), overlap);
    assert_eq!(parse(0x1000, 0x1000), overlap);
    assert!(parse(0x1000, 0x1040).is_ok());
    assert!(parse(0x1000, 0x0ff8).is_ok());
    assert!(parse(0x1000, 0x1001).is_ok());
}

#[test]
fn structures_must_end_within_their_bars() {
    let layout = MsixLayout::parse(&capability(3, 0x1000, 0xfff9), 0x40).unwrap();
    let sizes = |table, pba| move |bar: BarIndex| if bar.number() == 0 { table } else { pba };
    assert_eq!(layout.check(sizes(0x1040, 0x1_0000)), Ok(()));
    let out_of_bar = |bar, end, size| Err(MsixError::OutOfBar { bar, end, size });
    assert_eq!(
        layout.check(sizes(0x1000, 0x1_0000)),
        out_of_bar(BarIndex::ALL[0], 0x1040, 0x1000)
    );
    assert_eq!(
        layout.check(sizes(0x2000, 0)),
        out_of_bar(BarIndex::ALL[1], 0x1_0000, 0)
    );
}
