//! The machine on which something was measured.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::Context;
use vmm::only_emulates;

/// What one has to know of the machine to judge the numbers.
#[derive(Clone, Debug)]
pub(crate) struct Machine {
    pub(crate) processor: String,
    pub(crate) cpus: usize,
    pub(crate) kernel: String,
    /// Whether its KVM runs guests instruction by instruction.
    pub(crate) only_emulates: bool,
    pub(crate) date: String,
    /// How many threads wanted to run, on average over a minute, before and after.
    pub(crate) load: Vec<f64>,
    /// The programs that were measured, with their versions.
    pub(crate) programs: Vec<String>,
    /// Whether it had to be quick.
    pub(crate) quick: bool,
}

impl Machine {
    /// This machine, before anything is measured on it.
    ///
    /// # Errors
    /// When it does not tell.
    pub(crate) fn this(quick: bool) -> anyhow::Result<Self> {
        let processors = fs::read_to_string("/proc/cpuinfo")?;
        let mut models = processors
            .lines()
            .filter_map(|line| line.strip_prefix("model name"));
        let model = models.next().unwrap_or_default();
        let kernel = fs::read_to_string("/proc/sys/kernel/osrelease")?;
        Ok(Self {
            processor: model.trim_matches([' ', '\t', ':']).to_owned(),
            cpus: std::thread::available_parallelism()?.get(),
            kernel: kernel.trim().to_owned(),
            only_emulates: only_emulates(),
            date: said(Path::new("date"), &["-u", "+%F %R UTC"])?,
            load: vec![load()?],
            programs: Vec::new(),
            quick,
        })
    }

    /// Notes that a program is measured.
    ///
    /// # Errors
    /// When it does not say which version it is.
    pub(crate) fn add_program(&mut self, name: &str, path: &Path) -> anyhow::Result<()> {
        let version = said(path, &["--version"])?;
        self.programs.push(match version.strip_prefix(name) {
            Some(_) => version,
            None => format!("{name} ({version})"),
        });
        Ok(())
    }

    /// Notes the load after all has been measured.
    ///
    /// # Errors
    /// When the machine does not tell.
    pub(crate) fn finish(&mut self) -> anyhow::Result<()> {
        self.load.push(load()?);
        Ok(())
    }

    /// All of it in a sentence or two.
    pub(crate) fn describe(&self) -> String {
        let emulates = if self.only_emulates {
            ", whose KVM only emulates"
        } else {
            ""
        };
        let load: Vec<_> = self.load.iter().map(|load| format!("{load:.1}")).collect();
        let quick = if self.quick { ", in a hurry" } else { "" };
        format!(
            "{}, {} CPUs, Linux {}{emulates}; {}{quick}; load {}. {}.",
            self.processor,
            self.cpus,
            self.kernel,
            self.date,
            load.join(" to "),
            self.programs.join(", "),
        )
    }

    #[cfg(test)]
    pub(super) fn example() -> Self {
        Self {
            processor: "A processor".into(),
            cpus: 2,
            kernel: "6.12".into(),
            only_emulates: true,
            date: "2026-01-02 03:04 UTC".into(),
            load: vec![0.5, 1.25],
            programs: vec!["outrigger 0.1.0".into()],
            quick: false,
        }
    }
}

/// The first line that a program says.
fn said(program: &Path, arguments: &[&str]) -> anyhow::Result<String> {
    let output = Command::new(program).args(arguments).output();
    let output = output.with_context(|| format!("cannot run {}", program.display()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text.lines().next().unwrap_or_default().trim().to_owned())
}

fn load() -> anyhow::Result<f64> {
    let text = fs::read_to_string("/proc/loadavg")?;
    let first = text.split(' ').next().unwrap_or_default();
    Ok(first.parse()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machine_is_described_with_its_load() {
        let expected = "A processor, 2 CPUs, Linux 6.12, whose KVM only emulates; 2026-01-02 03:04 UTC; \
                        load 0.5 to 1.2. outrigger 0.1.0.";
        assert_eq!(Machine::example().describe(), expected);
    }

    #[test]
    fn this_machine_is_known() {
        let mut machine = Machine::this(true).unwrap();
        machine.finish().unwrap();
        assert!(machine.cpus > 0 && !machine.kernel.is_empty());
        assert_eq!(machine.load.len(), 2);
    }
}
