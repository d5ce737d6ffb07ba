//! Who runs on which CPU: a VMM and the server of its device share one, wherever an access waits for its answer.
//!
//! Where threads run decides what it takes to wake them, so it has to be the same for everyone. On one CPU, what is
//! measured is the work, and not what it takes to wake another CPU: that is the scheduler's, differs by a factor of ten
//! with what else goes on in the machine, and is the same for all. A scheduler that is left alone does it like this, too.

use anyhow::Result;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// Does something, in threads and processes that it starts, too, on one CPU: the last.
pub(crate) fn on_one_cpu<T>(act: impl FnOnce() -> Result<T>) -> Result<T> {
    let all = sched_getaffinity(None)?;
    let mut one = CpuSet::new();
    if let Some(last) = (0..CpuSet::MAX_CPU).rev().find(|cpu| all.is_set(*cpu)) {
        one.set(last);
    }
    sched_setaffinity(None, &one)?;
    let result = act();
    sched_setaffinity(None, &all)?;
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_cpu_is_the_last_and_the_bench_is_where_it_was() {
        let cpus = || Ok(sched_getaffinity(None)?);
        let before = cpus().unwrap();
        let one = on_one_cpu(cpus).unwrap();
        assert_eq!(one.count(), 1);
        assert!((0..CpuSet::MAX_CPU).all(|cpu| !one.is_set(cpu) || before.is_set(cpu)));
        assert_eq!(cpus().unwrap(), before);
    }
}
