//! Who runs the VM: how the two ends of a migration agree on it, as plain values without any input or output.
//!
//! What must hold (and is checked over all orders of events, with every loss and every crash, in the tests):
//!
//! * Never do both run it.
//! * Before the source has sent *commit*, whatever goes wrong has it run the VM again.
//! * From then on it is *in doubt* until it hears of the destination. It asks on new connections, under the migration's
//!   id, and the destination answers what it has decided: if it has not been told to commit by then, it refuses there
//!   and then, records that, and never runs the VM later.
//! * A destination that has everything and loses the source is in doubt, too, and keeps what it has: the source may have
//!   died before it could commit.
//! * So one failure, of a process or of the link, leaves a complete copy of the VM in a process that lives, once there
//!   is more than one. Which of two runs is never left to chance: an end in doubt runs the VM when the other has
//!   refused it, or when an operator vouches that the other does not run it and never will.
//!
//! ```text
//! source                                     destination
//! Sending    ── state ─────────────────────▶ Receiving
//!            ◀──────────────────── prepared  Prepared
//! Committing ── commit ────────────────────▶
//!            ◀─────────────────── committed  Running
//! Gone
//! ```

/// Where the source is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Source {
    /// It has the VM, running or paused, and sends it.
    Sending,
    /// It sends *commit*, after which the VM must not run, and waits for the answer.
    Committing,
    /// It has no answer: the VM stays paused until there is one.
    InDoubt,
    /// It has the VM as before, whose devices and vCPUs go on. The migration is over.
    Kept,
    /// The destination has the VM. The migration is over, and so is this copy.
    Gone,
}

/// What the source learns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum SourceInput {
    /// The destination has everything and could run the VM.
    Prepared,
    /// The destination runs the VM.
    Committed,
    /// The destination does not run the VM, and never will.
    Refused,
    /// The connection is lost, a deadline has passed, a device does not stop, or the user has cancelled.
    Failed,
    /// The operator vouches that the destination does not run the VM and never will.
    Forced,
}

impl Source {
    /// Goes on to where `input` leads.
    pub(crate) fn on(self, input: SourceInput) -> Self {
        use SourceInput::{Committed, Failed, Forced, Prepared, Refused};
        match (self, input) {
            (Self::Sending, Prepared) => Self::Committing,
            (Self::Sending, Failed | Refused) => Self::Kept,
            (Self::Committing, Failed) => Self::InDoubt,
            (Self::Committing | Self::InDoubt, Committed) => Self::Gone,
            (Self::Committing | Self::InDoubt, Refused) | (Self::InDoubt, Forced) => Self::Kept,
            // Said twice, too late, or without sense.
            (state, _) => state,
        }
    }
}

/// Where the destination is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Destination {
    /// It takes in the VM.
    Receiving,
    /// It has all of the VM, has said so, and waits for *commit*.
    Prepared,
    /// It has all of the VM and has lost the source: what it has may be the only copy, or an outdated one.
    InDoubt,
    /// It runs the VM. The migration is over.
    Running,
    /// It does not have the VM, and whoever asks is told that it never will. The migration is over.
    Refused,
}

/// What the destination learns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum DestinationInput {
    /// Everything has arrived, and all devices have taken it.
    Complete,
    /// The source wants it to run the VM.
    Commit,
    /// The source asks, on another connection, how it stands.
    Asked,
    /// The connection is lost.
    Lost,
    /// Something does not fit, or the user has cancelled.
    Failed,
    /// The operator vouches that the source does not run the VM and never will.
    Forced,
}

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum DestinationAction {
    /// Nothing.
    None,
    /// Say that all is there.
    SayPrepared,
    /// Run the VM, then say so.
    Run,
    /// Say, to whoever asks, that it runs.
    SayCommitted,
    /// End this copy, then say that it will never run.
    Discard,
    /// Say, to whoever asks, that it will never run.
    SayRefused,
}

impl Destination {
    /// Goes on to where `input` leads.
    pub(crate) fn on(self, input: DestinationInput) -> (Self, DestinationAction) {
        use DestinationInput::{Asked, Commit, Complete, Failed, Forced, Lost};
        match (self, input) {
            (Self::Receiving, Complete) => (Self::Prepared, DestinationAction::SayPrepared),
            (Self::Receiving, Commit | Asked | Lost | Failed)
            | (Self::Prepared | Self::InDoubt, Asked | Failed) => {
                (Self::Refused, DestinationAction::Discard)
            }
            (Self::Prepared, Lost) => (Self::InDoubt, DestinationAction::None),
            (Self::Prepared, Commit) | (Self::InDoubt, Forced) => {
                (Self::Running, DestinationAction::Run)
            }
            (Self::Running, Commit | Asked) => (self, DestinationAction::SayCommitted),
            (Self::Refused, Commit | Asked) => (self, DestinationAction::SayRefused),
            // Said twice, too late, or without sense.
            (state, _) => (state, DestinationAction::None),
        }
    }
}

#[cfg(test)]
mod tests;
