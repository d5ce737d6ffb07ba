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

    /// How long there was no answer since then, at most, and for how long what was asked was never answered. When this
    /// returns it is answered again.
    pub(crate) fn silence(&mut self, since: Instant) -> Result<(Duration, Duration)> {
        self.await_answers()?;
        let answers = self.process.lines().iter();
        let answers: Vec<_> = answers
            .filter_map(|line| Some((line.at, number(&line.text)?)))
            .collect();
        let first = answers.iter().rposition(|(at, _)| *at < since);
        let recent = answers.get(first.unwrap_or(0)..).unwrap_or_default();
        let gaps = recent.iter().zip(recent.iter().skip(1));
        let longest = gaps.map(|(one, next)| next.0 - one.0).max();
        let (Some(longest), [(_, first), .., (_, last)]) = (longest, recent) else {
            return None.context("too few answers");
        };
        let asked = last.checked_sub(*first).context("not in order")? + 1;
        let answered = u64::try_from(recent.len())?;
        let lost = u32::try_from(asked.saturating_sub(answered))?;
        Ok((longest.saturating_sub(PAUSE), PAUSE * lost))
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
fn number(line: &str) -> Option<u64> {
    let (_, rest) = line.split_once("seq=")?;
    rest.split_whitespace().next()?.parse().ok()
}
