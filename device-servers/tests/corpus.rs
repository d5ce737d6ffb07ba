//! The fuzz target on a stable compiler: over its corpus, and over what little changes make of it.

#![expect(clippy::unwrap_used, reason = "a test panics when it fails")]

#[path = "support/drive.rs"]
mod drive;
#[path = "../fuzz/harness.rs"]
mod harness;
mod support;
#[path = "../../vfio-user-server/tests/support/variants.rs"]
mod variants;

use std::fs;
use std::path::Path;
use std::time::Duration;

use support::LONG;
use variants::Random;

#[test]
fn the_disk_outlives_whatever_a_guest_does() {
    let mut random = Random::new();
    let mut guest = harness::Guest::new(Duration::from_millis(1));
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/disk");
    let mut inputs = 0;
    for entry in fs::read_dir(corpus).unwrap() {
        let input = fs::read(entry.unwrap().path()).unwrap();
        inputs += 1;
        guest.act(&input);
        for _ in 0..variants() {
            let variant = random.variant(&input);
            println!("{}", variant.escape_ascii());
            guest.act(&variant);
        }
    }
    assert!(inputs > 0);
}

#[test]
fn the_corpus_reaches_the_image() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/disk");
    for (input, sector) in [("write", 64), ("zeroes", 128)] {
        let mut guest = harness::Guest::new(LONG);
        let before = guest.image.read(sector, 512);
        guest.act(&fs::read(folder.join(input)).unwrap());
        assert_ne!(guest.image.read(sector, 512), before, "{input}");
    }
}

/// Variants of each input: more, if somebody has the time.
fn variants() -> usize {
    const USUAL: usize = 100;
    let number = std::env::var("FUZZ_VARIANTS").ok();
    number.map_or(USUAL, |number| number.parse().unwrap())
}
