//! What a user sees and does while a VM moves: progress, questions, cancelling, and exit statuses.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Instant;

use rustix::process::Signal;
use serde_json::json;
use tests::api::{DONE, Vmm, request};
use tests::crossing::{Crossing, Frame, Kind, Link, Moment, Part};
use tests::lab::{Process, SOON};
use tests::outrigger::{self, has_kvm, serve_demo};
use tests::tiny::demo::{expect_heard_once, ringer};
use tests::travels::{Diary, Host, Luggage};

#[test]
fn migration_is_cancelled_at_any_time_at_either_end() {
    if !has_kvm() {
        return;
    }
    let memory = Moment {
        link: Link::Memory,
        there: true,
        frame: Frame::Number(3),
        part: Part::Half,
    };
    let moments = [
        Moment::before(Kind::Machine),
        Moment::before(Kind::Ready),
        memory,
        Moment::before(Kind::DeviceData),
        Moment::before(Kind::State),
        Moment::before(Kind::Prepared),
    ];
    let luggage = Luggage::pack().unwrap();
    let mut here = Host::first(&luggage).unwrap();
    let next = Host::empty().unwrap();
    for moment in moments {
        for at_source in [true, false] {
            let crossing = Crossing::to(&next.door(), Some(moment)).unwrap();
            let receiving = next.open_door().unwrap();
            let sending = here.send(&crossing.url(), 1);
            crossing.expect(SOON).unwrap();
            for endpoint in ["vmm.ping", "vm.info", "vm.counters", "vm.migration"] {
                let answer = here.vmm.get(endpoint).unwrap();
                assert_eq!(answer.status, 200, "{endpoint}: {answer:?}");
            }
            for endpoint in ["vmm.ping", "vm.migration"] {
                assert_eq!(next.vmm.get(endpoint).unwrap().status, 200, "{endpoint}");
            }
            let end = if at_source { &here } else { &next };
            let cancelled = end.vmm.remote(&["cancel"]).unwrap();
            assert!(cancelled.status.success(), "{cancelled:?}");
            // It need not hear from the other end, which hears of it.
            let (first, second) = match at_source {
                true => (sending, receiving),
                false => (receiving, sending),
            };
            let first = first.join().unwrap().unwrap();
            assert!(first.is_error(&["was cancelled"]), "{moment:?}: {first:?}");
            assert_eq!(end.phase().unwrap(), "Cancelled");
            crossing.release();
            let second = second.join().unwrap().unwrap();
            assert_eq!(second.status, 500, "{moment:?}: {second:?}");
            // It is heard at once, and not when patience is at its end.
            let reason = second.body.to_string();
            assert!(!reason.contains("timed out"), "{moment:?}: {reason}");
            assert_eq!(here.state().unwrap().as_deref(), Some("Running"));
            assert_eq!(next.state().unwrap(), None);
            here.expect_work().unwrap();
        }
    }
    Diary::default().check(&here).unwrap();
    let nothing = here.vmm.remote(&["cancel"]).unwrap();
    assert_eq!(nothing.status.code(), Some(1));

    // Too late: the destination runs it.
    let crossing = Crossing::to(&next.door(), Some(Moment::before(Kind::Committed))).unwrap();
    let receiving = next.open_door().unwrap();
    let sending = here.send(&crossing.url(), 1);
    crossing.expect(SOON).unwrap();
    let cancelled = request(&here.vmm.socket, "DELETE", "vm.migration", "").unwrap();
    assert_eq!(cancelled, DONE);
    crossing.release();
    assert_eq!(sending.join().unwrap().unwrap(), DONE);
    assert_eq!(receiving.join().unwrap().unwrap(), DONE);
}

/// Runs `outrigger remote migrate`, and returns its exit status and what it printed.
fn migrate(socket: &Path, url: &str) -> (Option<i32>, String, String) {
    let socket = socket.to_str().unwrap();
    let arguments = [
        "remote",
        "--api-socket",
        socket,
        "migrate",
        url,
        "--connections",
        "2",
    ];
    let output = outrigger::run(&arguments).unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (
        output.status.code(),
        text(output.stdout),
        text(output.stderr),
    )
}

#[test]
fn command_line_tells_how_a_migration_ended() {
    if !has_kvm() {
        return;
    }
    let luggage = Luggage::pack().unwrap();
    let mut here = Host::first(&luggage).unwrap();
    let next = Host::empty().unwrap();
    let door = format!("unix:{}", next.door().display());
    let socket = here.vmm.socket.clone();
    let (status, _, said) = migrate(&socket, &door);
    assert_eq!(status, Some(1));
    assert!(said.contains("is the destination waiting there?"), "{said}");
    let (status, _, said) = migrate(&socket, "http://nowhere");
    assert_eq!(status, Some(1));
    assert!(said.contains("tcp:HOST:PORT"), "{said}");

    // Held up before the commit, and cancelled; then cut off there.
    for (kind, expected, parts) in [
        (Kind::State, 6, ["cancelled", "the VM is here as it was"]),
        (
            Kind::Commit,
            7,
            ["not known", "the VM runs there, or nowhere"],
        ),
    ] {
        let crossing = Crossing::to(&next.door(), Some(Moment::before(kind))).unwrap();
        let receiving = next.open_door().unwrap();
        let (status, _, said) = thread::scope(|scope| {
            let migrating = scope.spawn(|| migrate(&socket, &crossing.url()));
            crossing.expect(SOON).unwrap();
            match kind {
                Kind::State => assert!(here.vmm.remote(&["cancel"]).unwrap().status.success()),
                _ => crossing.cut(),
            }
            migrating.join().unwrap()
        });
        assert_eq!(status, Some(expected), "{said}");
        assert!(parts.iter().all(|part| said.contains(part)), "{said}");
        crossing.mend();
        crossing.release();
        assert_eq!(receiving.join().unwrap().unwrap().status, 500);
        let over = Instant::now() + SOON;
        while next.state().unwrap().is_some() || here.state().unwrap().as_deref() != Some("Running")
        {
            assert!(Instant::now() < over);
        }
        here.expect_work().unwrap();
    }

    let to = next.vmm.socket.to_str().unwrap();
    let device = format!("id=demo,socket={}", next.server_socket().display());
    let mut receive = Command::new(outrigger::binary());
    receive.args([
        "remote",
        "--api-socket",
        to,
        "receive",
        &door,
        "--device",
        &device,
    ]);
    let mut receiving = receive.spawn().unwrap();
    next.vmm.wait_phase("Listening").unwrap();
    let (status, printed, said) = migrate(&socket, &door);
    assert_eq!((status, said.as_str()), (Some(0), ""));
    for part in [
        "the VM has moved: ",
        " rounds, ",
        "the guest stood still for ",
    ] {
        assert!(printed.contains(part), "{printed}");
    }
    assert!(receiving.wait().unwrap().success());
}

#[test]
fn doorbell_of_a_server_that_hangs_is_heard_once_wherever_the_guest_is() {
    if !has_kvm() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let [old, new, door] = ["old", "new", "door"].map(|name| folder.path().join(name));
    let kernel = ringer().unwrap();
    let mut server: Process = serve_demo(&old).unwrap();
    let mut here = Vmm::start(&[
        "--kernel",
        kernel.path().to_str().unwrap(),
        "--memory",
        "size=64M",
        "--user-device",
        &format!("id=demo,socket={}", old.display()),
    ])
    .unwrap();
    here.process.wait_for("ready", SOON).unwrap();
    server.signal(Signal::STOP).unwrap();
    here.process.wait_for("rang", SOON).unwrap();
    let _server = serve_demo(&new).unwrap();
    let mut next = Vmm::start(&[]).unwrap();
    let url = format!("unix:{}", door.display());
    let body = json!({"receiver_url": url, "devices": [{"id": "demo", "socket": new}]});
    let receiving = next.begin("vm.receive-migration", &body);
    next.wait_phase("Listening").unwrap();
    let send = || {
        let body = json!({"destination_url": url}).to_string();
        here.put("vm.send-migration", &body).unwrap()
    };
    let failed = send();
    assert!(failed.is_error(&["demo does not answer"]), "{failed:?}");
    assert_eq!(here.state().unwrap(), "Running");
    // The server may hear it now, or only the next one does.
    server.signal(Signal::CONT).unwrap();
    assert_eq!(send(), DONE);
    assert_eq!(receiving.join().unwrap().unwrap(), DONE);
    expect_heard_once(&mut next.process);
}
