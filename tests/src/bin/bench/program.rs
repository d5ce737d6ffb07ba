//! A program while it is measured.

use std::fs::{self, File};
use std::io::{Read, Seek};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// How long a guest may say nothing. Peers that hang are to be left behind.
const PATIENCE: Duration = Duration::from_secs(20);

/// A process that does not outlive its measurement.
pub(crate) struct Running {
    child: Child,
    output: Option<ChildStdout>,
    /// What the VMM says of itself.
    errors: File,
    pub(crate) started: Instant,
}

impl Running {
    /// Starts a program.
    pub(crate) fn start(command: &mut Command) -> anyhow::Result<Self> {
        let errors = tempfile::tempfile()?;
        let stderr = errors.try_clone()?;
        let started = Instant::now();
        let mut child = command
            // Cloud Hypervisor's sandbox ends it when it would say where an error came from.
            .env_remove("RUST_BACKTRACE")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(stderr)
            .spawn()
            .with_context(|| format!("starting {}", command.get_program().display()))?;
        let output = child.stdout.take();
        Ok(Self {
            child,
            output,
            errors,
            started,
        })
    }

    /// Waits until the guest has sent a character, and returns when that was.
    pub(crate) fn wait_for(
        &mut self,
        character: u8,
        failure: Option<u8>,
    ) -> anyhow::Result<Instant> {
        let output = self.output.as_mut().context("somebody else listens")?;
        match wait_for(output, |byte| byte == character || Some(byte) == failure) {
            Ok((byte, at)) if byte == character => Ok(at),
            Ok(_) => bail!("the guest found something wrong"),
            Err(error) => Err(self.explain(error)),
        }
    }

    /// As [`Self::wait_for`], for whatever it is.
    pub(crate) fn wait_for_any(&mut self) -> anyhow::Result<Instant> {
        let output = self.output.as_mut().context("somebody else listens")?;
        match wait_for(output, |_| true) {
            Ok((_, at)) => Ok(at),
            Err(error) => Err(self.explain(error)),
        }
    }

    /// Waits so long for a line in which the guest says this. Returns when that was, and what is behind it.
    pub(crate) fn wait_for_line(
        &mut self,
        text: &str,
        patience: Duration,
    ) -> anyhow::Result<(Instant, String)> {
        let output = self.output.as_mut().context("somebody else listens")?;
        let deadline = Instant::now() + patience;
        let mut last = String::new();
        let error = loop {
            let line = match next_line(output, deadline) {
                Ok(line) => line,
                Err(error) => break error,
            };
            let at = Instant::now();
            if let Some((_, rest)) = line.split_once(text) {
                return Ok((at, rest.to_owned()));
            }
            if !line.is_empty() {
                last = line;
            }
        };
        let error = match last.as_str() {
            "" => error.context(format!("no {text:?}")),
            last => error.context(format!("no {text:?}, and the guest last said: {last}")),
        };
        Err(self.explain(error))
    }

    /// Adds to an error what the program last said.
    pub(crate) fn explain(&mut self, error: anyhow::Error) -> anyhow::Error {
        let mut said = Vec::new();
        let read = self.errors.rewind();
        let read = read.and_then(|()| self.errors.read_to_end(&mut said));
        let said = String::from_utf8_lossy(&said);
        match (read, said.lines().last()) {
            (Ok(_), Some(last)) => anyhow!("{error:#}; the VMM said: {last}"),
            _ => error,
        }
    }

    /// What the guest says from now on, for somebody else to listen to.
    pub(crate) fn take_output(&mut self) -> anyhow::Result<ChildStdout> {
        self.output.take().context("somebody else listens")
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

    /// The part of that which its vCPUs have taken.
    pub(crate) fn vcpu_time(&self) -> anyhow::Result<Duration> {
        let mut all = Duration::ZERO;
        for process in processes(self.child.id())? {
            for thread in fs::read_dir(format!("/proc/{process}/task"))? {
                let thread = thread?.path();
                // One that has ended meanwhile was none.
                let name = fs::read_to_string(thread.join("comm")).unwrap_or_default();
                if is_vcpu(name.trim_end()) {
                    all += Stat::read(&thread)?.cpu_time;
                }
            }
        }
        Ok(all)
    }
}

/// Whether a thread is a vCPU: Outrigger's are `vcpu0`, QEMU's `CPU 0/KVM`.
fn is_vcpu(name: &str) -> bool {
    name.starts_with("vcpu") || (name.starts_with("CPU ") && name.ends_with("/KVM"))
}

/// Waits for a character that is waited for, and returns when it came.
pub(crate) fn wait_for(
    output: &mut ChildStdout,
    is_it: impl Fn(u8) -> bool,
) -> anyhow::Result<(u8, Instant)> {
    loop {
        let byte = next_byte(output, PATIENCE)?;
        if is_it(byte) {
            return Ok((byte, Instant::now()));
        }
    }
}

/// Waits for a whole line, and returns it without its end.
fn next_line(output: &mut ChildStdout, deadline: Instant) -> anyhow::Result<String> {
    let mut line = Vec::new();
    loop {
        let patience = deadline.saturating_duration_since(Instant::now());
        match next_byte(output, patience)? {
            b'\n' => return Ok(String::from_utf8_lossy(&line).trim().to_owned()),
            byte => line.push(byte),
        }
    }
}

fn next_byte(output: &mut ChildStdout, patience: Duration) -> anyhow::Result<u8> {
    let patience = Timespec::try_from(patience)?;
    let mut fds = [PollFd::new(&*output, PollFlags::IN)];
    if poll(&mut fds, Some(&patience))? == 0 {
        bail!("the guest says nothing");
    }
    let mut byte = [0];
    if output.read(&mut byte)? == 0 {
        bail!("the guest ended before it said what it should");
    }
    let [byte] = byte;
    Ok(byte)
}

impl Drop for Running {
    fn drop(&mut self) {
        let servers = processes(self.child.id()).unwrap_or_default();
        // One that has ended already cannot be killed.
        let _ = self.child.kill();
        let _ = self.child.wait();
        // A VMM's servers end with it, and until then keep its disks from others.
        let deadline = Instant::now() + Duration::from_secs(5);
        while servers.iter().any(is_running) && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(1));
        }
    }
}

fn is_running(process: &u32) -> bool {
    Path::new(&format!("/proc/{process}")).exists()
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

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(10);

    fn saying(script: &str) -> Running {
        Running::start(Command::new("sh").args(["-c", script])).unwrap()
    }

    #[test]
    fn line_is_found_behind_others_and_without_its_end() {
        let mut program = saying(r"printf 'noise\r\n\nBEGIN a\r\nEND a 17\r\n'");
        let (begin, rest) = program.wait_for_line("BEGIN a", PATIENCE).unwrap();
        assert_eq!(rest, "");
        let (end, rest) = program.wait_for_line("END a ", PATIENCE).unwrap();
        assert_eq!(rest, "17");
        assert!(program.started < begin && begin <= end);
    }

    #[test]
    fn line_that_does_not_come_is_missed_with_what_was_said() {
        let mut program = saying("echo no disk; echo killed >&2");
        let error = program.wait_for_line("BEGIN", PATIENCE).unwrap_err();
        let error = format!("{error:#}");
        for part in ["no \"BEGIN\"", "no disk", "killed"] {
            assert!(error.contains(part), "{part} is not in: {error}");
        }
    }

    #[test]
    fn patience_ends() {
        let mut program = saying("while echo again; do sleep 0.01; done");
        let patience = Duration::from_millis(50);
        assert!(program.wait_for_line("BEGIN", patience).is_err());
    }
}
