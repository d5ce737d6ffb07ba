//! The fuzz target on a stable compiler: over its corpus, and over what little changes make of it.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

#[path = "../fuzz/harness.rs"]
mod harness;

use std::fs;
use std::path::Path;

use serde_json::Value;

/// How many variants of each input there are.
const VARIANTS: u32 = 150;

#[test]
fn whatever_is_saved_of_an_endpoint_is_refused_or_restored() {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let mut restored = [0, 0];
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/endpoint");
    for entry in fs::read_dir(corpus).unwrap() {
        let input = fs::read(entry.unwrap().path()).unwrap();
        harness::endpoint(&input);
        let value: Value = serde_json::from_slice(&input).unwrap();
        for _ in 0..VARIANTS {
            let mut variant = value.clone();
            for _ in 0..=random.next(2) {
                random.change(&mut variant);
            }
            let text = serde_json::to_vec(&variant).unwrap();
            restored[usize::from(harness::endpoint(&text))] += 1;
            harness::endpoint(&random.cut(&input));
        }
    }
    // The changes are neither all noticed nor all overlooked.
    assert!(restored.iter().all(|count| *count > 50), "{restored:?}");
}

#[test]
fn the_corpus_reaches_what_can_be_restored() {
    for input in ["fresh.json", "msi.json", "msix.json", "intx.json"] {
        let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/endpoint");
        let input = fs::read(corpus.join(input)).unwrap();
        assert!(harness::endpoint(&input));
    }
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

    /// The same text without its end, or a piece from the middle.
    fn cut(&mut self, input: &[u8]) -> Vec<u8> {
        let at = self.next(input.len());
        let length = self.next(input.len() - at);
        [&input[..at], &input[at + length..]].concat()
    }

    /// Changes a number, or the length of a list, somewhere in a value.
    fn change(&mut self, value: &mut Value) {
        let mut left = self.next(places(value));
        self.visit(value, &mut left);
    }

    fn visit(&mut self, value: &mut Value, left: &mut usize) -> bool {
        let is_place = matches!(value, Value::Number(_) | Value::Array(_));
        if is_place && *left == 0 {
            match value {
                Value::Array(list) if self.next(2) == 0 => drop(list.pop()),
                Value::Array(list) => list.extend(list.last().cloned()),
                number => {
                    const EDGES: [u64; 6] = [0, 1, 0x7f, 0xffff, 0xffff_ffff, u64::MAX];
                    let bit = 1 << self.next(34);
                    *number = match self.next(3) {
                        0 => EDGES[self.next(EDGES.len())].into(),
                        _ => (number.as_u64().unwrap() ^ bit).into(),
                    };
                }
            }
            return true;
        }
        *left -= usize::from(is_place);
        match value {
            Value::Array(list) => list.iter_mut().any(|value| self.visit(value, left)),
            Value::Object(map) => map.values_mut().any(|value| self.visit(value, left)),
            _ => false,
        }
    }
}

/// How many numbers and lists there are in a value.
fn places(value: &Value) -> usize {
    match value {
        Value::Number(_) => 1,
        Value::Array(list) => 1 + list.iter().map(places).sum::<usize>(),
        Value::Object(map) => map.values().map(places).sum(),
        _ => 0,
    }
}
