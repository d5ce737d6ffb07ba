//! What the fuzz targets in `fuzz/` do with their input. The tests here do the same with the corpus, on a stable compiler.

use std::fmt::Debug;
use std::sync::LazyLock;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::chips::ChipsState;
use crate::clock::ClockState;
use crate::cpu_profile::CpuProfile;
use crate::memory::Memory;
use crate::migration;
use crate::vcpu::{HostTscs, VcpuState};

/// Takes `bytes` for everything that is saved of a VM's CPUs and chips. Returns whether it could be any of it.
///
/// # Panics
/// When something is wrong.
pub fn saved_state(bytes: &[u8]) -> bool {
    let vcpu = comes_back::<VcpuState>(bytes).map(|mut vcpu| {
        let host = HostTscs { then: 1, now: 0 };
        if let Some(tsc) = vcpu.tsc_mut() {
            tsc.advance(u64::MAX, host);
        }
    });
    let profile = comes_back::<CpuProfile>(bytes).map(|profile| {
        assert!(profile.lacks_of(&profile).is_empty());
        profile.cpuid().address_bits();
        for mismatch in profile.lacks_of(&CpuProfile::default()) {
            assert!(!mismatch.to_string().is_empty());
        }
        profile.cpuid().of_vcpu(u32::MAX).is_ok()
    });
    vcpu.is_some()
        || profile.is_some()
        || comes_back::<ChipsState>(bytes).is_some()
        || comes_back::<ClockState>(bytes).is_some()
}

/// Takes `bytes` for what a peer says on a connection of a migration. Returns whether it is that.
///
/// # Panics
/// When something is wrong.
pub fn migration_stream(bytes: &[u8]) -> bool {
    /// RAM that pages go to, in bytes.
    const RAM: u64 = 8 << 20;
    static MEMORY: LazyLock<Memory> = LazyLock::new(|| Memory::without_kvm(RAM));
    migration::overhear(bytes, &MEMORY)
}

/// Parses something, which must be the same if it is written and parsed again.
#[expect(clippy::expect_used, reason = "a fuzz target panics when it fails")]
fn comes_back<T: Serialize + DeserializeOwned + PartialEq + Debug>(bytes: &[u8]) -> Option<T> {
    let value = serde_json::from_slice(bytes).ok()?;
    let text = serde_json::to_vec(&value).expect("it can be written");
    assert_eq!(
        serde_json::from_slice::<T>(&text).ok().as_ref(),
        Some(&value)
    );
    Some(value)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use proptest::prelude::*;
    use proptest::sample::Index;

    use super::*;

    fn corpus(target: &str) -> Vec<Vec<u8>> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
        let folder = folder.join(target);
        let files = fs::read_dir(folder).unwrap();
        files
            .map(|file| fs::read(file.unwrap().path()).unwrap())
            .collect()
    }

    #[test]
    fn the_corpus_is_understood() {
        for (target, understands) in [
            ("saved_state", saved_state as fn(&[u8]) -> bool),
            ("migration_stream", migration_stream),
        ] {
            let corpus = corpus(target);
            assert!(corpus.len() >= 4);
            for input in corpus {
                assert!(understands(&input), "{}", input.escape_ascii());
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        /// Some bytes changed to those that mean something in JSON, or an end cut off.
        #[test]
        fn variants_of_the_corpus_are_understood_or_refused(
            input in any::<Index>(),
            changes in prop::collection::vec((any::<Index>(), "[0-9a-f\"{}\\[\\],:.eE+-]"), 0..4),
            end in prop::option::weighted(0.1, any::<Index>()),
        ) {
            let corpus = corpus("saved_state");
            let mut input = input.get(&corpus).clone();
            for (at, change) in changes {
                let at = at.index(input.len());
                input[at] = change.as_bytes()[0];
            }
            if let Some(end) = end {
                input.truncate(end.index(input.len()));
            }
            saved_state(&input);
        }

        /// Some bytes changed to others, or an end cut off.
        #[test]
        fn peers_are_understood_or_refused(
            input in any::<Index>(),
            changes in prop::collection::vec((any::<Index>(), any::<u8>()), 0..4),
            end in prop::option::weighted(0.1, any::<Index>()),
        ) {
            let corpus = corpus("migration_stream");
            let mut input = input.get(&corpus).clone();
            for (at, change) in changes {
                // Most of a page's bytes mean nothing.
                let at = at.index(input.len().min(80));
                input[at] = change;
            }
            if let Some(end) = end {
                input.truncate(end.index(input.len()));
            }
            migration_stream(&input);
        }
    }
}
