//! The fuzz target on a stable compiler: over its corpus, and over what little changes make of it.

#![expect(clippy::unwrap_used, reason = "a test panics when it fails")]

#[path = "../fuzz/harness.rs"]
mod harness;

use std::fs;
use std::path::Path;

#[test]
fn the_server_outlives_whatever_is_said() {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/conversation");
    let mut inputs = 0;
    for entry in fs::read_dir(corpus).unwrap() {
        let path = entry.unwrap().path();
        let input = fs::read(&path).unwrap();
        inputs += 1;
        assert!(harness::conversation(&input), "{}", path.display());
        for _ in 0..VARIANTS {
            let variant = random.variant(&input);
            let served = harness::conversation(&variant);
            assert!(served, "{}", variant.escape_ascii());
        }
    }
    assert!(inputs > 0);
}

/// Variants of each input.
const VARIANTS: usize = 200;

/// A sequence that looks random and is always the same (xorshift).
struct Random(u64);

impl Random {
    fn next(&mut self, end: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % end.max(1) as u64).unwrap()
    }

    /// Some bytes changed to values that are often at the edge of something, or an end or a middle cut out.
    fn variant(&mut self, input: &[u8]) -> Vec<u8> {
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
