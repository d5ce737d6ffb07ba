//! A program while it is measured.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

/// A process that does not outlive its measurement.
pub(crate) struct Running {
    child: Child,
    output: ChildStdout,
    pub(crate) started: Instant,
}

impl Running {
    /// Starts a program.
    pub(crate) fn start(command: &mut Command) -> anyhow::Result<Self> {
        let started = Instant::now();
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .with_context(|| format!("starting {}", command.get_program().display()))?;
        let output = child.stdout.take().context("no output")?;
        Ok(Self {
            child,
            output,
            started,
        })
    }

    /// Waits until the guest has sent a character, and returns when that was.
    pub(crate) fn wait_for(
        &mut self,
        character: u8,
        failure: Option<u8>,
    ) -> anyhow::Result<Instant> {
        let mut byte = [0];
        loop {
            if self.output.read(&mut byte)? == 0 {
                bail!("the guest ended without {:?}", char::from(character));
            }
            if byte == [character] {
                return Ok(Instant::now());
            }
            if failure.is_some_and(|failure| byte == [failure]) {
                bail!("the guest found something wrong");
            }
        }
    }

    /// Its folder in /proc.
    pub(crate) fn folder(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}", self.child.id()))
    }

    /// The CPU time that it and its children have taken, in user mode and in the kernel together.
    pub(crate) fn cpu_time(&self) -> anyhow::Result<Duration> {
        let processes = processes(self.child.id())?;
        let times = processes.into_iter().map(|process| {
            let stat = Stat::read(&PathBuf::from(format!("/proc/{process}")))?;
            Ok(stat.cpu_time)
        });
        times.sum()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // One that has ended already cannot be killed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A process and its descendants.
fn processes(root: u32) -> anyhow::Result<Vec<u32>> {
    let mut parents: Vec<(u32, u32)> = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let name = entry?.file_name();
        if let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) {
            let stat = Stat::read(&Path::new("/proc").join(name)).unwrap_or_default();
            parents.push((pid, stat.parent));
        }
    }
    let mut found = vec![root];
    let mut next = 0;
    while let Some(process) = found.get(next).copied() {
        let children = parents.iter().filter(|(_, parent)| *parent == process);
        found.extend(children.map(|(child, _)| *child));
        next += 1;
    }
    Ok(found)
}

/// What there is to know of a process (proc_pid_stat(5)).
#[derive(Debug, Default)]
struct Stat {
    parent: u32,
    cpu_time: Duration,
}

impl Stat {
    fn read(folder: &Path) -> anyhow::Result<Self> {
        /// Ticks in a second, which is the same on all of today's machines: `USER_HZ`.
        const HZ: u32 = 100;
        let text = fs::read_to_string(folder.join("stat"))?;
        // The name before them may have anything in it.
        let (_, fields) = text.rsplit_once(") ").context("a strange stat")?;
        let fields: Vec<_> = fields.split(' ').collect();
        let number = |field: usize| -> anyhow::Result<u32> {
            let text = fields.get(field - 3).context("a short stat")?;
            Ok(text.parse()?)
        };
        Ok(Self {
            parent: number(4)?,
            cpu_time: Duration::from_secs(1) * (number(14)? + number(15)?) / HZ,
        })
    }
}
