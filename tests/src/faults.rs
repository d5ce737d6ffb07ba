//! A VM that moves on while things go wrong: whatever it is, one VM runs afterwards, and it is whole.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use guest::ledger::Chance;
use rustix::process::Signal;
use serde_json::json;

use crate::api::request;
use crate::crossing::{Crossing, Frame, Kind, Link, Moment, Part};
use crate::lab::SOON;
use crate::travels::{Diary, Host, Luggage};

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// All connections are cut, and there are no others for a while.
    Cut,
    /// All connections are cut, and there may be others at once.
    Hiccup,
    /// A VMM is killed.
    Kill(End),
    /// The server of the demo device is killed.
    KillServer(End),
    /// The migration is cancelled.
    Cancel(End),
}

/// One end of a migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// Where the VM is.
    Source,
    /// Where it is to go.
    Destination,
}

/// A migration in which something goes wrong.
#[derive(Debug, Clone, Copy)]
pub struct Case {
    /// When.
    pub moment: Moment,
    /// What.
    pub fault: Fault,
    /// Over how many connections memory goes.
    pub connections: u8,
}

impl Case {
    /// A case by chance.
    pub fn by_chance(chance: &mut Chance) -> Self {
        // About as many frames as there are.
        let (link, there, frames) = match chance.below(5) {
            0 | 1 => (Link::Control, true, 7),
            2 | 3 => (Link::Control, false, 3),
            _ => (Link::Memory, true, 24),
        };
        let number = usize::try_from(chance.below(frames)).unwrap_or_default();
        let part = match chance.below(3) {
            0 => Part::None,
            1 => Part::Half,
            _ => Part::All,
        };
        let mut end = || match chance.below(2) {
            0 => End::Source,
            _ => End::Destination,
        };
        let end = end();
        let fault = match chance.below(8) {
            0 | 1 => Fault::Cut,
            2 => Fault::Hiccup,
            3 | 4 => Fault::Kill(end),
            5 => Fault::KillServer(end),
            _ => Fault::Cancel(end),
        };
        Self {
            moment: Moment {
                link,
                there,
                frame: Frame::Number(number),
                part,
            },
            fault,
            connections: if chance.below(2) == 0 { 1 } else { 4 },
        }
    }
}

/// What has become of the VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Outcome {
    /// It has moved, for nothing has gone wrong before it had.
    Unharmed,
    /// It has moved all the same.
    Moved,
    /// It has stayed.
    Stayed,
    /// It was in doubt, and has moved.
    MovedAfterDoubt,
    /// It was in doubt, and has stayed.
    StayedAfterDoubt,
    /// It was where its VMM has been killed, and nowhere else.
    Killed,
}

/// A VM on its way from host to host.
#[derive(Debug)]
pub struct Journey {
    luggage: Luggage,
    diary: Diary,
    here: Host,
}

impl Journey {
    /// Begins one.
    ///
    /// # Errors
    /// When the VM does not run.
    pub fn begin() -> Result<Self> {
        let luggage = Luggage::pack()?;
        let here = Host::first(&luggage)?;
        Ok(Self {
            luggage,
            diary: Diary::default(),
            here,
        })
    }

    /// Has the VM move to another host, with a fault on the way, and checks that there is one afterwards, and that it is
    /// whole.
    ///
    /// # Errors
    /// When it is not.
    pub fn go_on(&mut self, case: &Case) -> Result<Outcome> {
        let next = Host::empty()?;
        let (outcome, next) = self.migrate(case, next)?;
        let is_at = |end| case.fault == Fault::KillServer(end);
        // A guest that has lost its device says so, and no more.
        let is_device_lost = match outcome {
            Outcome::Unharmed | Outcome::Moved | Outcome::MovedAfterDoubt => {
                is_at(End::Destination)
            }
            Outcome::Stayed | Outcome::StayedAfterDoubt => is_at(End::Source),
            Outcome::Killed => false,
        };
        match outcome {
            Outcome::Unharmed | Outcome::Moved | Outcome::MovedAfterDoubt => {
                // What was said is known when the process has ended.
                self.here.vmm.process.wait(SOON).context("the source")?;
                self.diary.add(&self.here);
                self.here = next;
            }
            Outcome::Stayed | Outcome::StayedAfterDoubt => {}
            Outcome::Killed => {
                *self = Self::begin()?;
                return Ok(outcome);
            }
        }
        if is_device_lost && outcome != Outcome::Unharmed {
            self.here
                .expect_disk_work()
                .with_context(|| format!("{outcome:?}"))?;
            *self = Self::begin()?;
            return Ok(outcome);
        }
        self.here
            .expect_work()
            .with_context(|| format!("{outcome:?}"))?;
        self.diary.check(&self.here)?;
        Ok(outcome)
    }

    /// Checks that all that the guest has written is on the disk.
    ///
    /// # Errors
    /// When it is not.
    pub fn end(&mut self) -> Result<()> {
        self.here.expect_work()?;
        self.luggage.check_image()
    }

    fn migrate(&mut self, case: &Case, mut next: Host) -> Result<(Outcome, Host)> {
        let here = &mut self.here;
        let crossing = Crossing::to(&next.door(), Some(case.moment))?;
        let receiving = next.open_door()?;
        let sending = here.send(&crossing.url(), case.connections);
        while !sending.is_finished() && !crossing.wait(Duration::from_millis(10)) {}
        let has_come = crossing.wait(Duration::ZERO);
        if has_come {
            strike(case.fault, &crossing, here, &mut next)?;
        }
        // Whoever has been killed does not answer, and no answer of the other says all.
        let _ = (sending.join(), receiving.join());
        let is_killed = |end| has_come && case.fault == Fault::Kill(end);
        let [source_lives, destination_lives] =
            [End::Source, End::Destination].map(|end| !is_killed(end));
        let was_in_doubt = settle(&crossing, here, &next, source_lives, destination_lives)?;

        let at_source = if source_lives { runs(here)? } else { false };
        let at_destination = if destination_lives {
            runs(&next)?
        } else {
            false
        };
        let outcome = match (at_source, at_destination) {
            (true, true) => bail!("it runs at both ends"),
            (true, false) if was_in_doubt => Outcome::StayedAfterDoubt,
            (true, false) => Outcome::Stayed,
            (false, true) if !has_come => Outcome::Unharmed,
            (false, true) if was_in_doubt => Outcome::MovedAfterDoubt,
            (false, true) => Outcome::Moved,
            (false, false) => {
                let had_to_survive = match case.fault {
                    Fault::Kill(End::Source) => crossing.has_passed(Kind::Prepared),
                    Fault::Kill(End::Destination) => !crossing.has_passed(Kind::Committed),
                    _ => true,
                };
                ensure!(!had_to_survive || !has_come, "it runs nowhere");
                ensure!(has_come, "it runs nowhere, and nothing has gone wrong");
                Outcome::Killed
            }
        };
        Ok((outcome, next))
    }
}

/// Has something go wrong, and lets go on what can.
fn strike(fault: Fault, crossing: &Crossing, here: &mut Host, next: &mut Host) -> Result<()> {
    let host = match fault {
        Fault::Kill(End::Source) | Fault::KillServer(End::Source) | Fault::Cancel(End::Source) => {
            here
        }
        _ => next,
    };
    match fault {
        Fault::Cut => crossing.cut(),
        Fault::Hiccup => {
            crossing.cut();
            crossing.mend();
        }
        Fault::Kill(_) => {
            let process = &mut host.vmm.process;
            process.signal(Signal::KILL)?;
            process.wait(SOON)?;
        }
        Fault::KillServer(_) => {
            let process = &mut host.server;
            process.signal(Signal::KILL)?;
            process.wait(SOON)?;
        }
        Fault::Cancel(_) => {
            let answer = request(&host.vmm.socket, "DELETE", "vm.migration", "")?;
            ensure!([204, 404].contains(&answer.status), "{answer:?}");
        }
    }
    crossing.release();
    Ok(())
}

/// Does what an operator does about a migration that is in doubt, and returns whether it was. An end asks by itself when it
/// can; one whose other end is dead is told so, and so is a destination whose source has gone on.
fn settle(
    crossing: &Crossing,
    here: &mut Host,
    next: &Host,
    source_lives: bool,
    destination_lives: bool,
) -> Result<bool> {
    crossing.mend();
    let mut was_in_doubt = false;
    let deadline = Instant::now() + SOON;
    loop {
        ensure!(Instant::now() < deadline, "it stays in doubt");
        let source = if source_lives { phase(here)? } else { None };
        let destination = match destination_lives {
            true => Some(next.phase()?),
            false => None,
        };
        let [at_source, at_destination] =
            [&source, &destination].map(|phase| phase.as_deref() == Some("InDoubt"));
        was_in_doubt |= at_source || at_destination;
        let goes_on = |phase: &Option<String>| {
            let ends = ["Completed", "Failed", "Cancelled"];
            phase.as_deref().is_some_and(|phase| !ends.contains(&phase))
        };
        if at_source && !destination_lives {
            resolve(here, "Run")?;
        } else if at_destination && !source_lives {
            resolve(next, "Run")?;
        } else if at_destination && !goes_on(&source) {
            resolve(next, "Discard")?;
        } else if !goes_on(&source) && !goes_on(&destination) {
            if source.as_deref() == Some("Completed") {
                // It ends with the VM, soon.
                here.vmm.process.wait(SOON).context("the source")?;
            }
            return Ok(was_in_doubt);
        }
        thread::sleep(Duration::from_millis(1));
    }
}

fn resolve(host: &Host, outcome: &str) -> Result<()> {
    let body = json!({"outcome": outcome});
    let answer = host.vmm.put("vm.resolve-migration", &body.to_string())?;
    // It may have heard from the other end just now.
    let is_late = answer.is_error(&["no migration is in doubt"]);
    ensure!(answer.status == 204 || is_late, "{answer:?}");
    Ok(())
}

/// The phase of a migration at its source, whose VMM ends when the VM has gone.
fn phase(host: &mut Host) -> Result<Option<String>> {
    match host.phase() {
        Ok(phase) => Ok(Some(phase)),
        Err(error) => match host.vmm.process.wait(SOON) {
            Ok(exit) if exit.status.success() => Ok(None),
            _ => Err(error),
        },
    }
}

/// Whether a host has a VM, which runs.
fn runs(host: &Host) -> Result<bool> {
    match host.state() {
        // Its VMM has ended.
        Err(_) => Ok(false),
        Ok(state) => match state.as_deref() {
            None => Ok(false),
            Some("Running") => Ok(true),
            Some(state) => bail!("the VM is {state}"),
        },
    }
}
