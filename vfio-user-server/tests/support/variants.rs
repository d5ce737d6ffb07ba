//! Variants of the inputs of fuzz targets.

/// A sequence that looks random and is always the same (xorshift).
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new() -> Self {
        Self(0x9e37_79b9_7f4a_7c15)
    }

    fn next(&mut self, end: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % end.max(1) as u64).unwrap()
    }

    /// Some bytes changed to values that are often at the edge of something, or an end or a middle cut out.
    pub(crate) fn variant(&mut self, input: &[u8]) -> Vec<u8> {
        const EDGES: [u8; 6] = [0, 1, 0x10, 0x7f, 0x80, 0xff];
        let mut bytes = input.to_vec();
        for _ in 0..=self.next(4) {
            let at = self.next(bytes.len());
            match self.next(8) {
                0 => bytes.truncate(at),
                1 => drop(bytes.drain(at..at + self.next(bytes.len() - at))),
                _ if bytes.is_empty() => {}
                2 => bytes[at] ^= 1 << self.next(8),
                _ => bytes[at] = EDGES[self.next(EDGES.len())],
            }
        }
        bytes
    }
}
