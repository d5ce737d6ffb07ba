//! The fuzz target on a stable compiler: over its corpus, and over what little changes make of it.

#![expect(clippy::unwrap_used, reason = "a test panics when it fails")]

#[path = "../fuzz/harness.rs"]
mod harness;
#[path = "support/variants.rs"]
mod variants;

use std::fs;
use std::path::Path;

use variants::Random;

#[test]
fn the_server_outlives_whatever_is_said() {
    let mut random = Random::new();
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
