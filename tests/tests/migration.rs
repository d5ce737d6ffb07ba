//! Migration: a VM goes from one process to another while it runs, and goes on there, whole.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use serde_json::json;
use tests::api::{DONE, Vmm};
use tests::lab::SOON;
use tests::outrigger::has_kvm;
use tests::saved::expect_same;
use tests::tiny::counter::counter;
use tests::travels::{Diary, Host, Luggage, free_port};

#[test]
fn vm_at_work_goes_there_and_back() {
    if !has_kvm() {
        return;
    }
    let luggage = Luggage::pack().unwrap();
    let mut diary = Diary::default();
    let mut here = Host::first(&luggage).unwrap();
    for (is_tcp, connections) in [(false, 1), (true, 1), (false, 4), (true, 4)] {
        let mut next = Host::empty().unwrap();
        let url = match is_tcp {
            true => free_port("127.0.0.1").unwrap(),
            false => format!("unix:{}", next.door().display()),
        };
        let receiving = next.receive(&url).unwrap();
        let sent = here.send(&url, connections).join().unwrap().unwrap();
        assert_eq!(sent, DONE);
        assert_eq!(receiving.join().unwrap().unwrap(), DONE);
        assert_eq!(next.state().unwrap().as_deref(), Some("Running"));
        assert!(here.vmm.process.wait(SOON).unwrap().status.success());
        next.expect_work().unwrap();
        diary.add(&here);
        diary.check(&next).unwrap();
        here = next;
    }
    luggage.check_image().unwrap();
}

#[test]
fn paused_vm_arrives_paused_and_with_every_byte() {
    if !has_kvm() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let [first, second] = ["first", "second"].map(|name| folder.path().join(name));
    let kernel = counter().unwrap();
    let kernel = kernel.path().to_str().unwrap();
    let mut here = Vmm::start(&["--kernel", kernel, "--memory", "size=256M"]).unwrap();
    here.process.wait_for("Z", SOON).unwrap();
    here.pause().unwrap();
    assert_eq!(here.snapshot(&first).unwrap(), DONE);
    let mut next = Vmm::start(&[]).unwrap();
    let url = free_port("::1").unwrap();
    let receiving = next.begin("vm.receive-migration", &json!({"receiver_url": url}));
    next.wait_phase("Listening").unwrap();
    let request = json!({"destination_url": url, "connections": 4});
    let sent = here.put("vm.send-migration", &request.to_string()).unwrap();
    assert_eq!(sent, DONE);
    assert_eq!(receiving.join().unwrap().unwrap(), DONE);
    here.process.wait(SOON).unwrap();
    assert_eq!(next.state().unwrap(), "Paused");
    assert_eq!(next.snapshot(&second).unwrap(), DONE);
    expect_same(&first, &second, &["tsc"]);
    assert_eq!(next.put("vm.resume", "").unwrap(), DONE);
    next.process.wait_for("Z", SOON).unwrap();
}
