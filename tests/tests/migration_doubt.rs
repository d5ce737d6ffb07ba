//! Migrations of which one end does not know how they ended: nothing runs by chance, and an operator has the last word.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::Output;
use std::thread::JoinHandle;

use anyhow::Result;
use rustix::process::Signal;
use tests::api::{Answer, DONE};
use tests::crossing::{Crossing, Kind, Moment};
use tests::lab::SOON;
use tests::outrigger::has_kvm;
use tests::travels::{Diary, Host, Luggage};

/// Both ends of a migration that stands still at some moment.
struct Ends {
    _luggage: Luggage,
    here: Host,
    next: Host,
    crossing: Crossing,
    sending: JoinHandle<Result<Answer>>,
    receiving: JoinHandle<Result<Answer>>,
}

impl Ends {
    fn at(moment: Moment) -> Self {
        let luggage = Luggage::pack().unwrap();
        let here = Host::first(&luggage).unwrap();
        let next = Host::empty().unwrap();
        let crossing = Crossing::to(&next.door(), Some(moment)).unwrap();
        let receiving = next.open_door().unwrap();
        let sending = here.send(&crossing.url(), 1);
        crossing.expect(SOON).unwrap();
        Self {
            _luggage: luggage,
            here,
            next,
            crossing,
            sending,
            receiving,
        }
    }

    /// Expects the source to be in doubt, and to have said so.
    fn expect_source_in_doubt(&self, told: &Answer) {
        let parts = ["stands still here", "the destination may run it"];
        assert!(told.is_error(&parts), "{told:?}");
        assert_eq!(self.here.phase().unwrap(), "InDoubt");
        expect_still(&self.here);
    }

    /// Expects the destination to be in doubt.
    fn expect_destination_in_doubt(&self) {
        self.next.vmm.wait_phase("InDoubt").unwrap();
        expect_still(&self.next);
    }

    /// Expects the VM to be at the source alone, and well.
    fn has_stayed(mut self) {
        self.here.vmm.wait_phase("Failed").unwrap();
        assert_eq!(self.here.state().unwrap().as_deref(), Some("Running"));
        self.here.expect_work().unwrap();
        Diary::default().check(&self.here).unwrap();
    }

    /// Expects the VM to be at the destination alone, and well.
    fn has_moved(mut self) {
        self.next.vmm.wait_phase("Completed").unwrap();
        assert_eq!(self.next.state().unwrap().as_deref(), Some("Running"));
        self.here.vmm.process.wait(SOON).unwrap();
        self.next.expect_work().unwrap();
        let mut diary = Diary::default();
        diary.add(&self.here);
        diary.check(&self.next).unwrap();
    }
}

/// Expects the VM to stand still, and that it cannot be had to run other than by resolving the doubt.
fn expect_still(host: &Host) {
    assert_eq!(host.state().unwrap().as_deref(), Some("Paused"));
    for endpoint in ["vm.resume", "vm.reboot", "vm.shutdown", "vm.delete"] {
        let refused = host.vmm.put(endpoint, "").unwrap();
        let parts = ["in doubt", "vm.resolve-migration"];
        assert!(refused.is_error(&parts), "{endpoint}: {refused:?}");
    }
    let cancelled = host.vmm.remote(&["cancel"]).unwrap();
    assert!(cancelled.status.success(), "{cancelled:?}");
    assert_eq!(host.phase().unwrap(), "InDoubt");
    assert_eq!(host.state().unwrap().as_deref(), Some("Paused"));
}

/// Asks for a resolution, and returns what was said about it.
fn resolve(host: &Host, how: &[&str]) -> (Option<i32>, String) {
    let Output { status, stderr, .. } = host.vmm.remote(&[&["resolve"], how].concat()).unwrap();
    (status.code(), String::from_utf8(stderr).unwrap())
}

fn expect_resolved(host: &Host, how: &[&str]) {
    assert_eq!(resolve(host, how), (Some(0), String::new()), "{how:?}");
}

#[test]
fn lost_commit_is_taken_back_when_both_ends_can_talk() {
    if !has_kvm() {
        return;
    }
    let mut ends = Ends::at(Moment::before(Kind::Commit));
    ends.crossing.cut();
    let told = std::mem::replace(&mut ends.sending, std::thread::spawn(|| Ok(DONE)));
    ends.expect_source_in_doubt(&told.join().unwrap().unwrap());
    ends.expect_destination_in_doubt();
    let (status, said) = resolve(&ends.here, &[]);
    assert_eq!(status, Some(1));
    assert!(
        said.contains("does not say whether it runs the VM"),
        "{said}"
    );
    let (status, said) = resolve(&ends.next, &[]);
    assert_eq!(status, Some(1));
    assert!(said.contains("cannot be asked"), "{said}");
    expect_still(&ends.here);
    ends.expect_destination_in_doubt();

    ends.crossing.mend();
    // It asks by itself, and may have done so just now.
    let (status, said) = resolve(&ends.here, &[]);
    assert!(status == Some(0) || said.contains("in doubt"), "{said}");
    ends.here.vmm.wait_phase("Failed").unwrap();
    ends.next.vmm.wait_phase("Failed").unwrap();
    assert_eq!(ends.next.state().unwrap(), None);
    assert_eq!(
        resolve(&ends.here, &[]).0,
        Some(1),
        "there is nothing in doubt"
    );
    // Neither has anything in its way to try again.
    let receiving = ends.next.open_door().unwrap();
    let url = format!("unix:{}", ends.next.door().display());
    assert_eq!(ends.here.send(&url, 1).join().unwrap().unwrap(), DONE);
    assert_eq!(receiving.join().unwrap().unwrap(), DONE);
    ends.has_moved();
}

#[test]
fn destination_that_refuses_after_all_goes_on_to_say_so() {
    if !has_kvm() {
        return;
    }
    let ends = Ends::at(Moment::before(Kind::Commit));
    let cancelled = ends.next.vmm.remote(&["cancel"]).unwrap();
    assert!(cancelled.status.success(), "{cancelled:?}");
    let progress = ends.next.vmm.wait_phase("Cancelled").unwrap();
    // The source may never hear what is on its way to it, and ask.
    let id = u128::from_str_radix(progress["id"].as_str().unwrap(), 16).unwrap();
    let mut asking = UnixStream::connect(ends.next.door()).unwrap();
    asking.write_all(b"outriggr").unwrap();
    for number in [1_u32, 1, 2] {
        asking.write_all(&number.to_le_bytes()).unwrap();
    }
    asking.write_all(&id.to_be_bytes()).unwrap();
    let mut kind = [0; 4];
    asking.read_exact(&mut kind).unwrap();
    assert_eq!(u32::from_le_bytes(kind), Kind::Refused as u32);
    ends.crossing.release();
    ends.has_stayed();
}

#[test]
fn lost_answer_to_the_commit_is_asked_for() {
    if !has_kvm() {
        return;
    }
    let mut ends = Ends::at(Moment::before(Kind::Committed));
    ends.crossing.cut();
    let told = std::mem::replace(&mut ends.sending, std::thread::spawn(|| Ok(DONE)));
    ends.expect_source_in_doubt(&told.join().unwrap().unwrap());
    ends.next.expect_work().unwrap();
    expect_still(&ends.here);
    ends.crossing.mend();
    ends.has_moved();
}

#[test]
fn operator_decides_where_it_runs() {
    if !has_kvm() {
        return;
    }
    let cut = |kind| {
        let mut ends = Ends::at(Moment::before(kind));
        ends.crossing.cut();
        let told = std::mem::replace(&mut ends.sending, std::thread::spawn(|| Ok(DONE)));
        ends.expect_source_in_doubt(&told.join().unwrap().unwrap());
        ends
    };
    let ends = cut(Kind::Commit);
    ends.expect_destination_in_doubt();
    expect_resolved(&ends.next, &["--discard"]);
    ends.next.vmm.wait_phase("Failed").unwrap();
    assert_eq!(ends.next.state().unwrap(), None);
    expect_resolved(&ends.here, &["--run"]);
    ends.has_stayed();

    let ends = cut(Kind::Commit);
    ends.expect_destination_in_doubt();
    expect_resolved(&ends.here, &["--discard"]);
    expect_resolved(&ends.next, &["--run"]);
    ends.has_moved();

    let ends = cut(Kind::Committed);
    expect_resolved(&ends.here, &["--discard"]);
    ends.has_moved();
}

#[test]
fn dead_source_leaves_a_copy_that_can_run() {
    if !has_kvm() {
        return;
    }
    // Its commit is on the way when it dies, and does not arrive.
    let mut ends = Ends::at(Moment::before(Kind::Commit));
    ends.here.vmm.process.signal(Signal::KILL).unwrap();
    ends.here.vmm.process.wait(SOON).unwrap();
    ends.crossing.cut();
    ends.expect_destination_in_doubt();
    let told = std::mem::replace(&mut ends.receiving, std::thread::spawn(|| Ok(DONE)));
    let told = told.join().unwrap().unwrap();
    assert!(told.is_error(&["the source may run it"]), "{told:?}");
    expect_resolved(&ends.next, &["--run"]);
    ends.has_moved();
}

#[test]
fn dead_destination_leaves_a_copy_that_runs_only_if_it_is_told() {
    if !has_kvm() {
        return;
    }
    let mut ends = Ends::at(Moment::before(Kind::Commit));
    ends.next.vmm.process.signal(Signal::KILL).unwrap();
    ends.next.vmm.process.wait(SOON).unwrap();
    ends.crossing.cut();
    let told = std::mem::replace(&mut ends.sending, std::thread::spawn(|| Ok(DONE)));
    ends.expect_source_in_doubt(&told.join().unwrap().unwrap());
    // Another process where the old one was knows nothing, and says so.
    let other = Host::empty().unwrap();
    let door = format!("unix:{}", ends.next.door().display());
    let receiving = other.receive(&door).unwrap();
    ends.crossing.mend();
    let (status, said) = resolve(&ends.here, &[]);
    assert_eq!(status, Some(1));
    assert!(said.contains("it is not the process that it was"), "{said}");
    expect_still(&ends.here);
    expect_resolved(&ends.here, &["--run"]);
    assert!(!receiving.is_finished());
    ends.has_stayed();
}
