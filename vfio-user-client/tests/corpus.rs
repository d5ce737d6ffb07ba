//! The fuzz targets on a stable compiler: over their corpus, and over what little changes make of it.

#![expect(clippy::unwrap_used, reason = "a test panics when it fails")]

#[path = "../fuzz/harness.rs"]
mod harness;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

#[test]
fn parsers_take_anything() {
    run("parsers", 1000, harness::parsers);
}

#[test]
fn conversations_end_whatever_is_said() {
    run("conversation", 25, |bytes| {
        harness::conversation(bytes, Duration::from_millis(1));
    });
}

#[test]
fn the_corpus_reaches_every_call() {
    for input in ["device", "dma_between", "strays"] {
        let input = fs::read(corpus("conversation").join(input)).unwrap();
        assert_eq!(harness::conversation(&input, Duration::from_secs(60)), 9);
    }
}

/// Runs `target` with each input of its corpus, and with `variants` of each.
fn run(name: &str, variants: u32, target: fn(&[u8])) {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let mut inputs = 0;
    for entry in fs::read_dir(corpus(name)).unwrap() {
        let input = fs::read(entry.unwrap().path()).unwrap();
        inputs += 1;
        target(&input);
        for _ in 0..variants {
            target(&random.variant(&input));
        }
    }
    assert!(inputs > 0);
}

fn corpus(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fuzz/corpus")
        .join(name)
}

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
