//! Guests that work on a few devices (`outrigger.end=work`), and what becomes of it.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tests::lab::{Process, SOON, Stream};

/// What a guest says about its work on a device.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Work {
    /// How often it was used with success.
    pub(crate) count: u64,
    /// The longest access of the last second.
    pub(crate) longest: Duration,
}

impl Work {
    /// The guest's next words about all `N` devices.
    pub(crate) fn next<const N: usize>(vm: &mut Process) -> Result<[Self; N]> {
        let one = |number: usize| -> Result<Self> {
            let prefix = format!("WORK {number} ");
            let line = vm.wait_for(&prefix, SOON)?;
            let numbers = line
                .text
                .strip_prefix(&prefix)
                .and_then(|text| text.split_once(' '));
            let (count, longest) = numbers.with_context(|| line.text.clone())?;
            Ok(Self {
                count: count.parse()?,
                longest: Duration::from_millis(longest.parse()?),
            })
        };
        let all = (0..N).map(one).collect::<Result<Vec<_>>>()?;
        all.try_into().ok().context("as many as were asked for")
    }
}

/// Waits until each device was used so often, and returns how often they were.
pub(crate) fn await_work<const N: usize>(vm: &mut Process, counts: [u64; N]) -> Result<[u64; N]> {
    let deadline = Instant::now() + SOON;
    loop {
        let now = Work::next(vm)?.map(|work| work.count);
        if now.iter().zip(counts).all(|(now, count)| *now >= count) {
            return Ok(now);
        }
        ensure!(Instant::now() < deadline, "{now:?} and not {counts:?}");
    }
}

/// Whether the log of a VM that has ended says these, in this order, of devices that are lost, and no more.
pub(crate) fn are_lost(vm: &Process, reasons: &[&str]) -> Result<()> {
    let errors = vm.lines().iter();
    let errors = errors.filter(|line| line.stream == Stream::Error);
    let lost: Vec<_> = errors
        .map(|line| line.text.as_str())
        .filter(|text| text.ends_with("; from now on the guest reads all-ones"))
        .collect();
    let are_those = lost
        .iter()
        .zip(reasons)
        .all(|(text, reason)| text.contains(reason));
    ensure!(
        lost.len() == reasons.len() && are_those,
        "{lost:?} and not {reasons:?}"
    );
    Ok(())
}
