//! Who runs on which CPU: servers of devices on the last, and VMMs on all others, if there are others.
//!
//! Where threads run decides what it takes to wake them, so it has to be the same for everyone.

use anyhow::Result;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// Does something, in threads and processes that it starts, too, where servers run.
pub(crate) fn server<T>(act: impl FnOnce() -> Result<T>) -> Result<T> {
    on(act, |cpu, last| cpu == last)
}

/// As [`server`], where VMMs run.
pub(crate) fn vmm<T>(act: impl FnOnce() -> Result<T>) -> Result<T> {
    on(act, |cpu, last| cpu != last)
}

fn on<T>(act: impl FnOnce() -> Result<T>, is_for_it: fn(usize, usize) -> bool) -> Result<T> {
    let all = sched_getaffinity(None)?;
    let cpus = || (0..CpuSet::MAX_CPU).filter(|cpu| all.is_set(*cpu));
    let last = cpus().next_back().unwrap_or_default();
    if all.count() > 1 {
        let mut set = CpuSet::new();
        cpus()
            .filter(|cpu| is_for_it(*cpu, last))
            .for_each(|cpu| set.set(cpu));
        sched_setaffinity(None, &set)?;
    }
    let result = act();
    sched_setaffinity(None, &all)?;
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_and_vmms_share_no_cpu_and_leave_the_bench_where_it_was() {
        let cpus = || Ok(sched_getaffinity(None)?);
        let before = cpus().unwrap();
        let (servers, vmms) = (server(cpus).unwrap(), vmm(cpus).unwrap());
        if before.count() > 1 {
            assert!((0..CpuSet::MAX_CPU).all(|cpu| !(servers.is_set(cpu) && vmms.is_set(cpu))));
            assert_eq!(servers.count() + vmms.count(), before.count());
        }
        assert_eq!(cpus().unwrap(), before);
    }
}
