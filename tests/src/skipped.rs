//! Tests that cannot do here what they are for, and pass. The test harness hides what tests that pass print.

use std::io::Write as _;
use std::{env, fs::File, thread};

/// Notes that the test that calls this is skipped, in the list of which `make unit` says how long it is for each reason.
pub fn skip(reason: &str) {
    eprintln!("SKIPPED: {reason}");
    let Some(list) = env::var_os("SKIPPED_TESTS") else {
        return;
    };
    let list = File::options().create(true).append(true).open(list);
    let name = thread::current().name().unwrap_or_default().to_owned();
    let noted = list.and_then(|mut list| list.write_all(format!("{reason}\t{name}\n").as_bytes()));
    assert!(noted.is_ok(), "cannot note that {name} is skipped");
}
