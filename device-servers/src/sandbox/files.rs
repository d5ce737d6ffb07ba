//! Landlock: what is not open yet stays closed.

use landlock::{
    ABI, Access, AccessFs, AccessNet, RestrictionStatus, Ruleset, RulesetAttr, RulesetError,
    RulesetStatus, Scope,
};

/// What there was of Landlock when this was written.
const KNOWN: ABI = ABI::V9;

/// Refuses this thread all files, network ports and processes outside, but for what it has open. A kernel that does not
/// know all of this does what it can.
pub(super) fn keep_out() -> Result<(), RulesetError> {
    let RestrictionStatus {
        ruleset, landlock, ..
    } = restrict()?;
    if ruleset != RulesetStatus::FullyEnforced {
        log::debug!(
            "this kernel's Landlock keeps the server from less than it could: {landlock:?}"
        );
    }
    Ok(())
}

fn restrict() -> Result<RestrictionStatus, RulesetError> {
    Ruleset::default()
        .handle_access(AccessFs::from_all(KNOWN))?
        .handle_access(AccessNet::from_all(KNOWN))?
        .scope(Scope::from_all(KNOWN))?
        .create()?
        .restrict_self()
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{ErrorKind, Read as _};
    use std::net::TcpListener;
    use std::thread;

    use landlock::LandlockStatus;

    use super::*;

    /// Landlock is each thread's own.
    #[test]
    fn what_is_open_stays_open_and_nothing_else_opens() {
        let kept_out = || {
            let mut zeroes = File::open("/dev/zero").unwrap();
            let status = restrict().unwrap().landlock;
            zeroes.read_exact(&mut [1]).unwrap();
            let opened = File::open("/dev/zero").map_err(|error| error.kind());
            let listening = TcpListener::bind("127.0.0.1:0").map_err(|error| error.kind());
            (status, opened.err(), listening.err())
        };
        let (status, opened, listening) = thread::spawn(kept_out).join().unwrap();
        let LandlockStatus::Available { effective_abi, .. } = status else {
            return;
        };
        assert_eq!(opened, Some(ErrorKind::PermissionDenied));
        if effective_abi >= ABI::V4 {
            assert_eq!(listening, Some(ErrorKind::PermissionDenied));
        }
    }
}
