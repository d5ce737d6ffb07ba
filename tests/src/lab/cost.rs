//! What I/O costs the lab: what its kernel counts of a VMM and of the servers of its devices.

use std::collections::BTreeMap;
use std::fs;
use std::ops::Sub;
use std::path::Path;

use anyhow::{Context, Result};

use super::counters::Counters;
use super::host::run;
use super::{Process, Server};

/// Counts what a VM costs, from when it is made until it is dropped.
#[derive(Debug)]
pub struct Meter {
    counters: Counters,
    processes: Vec<i32>,
    /// What each thread is called. Some may have ended.
    threads: BTreeMap<i32, String>,
    histograms: [Histogram; 2],
}

/// What a VM has cost.
#[derive(Clone, Debug, Default)]
pub struct Cost {
    /// Exits from the guest to KVM.
    pub exits: u64,
    /// How often threads were woken, by their names.
    pub wakeups: Counts,
    /// System calls, by their names.
    pub calls: Counts,
}

/// Counts by name.
pub type Counts = BTreeMap<String, u64>;

impl Cost {
    /// How many messages went between the VMM and its servers, each of which is sent and received.
    pub fn messages(&self) -> u64 {
        const CALLS: [&str; 2] = ["sys_sendmsg", "sys_recvmsg"];
        let count = |name| self.calls.get(name).copied().unwrap_or_default();
        CALLS.into_iter().map(count).sum::<u64>().div_ceil(2)
    }
}

impl Sub for Cost {
    type Output = Self;

    fn sub(self, before: Self) -> Self {
        Self {
            exits: self.exits - before.exits,
            wakeups: since(self.wakeups, &before.wakeups),
            calls: since(self.calls, &before.calls),
        }
    }
}

fn since(mut counts: Counts, before: &Counts) -> Counts {
    for (name, count) in &mut counts {
        *count -= before.get(name).copied().unwrap_or_default();
    }
    counts.retain(|_, count| *count > 0);
    counts
}

impl Meter {
    /// Begins to count what `vm` costs, with these servers.
    ///
    /// # Errors
    /// When the lab's kernel does not.
    pub fn new(vm: &Process, servers: &[Server]) -> Result<Self> {
        let servers = servers.iter().map(|server| server.id());
        Ok(Self {
            counters: Counters::of(vm)?,
            processes: [vm.id()].into_iter().chain(servers).collect(),
            threads: BTreeMap::new(),
            histograms: [
                Histogram::new("raw_syscalls/sys_enter", "common_pid,id.syscall")?,
                Histogram::new("sched/sched_waking", "pid")?,
            ],
        })
    }

    /// What it has cost so far.
    ///
    /// # Errors
    /// When one of the counters is not there.
    pub fn read(&mut self) -> Result<Cost> {
        for process in &self.processes {
            for task in fs::read_dir(format!("/proc/{process}/task"))? {
                let task = task?;
                let name = fs::read_to_string(task.path().join("comm"));
                let number = task.file_name().to_string_lossy().parse()?;
                // It may just have ended.
                let name = name.unwrap_or_default().trim().to_owned();
                self.threads.entry(number).or_insert(name);
            }
        }
        let [calls, wakeups] = &self.histograms;
        let mut cost = Cost {
            exits: self.counters.read()?.exits,
            ..Cost::default()
        };
        for (keys, count) in wakeups.read()? {
            if let Some(name) = self.thread(&keys) {
                *cost.wakeups.entry(name.to_owned()).or_default() += count;
            }
        }
        for (keys, count) in calls.read()? {
            if self.thread(&keys).is_some() {
                let name = keys.get(1).cloned().unwrap_or_default();
                *cost.calls.entry(name).or_default() += count;
            }
        }
        Ok(cost)
    }

    /// The name of the thread that the first key is, if it is one of the VM's.
    fn thread(&self, keys: &[String]) -> Option<&str> {
        let thread = keys.first()?.parse().ok()?;
        Some(self.threads.get(&thread)?)
    }
}

/// A histogram that the kernel keeps of a trace event (`Documentation/trace/histogram.rst`), until this is dropped.
#[derive(Debug)]
struct Histogram {
    folder: String,
    trigger: String,
}

impl Histogram {
    fn new(event: &str, keys: &str) -> Result<Self> {
        const TRACEFS: &str = "/sys/kernel/tracing";
        if !Path::new(TRACEFS).join("events").exists() {
            run("mount", &["-t", "tracefs", "tracefs", TRACEFS])?;
        }
        let histogram = Self {
            folder: format!("{TRACEFS}/events/{event}"),
            trigger: format!("hist:keys={keys}:size=8192"),
        };
        histogram.set(&histogram.trigger)?;
        Ok(histogram)
    }

    fn set(&self, trigger: &str) -> Result<()> {
        let path = format!("{}/trigger", self.folder);
        fs::write(&path, trigger).with_context(|| format!("{trigger} to {path}"))
    }

    /// The keys of each entry, and how often it was hit.
    fn read(&self) -> Result<Vec<(Vec<String>, u64)>> {
        let text = fs::read_to_string(format!("{}/hist", self.folder))?;
        let entry = |line: &str| {
            // Such as `{ common_pid: 17, id: sys_read [ 0] } hitcount: 3`.
            let (keys, hits) = line.strip_prefix("{ ")?.split_once("} hitcount:")?;
            let keys = keys.split(',').map(|key| {
                let value = key.split_once(':').map(|key| key.1).unwrap_or_default();
                value
                    .split_whitespace()
                    .next()
                    .unwrap_or_default()
                    .to_owned()
            });
            Some((keys.collect(), hits.trim().parse().ok()?))
        };
        Ok(text.lines().filter_map(entry).collect())
    }
}

impl Drop for Histogram {
    fn drop(&mut self) {
        // Nothing is left to do about an error: the lab ends soon.
        let _ = self.set(&format!("!{}", self.trigger));
    }
}
