//! Somebody who asks a guest all the time whether it is there.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tests::lab::{Case, Process, SOON};

/// How long the pauses between questions are.
const PAUSE: Duration = Duration::from_millis(100);

/// A ping that goes on until this is dropped.
#[derive(Debug)]
pub(crate) struct Ping {
    process: Process,
}

impl Ping {
    /// Begins to ask, and waits until the guest answers.
    pub(crate) fn start(case: &Case<'_>, address: &str) -> Result<Self> {
        let mut command = Process::command("busybox".as_ref());
        let pause = PAUSE.as_secs_f64().to_string();
        command.args(["ping", "-i", &pause, address]);
        let process = case.start(&mut command)?;
        let mut ping = Self { process };
        ping.await_answers()?;
        Ok(ping)
    }

    /// For how long what was asked since then was never answered, when it is again.
    pub(crate) fn lost_since(&mut self, since: Instant) -> Result<Duration> {
        self.await_answers()?;
        let answers: Vec<_> = self.answers().collect();
        let first = answers.iter().rposition(|(at, _)| *at < since);
        let recent = answers.get(first.unwrap_or(0)..).unwrap_or_default();
        let [(_, first), .., (_, last)] = recent else {
            return None.context("too few answers");
        };
        let asked = last.checked_sub(*first).context("not in order")? + 1;
        let lost = asked.saturating_sub(u32::try_from(recent.len())?);
        Ok(PAUSE * lost)
    }

    /// For how long what was asked at the beginning was never answered.
    pub(crate) fn lost(&self) -> Duration {
        let first = self.answers().next();
        first.map_or(Duration::MAX, |(_, number)| PAUSE * number)
    }

    /// When each question was answered that was.
    fn answers(&self) -> impl Iterator<Item = (Instant, u32)> {
        let lines = self.process.lines().iter();
        lines.filter_map(|line| Some((line.at, number(&line.text)?)))
    }

    /// Waits until so many are answered, from now on, without one missing in between that all others have come that will.
    fn await_answers(&mut self) -> Result<()> {
        const IN_A_ROW: u32 = 10;
        let now = Instant::now();
        let (mut last, mut in_a_row) = (0, 0);
        while in_a_row < IN_A_ROW {
            ensure!(now.elapsed() < SOON, "answers are missing");
            let line = self.process.wait_for("seq=", SOON)?;
            let number = number(&line.text).with_context(|| line.text.clone())?;
            in_a_row = match number == last + 1 && line.at >= now {
                true => in_a_row + 1,
                false => 0,
            };
            last = number;
        }
        Ok(())
    }
}

/// Which question a line answers.
fn number(line: &str) -> Option<u32> {
    let (_, rest) = line.split_once("seq=")?;
    rest.split_whitespace().next()?.parse().ok()
}
