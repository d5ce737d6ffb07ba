//! Runs cases and keeps the score.

use std::ffi::OsStr;
use std::fs;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Result;

use super::heartbeat::Heartbeat;
use super::kernel_log::KernelLog;
use super::{Case, Images};

/// Who could not run for so long in the lab has missed deadlines through no fault of its own.
const STANDSTILL: Duration = Duration::from_secs(10);

/// The score of a run.
#[derive(Debug)]
pub struct Suite {
    images: Images,
    selection: Vec<String>,
    seed: u64,
    passed: u32,
    failed: u32,
    skipped: u32,
}

impl Suite {
    /// A suite that runs those cases whose name contains one of `selection`; all of them when that is empty. What they do
    /// by chance follows from `seed`.
    pub fn new(images: Images, selection: Vec<String>, seed: u64) -> Self {
        Self {
            images,
            selection,
            seed,
            passed: 0,
            failed: 0,
            skipped: 0,
        }
    }

    /// Runs a case and prints how it went. One that fails while the lab itself stands still is run once more: what is wrong
    /// with a program, or with how it uses the lab's kernel, is so again then.
    pub fn run(&mut self, name: &str, case: impl Fn(&mut Case<'_>) -> Result<()>) {
        if !self.selection.is_empty() && !self.selection.iter().any(|part| name.contains(part)) {
            self.skipped += 1;
            return;
        }
        let (result, standstill) = self.try_run(name, &case);
        let result = match result {
            Err(error) if standstill > STANDSTILL => {
                println!(
                    "AGAIN {name}: the lab stood still for {standstill:.0?}, and so: {error:#}"
                );
                self.show_logs(name);
                self.try_run(name, &case).0
            }
            result => result,
        };
        match result {
            Ok(took) => {
                self.passed += 1;
                println!("ok {name} ({:.1} s)", took.as_secs_f64());
            }
            Err(error) => {
                self.failed += 1;
                println!("FAILED {name} (seed {}): {error:#}", self.seed);
                self.show_logs(name);
            }
        }
    }

    /// Runs a case, during which the lab's kernel may not complain. Says how long that took, and for how long nothing could
    /// run in the lab.
    fn try_run(
        &self,
        name: &str,
        case: &impl Fn(&mut Case<'_>) -> Result<()>,
    ) -> (Result<Duration>, Duration) {
        let start = Instant::now();
        let heartbeat = Heartbeat::start();
        let result = self.try_watched(name, case);
        (result.map(|()| start.elapsed()), heartbeat.stop())
    }

    /// Runs it, and prints what the kernel said of late if it fails.
    fn try_watched(&self, name: &str, case: &impl Fn(&mut Case<'_>) -> Result<()>) -> Result<()> {
        let mut log = KernelLog::from_now()?;
        let result = case(&mut Case::new(name, &self.images, self.seed)?);
        if result.is_err() {
            let said = log.read()?;
            let last = said.iter().skip(said.len().saturating_sub(10));
            last.for_each(|line| println!("  # {line}"));
        }
        result?;
        log.has_no_complaints()
    }

    /// Prints the last lines that the programs of a case have written.
    fn show_logs(&self, name: &str) {
        let Ok(entries) = fs::read_dir(self.images.logs()) else {
            return;
        };
        let mut paths: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
        paths.sort();
        for path in paths {
            let Some(file) = path.file_name().and_then(OsStr::to_str) else {
                continue;
            };
            if let Some(log) = file.strip_prefix(name)
                && log.starts_with('.')
            {
                let text = fs::read(&path).unwrap_or_default();
                let text = String::from_utf8_lossy(&text);
                let lines: Vec<_> = text.lines().collect();
                println!("  the end of {}:", path.display());
                lines
                    .iter()
                    .skip(lines.len().saturating_sub(15))
                    .for_each(|line| println!("  | {line}"));
            }
        }
    }

    /// Prints the score.
    pub fn close(self) -> ExitCode {
        print!("{} passed, {} failed", self.passed, self.failed);
        match self.skipped {
            0 => println!(),
            skipped => println!(", {skipped} skipped"),
        }
        if self.failed == 0 && self.passed > 0 {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        }
    }
}
