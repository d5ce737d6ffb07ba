use proptest::prelude::*;

use super::*;
use crate::recorder::Access::{Read, Write};
use crate::recorder::Recorder;

fn bdf(device: u8, function: u8) -> Bdf {
    Bdf::new(0, device, function).unwrap()
}

fn segment_with(functions: &[Bdf]) -> Segment {
    let segment = Segment::new();
    for bdf in functions {
        segment.insert(*bdf, Arc::new(Recorder::default())).unwrap();
    }
    segment
}

#[test]
fn functions_come_and_go() {
    let segment = Segment::new();
    let recorder = Arc::new(Recorder::default());
    segment.insert(bdf(1, 0), recorder.clone()).unwrap();
    assert!(segment.endpoint(bdf(1, 0)).is_some());
    assert!(segment.endpoint(bdf(1, 1)).is_none());

    let taken = Err(BusError::Taken { bdf: bdf(1, 0) });
    assert_eq!(segment.insert(bdf(1, 0), recorder.clone()), taken);

    assert!(segment.remove(bdf(1, 0)).is_some());
    assert!(segment.remove(bdf(1, 0)).is_none());
    assert!(segment.endpoint(bdf(1, 0)).is_none());
    assert_eq!(segment.insert(bdf(1, 0), recorder), Ok(()));
}

#[test]
fn other_buses_do_not_exist() {
    let segment = Segment::new();
    let elsewhere = Bdf::new(1, 0, 0).unwrap();
    let no_bus = Err(BusError::NoBus { bdf: elsewhere });
    assert_eq!(
        segment.insert(elsewhere, Arc::new(Recorder::default())),
        no_bus
    );
    assert!(segment.endpoint(elsewhere).is_none());
    assert!(segment.remove(elsewhere).is_none());
    assert_eq!(segment.free_device(1), None);
}

#[test]
fn endpoints_are_in_order() {
    let segment = segment_with(&[bdf(31, 7), bdf(0, 0), bdf(2, 1)]);
    let addresses: Vec<_> = segment
        .endpoints()
        .into_iter()
        .map(|(bdf, _)| bdf)
        .collect();
    assert_eq!(addresses, [bdf(0, 0), bdf(2, 1), bdf(31, 7)]);
}

#[test]
fn a_device_with_any_function_is_not_free() {
    let segment = segment_with(&[bdf(0, 0), bdf(1, 7), bdf(3, 0)]);
    assert_eq!(segment.free_device(0), Some(2));
    let all: Vec<_> = (0..32).map(|device| bdf(device, 0)).collect();
    assert_eq!(segment_with(&all).free_device(0), None);
}

#[test]
fn an_absent_function_reads_as_ones() {
    let mut data = [0; 4];
    Segment::new().config_read(bdf(1, 0), 0, &mut data);
    Segment::new().config_write(bdf(1, 0), 0, &data);
    assert_eq!(data, [0xff; 4]);
}

#[test]
fn accesses_are_split_at_their_natural_alignment() {
    let segment = Segment::new();
    let recorder = Arc::new(Recorder::default());
    segment.insert(bdf(1, 0), recorder.clone()).unwrap();

    let mut data = [0; 8];
    segment.config_read(bdf(1, 0), 0x40, &mut data);
    assert_eq!(recorder.take(), [Read(0x40, 4), Read(0x44, 4)]);
    assert_eq!(data, [0x40, 0x41, 0x42, 0x43, 0x44, 0x45, 0x46, 0x47]);

    segment.config_write(bdf(1, 0), 0x13, &[1, 2, 3, 4]);
    let split = [
        Write(0x13, vec![1]),
        Write(0x14, vec![2, 3]),
        Write(0x16, vec![4]),
    ];
    assert_eq!(recorder.take(), split);

    segment.config_read(bdf(1, 0), 0xffe, &mut data[..4]);
    assert_eq!(recorder.take(), [Read(0xffe, 2)]);
    assert_eq!(data[..4], [0xfe, 0xff, 0xff, 0xff]);
}

proptest! {
    #[test]
    fn the_parts_of_an_access_are_the_whole(
        offset in prop_oneof![0u16..16, 4080u16..4112, Just(u16::MAX)],
        length in prop_oneof![0usize..=16, Just(usize::MAX)],
    ) {
        let mut next = 0;
        for (at, range) in naturally_aligned(offset, length).take(4096) {
            prop_assert_eq!(range.start, next);
            prop_assert_eq!(usize::from(at), usize::from(offset) + range.start);
            prop_assert!(matches!(range.len(), 1 | 2 | 4));
            prop_assert_eq!(usize::from(at) % range.len(), 0);
            next = range.end;
        }
        prop_assert_eq!(next, length.min(4096usize.saturating_sub(offset.into())));
    }
}
