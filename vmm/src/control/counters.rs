//! What has been counted: the body of `vm.counters`.

use std::collections::BTreeMap;

use crate::machine::Machine;

/// Counts by what is counted, and by which device or part of the machine it was.
pub type Counters = BTreeMap<String, BTreeMap<String, u64>>;

/// What the parts of a machine have counted.
pub(super) fn of_machine(machine: &Machine) -> Counters {
    let mut counters = machine.pci.counters();
    counters.insert("_memory".to_owned(), machine.memory.counters());
    counters
}
