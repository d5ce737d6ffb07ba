//! Filler: state that is of no use but for its size. It is made and checked as it comes, and kept nowhere.

/// Puts the filler from `offset` on into `data`.
pub(super) fn fill(offset: u64, data: &mut [u8]) {
    for (to, from) in data.iter_mut().zip(bytes(offset)) {
        *to = from;
    }
}

/// Whether `data` is the filler from `offset` on.
pub(super) fn is_filler(offset: u64, data: &[u8]) -> bool {
    data.iter().copied().eq(bytes(offset).take(data.len()))
}

fn bytes(offset: u64) -> impl Iterator<Item = u8> {
    let words =
        (offset / 8..).flat_map(|word| word.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes());
    words.skip(usize::from(offset.to_le_bytes()[0] & 7))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filler_is_the_same_however_it_is_split() {
        let mut whole = [0; 100];
        fill(1000, &mut whole);
        for split in 0..100 {
            assert!(is_filler(1000, &whole[..split]));
            assert!(is_filler(1000 + split as u64, &whole[split..]));
        }
        assert!(!is_filler(1001, &whole));
    }
}
