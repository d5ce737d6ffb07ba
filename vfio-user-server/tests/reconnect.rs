//! A server that is lost, and a fresh one that is told all that the lost one knew.

#![expect(clippy::unwrap_used, reason = "a test panics when it fails")]

mod support;

use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use support::{BASE, Everything, Pair, count, event, memfd, register, wait_for};
use vfio_user_client::{ConnError, DmaAccess, Loss, State};
use vfio_user_server::Options;

#[test]
fn a_fresh_server_can_do_what_the_lost_one_could() {
    let lost = Pair::new(true);
    let memory = memfd(0x3000);
    let client = &lost.client;
    for (page, access) in [
        (0, DmaAccess::ReadWrite),
        (1, DmaAccess::ReadOnly),
        (2, DmaAccess::ReadWrite),
    ] {
        let file = Some((memory.as_fd(), page * 0x1000));
        let iova = BASE + page * 0x2000;
        client.dma_map(iova, 0x1000, file, access).unwrap();
    }
    client.dma_unmap(BASE + 0x4000, 0x1000).unwrap();
    // Three vectors of MSI-X in two pieces, one of which has been given another event since; and an INTx that is not
    // wanted any more.
    let events = [event(), event(), event(), event()];
    let [replaced, first, second, last] = &events;
    client
        .set_irq_events(2, 4, &[first.as_fd(), replaced.as_fd()])
        .unwrap();
    client.set_irq_events(2, 5, &[second.as_fd()]).unwrap();
    client.set_irq_events(2, 99, &[last.as_fd()]).unwrap();
    client.set_irq_events(0, 0, &[replaced.as_fd()]).unwrap();
    client.unmask_irq_by_event(0, replaced.as_fd()).unwrap();
    client.disable_irqs(0).unwrap();

    client.close();
    assert_eq!(client.state(), State::Lost(Loss::Dropped));
    assert!(matches!(client.reset(), Err(ConnError::Lost(_))));
    let setup = client.setup();
    assert_eq!((setup.maps(), setup.events()), (2, 3));

    let fresh = Pair::with(Everything::server(Options::default()), true);
    setup.apply(&fresh.client).unwrap();
    let again = fresh.client.setup();
    assert_eq!((again.maps(), again.events()), (2, 3));
    fresh.enable();
    fresh.set_config16(0xb2, 1 << 15);
    for (vector, event) in [(4, first), (5, second), (99, last)] {
        fresh.write(register::TRIGGER, vector);
        assert_eq!(count(event), 1, "{vector}");
    }
    assert_eq!(count(replaced), 0);
    fresh.fill(BASE, 0x1000, 7).unwrap();
    assert!(fresh.fill(BASE + 0x2000, 0x1000, 7).is_err());
    assert!(fresh.fill(BASE + 0x4000, 0x1000, 7).is_err());
    assert_eq!(fresh.sum(BASE + 0x2000, 0x1000), 0);
    let mut bytes = [0; 0x2000];
    memory.read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes[..0x1000].iter().all(|byte| *byte == 7));
    assert!(bytes[0x1000..].iter().all(|byte| *byte == 0));
}

#[test]
fn the_event_that_unmasks_is_kept_too() {
    let lost = Pair::new(true);
    let (trigger, resample) = (event(), event());
    lost.client
        .set_irq_events(0, 0, &[trigger.as_fd()])
        .unwrap();
    lost.client
        .unmask_irq_by_event(0, resample.as_fd())
        .unwrap();
    let setup = lost.client.setup();
    lost.end();

    let fresh = Pair::with(Everything::server(Options::default()), true);
    setup.apply(&fresh.client).unwrap();
    fresh.write(register::LEVEL, 1);
    assert_eq!(count(&trigger), 1);
    rustix::io::write(&resample, &1_u64.to_ne_bytes()).unwrap();
    assert_eq!(wait_for(&trigger), 1);
}
