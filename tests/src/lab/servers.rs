//! The servers of a VM's built-in devices, which are processes of their own.

use std::fs;

use anyhow::{Context, Result};
use rustix::process::{Pid, Signal, kill_process};

use super::Process;

/// The server of a built-in device.
#[derive(Clone, Copy, Debug)]
pub struct Server(Pid);

impl Server {
    /// The server of the device `id` of `vm`, by what the list of processes shows.
    ///
    /// # Errors
    /// When there is none.
    pub fn of(vm: &Process, id: &str) -> Result<Self> {
        let wanted = [format!("--id={id}"), format!("--vm={}", vm.id())];
        let is_it = |pid: &Pid| {
            let line = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let words: Vec<_> = line.split('\0').collect();
            words.starts_with(&["outrigger", "serve"])
                && wanted.iter().all(|wanted| words.contains(&wanted.as_str()))
        };
        let processes = fs::read_dir("/proc")?.flatten();
        let mut numbers = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        let pid = numbers.by_ref().filter_map(Pid::from_raw).find(is_it);
        Ok(Self(pid.with_context(|| format!("{id} has no server"))?))
    }

    /// The number by which the kernel knows it.
    pub fn id(self) -> i32 {
        self.0.as_raw_pid()
    }

    /// Whether it has not ended.
    pub fn is_running(self) -> bool {
        // Of one that has ended, and that nobody has waited for, there is a folder, but this is empty.
        let line = fs::read(format!("/proc/{}/cmdline", self.id()));
        line.is_ok_and(|line| !line.is_empty())
    }

    /// Kills it.
    ///
    /// # Errors
    /// When it has ended already.
    pub fn kill(self) -> Result<()> {
        kill_process(self.0, Signal::KILL).context("killing a server")
    }
}
