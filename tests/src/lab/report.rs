//! What a guest reports.

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::{Line, Process};

/// The report of the program in the crate [`guest`].
#[derive(Debug)]
pub struct Report {
    lines: Vec<Line>,
}

impl Report {
    /// Waits until a guest has reported everything.
    ///
    /// # Errors
    /// When it does not.
    pub fn wait(guest: &mut Process, patience: Duration) -> Result<Self> {
        guest.wait_for("FACT kernel", patience)?;
        Self::rest(guest, patience)
    }

    /// Waits until a guest that has begun has reported everything: the line with its kernel has been waited for.
    ///
    /// # Errors
    /// When it does not.
    pub fn rest(guest: &mut Process, patience: Duration) -> Result<Self> {
        let is_first = |line: &&Line| line.text.contains("FACT kernel");
        let first = guest.lines().iter().rfind(is_first);
        let first = first.context("it has not begun")?.clone();
        let last = guest.wait_for("GUEST DONE", patience)?;
        let lines = guest.lines().iter();
        let lines = lines.filter(|line| (first.at..=last.at).contains(&line.at));
        Ok(Self {
            lines: lines.cloned().collect(),
        })
    }

    /// The values of a fact.
    pub fn facts(&self, name: &str) -> impl Iterator<Item = &str> {
        let lines = self.lines.iter();
        lines.filter_map(move |line| {
            line.text
                .strip_prefix("FACT ")?
                .strip_prefix(name)?
                .strip_prefix(' ')
        })
    }

    /// The value of a fact.
    ///
    /// # Errors
    /// When the guest has not reported it.
    pub fn fact(&self, name: &str) -> Result<&str> {
        self.facts(name)
            .next()
            .with_context(|| format!("the guest does not report {name}"))
    }

    /// The value of a fact that is a number.
    ///
    /// # Errors
    /// When the guest has not reported it.
    pub fn number(&self, name: &str) -> Result<u64> {
        Ok(self.fact(name)?.parse()?)
    }

    /// Whether the guest has found so many devices and everything was well with each of them.
    ///
    /// # Errors
    /// When not, with what the guest says about it.
    pub fn devices_are_well(&self, count: u64) -> Result<()> {
        let found = self.number("devices")?;
        ensure!(found == count, "the guest finds {found} devices");
        let results = self
            .lines
            .iter()
            .filter_map(|line| line.text.strip_prefix("RESULT "));
        let (good, bad): (Vec<_>, Vec<_>) = results.partition(|result| result.ends_with(" ok"));
        ensure!(bad.is_empty(), "{}", bad.join("; "));
        for device in 0..count {
            let prefix = format!("{device}.");
            ensure!(
                good.iter().any(|result| result.starts_with(&prefix)),
                "nothing about device {device}"
            );
        }
        Ok(())
    }

    /// Whether so many of the devices that the host has given to the guest have passed each of these checks.
    ///
    /// # Errors
    /// When not, with what the guest says about it.
    pub fn passed(&self, devices: usize, checks: &[&str]) -> Result<()> {
        for check in checks {
            let part = format!(".{check} ");
            let results = self
                .lines
                .iter()
                .filter_map(|line| line.text.strip_prefix("RESULT "))
                .filter(|result| result.contains(&part));
            let (good, bad): (Vec<_>, Vec<_>) = results.partition(|result| result.ends_with(" ok"));
            ensure!(bad.is_empty(), "{}", bad.join("; "));
            ensure!(
                good.len() == devices,
                "{check} was done with {} devices and not with {devices}",
                good.len()
            );
        }
        Ok(())
    }
}
