//! Faults while a VM moves: connections that are cut, VMMs and servers that are killed, migrations that are cancelled, at
//! any message. `COUNT` says how many, and `SEED` repeats a run.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::collections::BTreeMap;
use std::env;
use std::time::{SystemTime, UNIX_EPOCH};

use guest::ledger::Chance;
use tests::faults::{Case, Journey};
use tests::outrigger::has_kvm;

/// How many there are unless it is said.
const FEW: u64 = 16;

#[test]
fn one_whole_vm_runs_after_faults_at_any_message() {
    if !has_kvm() {
        return;
    }
    let number = |name| {
        let value = env::var(name).ok()?;
        Some(value.parse::<u64>().unwrap())
    };
    let count = number("COUNT").unwrap_or(FEW);
    let seed = number("SEED").unwrap_or_else(|| {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        now.as_secs()
    });
    println!("{count} faults, seed {seed}");
    let mut chance = Chance::new(seed);
    let mut journey = Journey::begin().unwrap();
    let mut outcomes = BTreeMap::new();
    for number in 0..count {
        let case = Case::by_chance(&mut chance);
        match journey.go_on(&case) {
            Ok(outcome) => {
                println!("{number}: {case:?}: {outcome:?}");
                *outcomes.entry(outcome).or_insert(0) += 1;
            }
            Err(error) => panic!("fault {number} of seed {seed}: {case:?}: {error:#}"),
        }
    }
    journey.end().unwrap();
    println!("{count} faults, seed {seed}: {outcomes:?}");
}
