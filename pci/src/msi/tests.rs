use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

/// The capability as its bytes, with offsets as the figures of the specification have them.
struct NaiveMsi {
    bytes: Vec<u8>,
    capable: u16,
    upper_address: Option<usize>,
    data: usize,
    mask: Option<usize>,
}

impl NaiveMsi {
    fn new(control: u16) -> Self {
        let (upper_address, data) = if control & 0x80 != 0 {
            (Some(8), 12)
        } else {
            (None, 8)
        };
        let mask = (control & 0x100 != 0).then_some(data + 4);
        let log2 = (control >> 1 & 7).min(5);
        let mut bytes = vec![0; data + 4 + if mask.is_some() { 8 } else { 0 }];
        bytes[2..4].copy_from_slice(&(control & 0x180 | log2 << 1).to_le_bytes());
        Self {
            bytes,
            capable: 1 << log2,
            upper_address,
            data,
            mask,
        }
    }

    fn write(&mut self, offset: usize, data: &[u8]) {
        for (at, byte) in (offset..).zip(data) {
            let writable = match at {
                2 => 0x71,
                4 => 0xfc,
                5..8 => 0xff,
                _ if self
                    .upper_address
                    .is_some_and(|upper| (upper..upper + 4).contains(&at)) =>
                {
                    0xff
                }
                _ if (self.data..self.data + 2).contains(&at) => 0xff,
                _ => match self.mask.and_then(|mask| at.checked_sub(mask)) {
                    Some(byte @ 0..4) => (0..8)
                        .filter(|bit| byte * 8 + bit < usize::from(self.capable))
                        .map(|bit| 1 << bit)
                        .sum(),
                    _ => 0,
                },
            };
            if let Some(to) = self.bytes.get_mut(at) {
                *to = *to & !writable | byte & writable;
            }
        }
    }

    fn dword(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.bytes[at..at + 4].try_into().unwrap())
    }

    fn granted(&self) -> u16 {
        let granted = 1u32 << (self.bytes[2] >> 4 & 7);
        granted.min(self.capable.into()).try_into().unwrap()
    }

    fn masked(&self, vector: u16) -> bool {
        self.mask
            .is_some_and(|mask| self.dword(mask) & 1 << vector != 0)
    }

    fn messages(&self) -> Vec<Option<MsiMessage>> {
        let messages = (0..32u16).map(|vector| {
            let enabled = self.bytes[2] & 1 != 0;
            if !enabled || vector >= self.granted() || self.masked(vector) {
                return None;
            }
            let upper = self.upper_address.map_or(0, |at| self.dword(at));
            Some(MsiMessage {
                address: u64::from(upper) << 32 | u64::from(self.dword(4)),
                data: self.dword(self.data) / u32::from(self.granted()) * u32::from(self.granted())
                    + u32::from(vector),
            })
        });
        messages.collect()
    }

    fn read(&self, signalled: u32) -> Vec<u8> {
        let mut bytes = self.bytes.clone();
        bytes[..2].fill(0xaa);
        if let Some(mask) = self.mask
            && bytes[2] & 1 != 0
        {
            let pending = self.dword(mask) & signalled & (u32::MAX >> (32 - self.granted()));
            bytes[mask + 4..].copy_from_slice(&pending.to_le_bytes());
        }
        bytes
    }
}

#[derive(Debug, Clone)]
enum Step {
    Write(u16, Vec<u8>),
    Reset,
}

/// Naturally aligned writes of 1, 2 or 4 bytes, which often enable a number of vectors.
fn step() -> impl Strategy<Value = Step> {
    let byte = prop_oneof![Just(0x00), Just(0xff), any::<u8>()];
    let write = (0u16..8, 0u32..3, vec(byte, 4)).prop_flat_map(|(dword, log2, mut data)| {
        let size = 1u16 << log2;
        data.truncate(size.into());
        (0..4 / size).prop_map(move |at| Step::Write(dword * 4 + at * size, data.clone()))
    });
    prop_oneof![
        8 => write,
        2 => (0u8..8).prop_map(|granted| Step::Write(2, vec![granted << 4 | 1])),
        1 => Just(Step::Reset),
    ]
}

proptest! {
    #[test]
    fn behaves_as_a_naive_model_does(
        control: u16,
        steps in vec(step(), 0..64),
        signalled: u32,
    ) {
        let mut msi = Msi::new(control);
        let mut naive = NaiveMsi::new(control);
        prop_assert_eq!(usize::from(msi.length()), naive.bytes.len());
        prop_assert_eq!(msi.vectors(), naive.capable);
        for step in steps {
            let before = naive.messages();
            let changes = match step {
                Step::Write(offset, data) => {
                    naive.write(offset.into(), &data);
                    msi.write(offset, &data)
                }
                Step::Reset => {
                    naive = NaiveMsi::new(control);
                    msi.reset()
                }
            };
            let after = naive.messages();
            let naive_changes: Vec<_> = (0..32)
                .filter(|&vector| before[usize::from(vector)] != after[usize::from(vector)])
                .map(|vector| (vector, after[usize::from(vector)]))
                .collect();
            prop_assert_eq!(changes, naive_changes);
            prop_assert_eq!((0..32).map(|v| msi.message(v)).collect::<Vec<_>>(), after);
            prop_assert_eq!(msi.enabled(), naive.bytes[2] & 1 != 0);

            let mut bytes = vec![0xaa; naive.bytes.len()];
            for (offset, dword) in (0..).step_by(4).zip(bytes.chunks_mut(4)) {
                msi.read(offset, dword, |vector| signalled >> vector & 1 == 1);
            }
            prop_assert_eq!(bytes, naive.read(signalled));
        }
    }
}

#[test]
fn vectors_share_an_address_and_number_their_data() {
    let mut msi = Msi::new(0x0086); // 64-bit, 8 vectors
    msi.write(4, &0xfee0_1000u32.to_le_bytes());
    msi.write(8, &1u32.to_le_bytes());
    msi.write(12, &0x4127u16.to_le_bytes());
    let changes = msi.write(2, &0x0021u16.to_le_bytes()); // enabled, 4 vectors granted
    let message = |data| {
        Some(MsiMessage {
            address: 0x1_fee0_1000,
            data,
        })
    };
    assert_eq!(
        changes,
        [
            (0, message(0x4124)),
            (1, message(0x4125)),
            (2, message(0x4126)),
            (3, message(0x4127))
        ]
    );
    assert_eq!(msi.message(4), None);
    assert_eq!(msi.message(u16::MAX), None);
}

#[test]
fn only_vectors_that_may_be_pending_are_asked_for() {
    let mut msi = Msi::new(0x0102); // maskable, 2 vectors
    msi.read(16, &mut [0; 4], |_| panic!("disabled"));

    msi.write(2, &[0x11]);
    msi.write(12, &[0x02]);
    let mut pending = [0xff; 4];
    msi.read(16, &mut pending, |vector| {
        assert_eq!(vector, 1);
        true
    });
    assert_eq!(pending, [0x02, 0, 0, 0]);
}
