//! The fuzz targets on a stable compiler: over their corpus, and over what little changes make of it.

#![expect(clippy::unwrap_used, reason = "a test panics when it fails")]

#[path = "../fuzz/harness.rs"]
mod harness;
#[path = "../../vfio-user-server/tests/support/variants.rs"]
mod variants;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use variants::Random;

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
    let mut random = Random::new();
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
