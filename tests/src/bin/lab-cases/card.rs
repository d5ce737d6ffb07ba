//! Network cards, which the guest has Linux's driver for.

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use tests::lab::{BOOT, Case, Peer, Report, SOON, Tap, run};

/// Cards on taps of all kinds: packets go both ways, much data arrives undamaged, and the guest sees when the cable is
/// pulled out.
pub(crate) fn all(case: &mut Case<'_>) -> Result<()> {
    let peer = Peer::start()?;
    let one = Tap::make("one", 0, &[])?;
    let jumbo = Tap::make("jumbo", 1, &["multi_queue"])?;
    jumbo.set_mtu(9000)?;

    let checks = "card-facts,card-ping,card-bulk,card-datagrams,card-queues";
    let mut command = case.linux(
        "6.12",
        &format!("outrigger.checks={checks} outrigger.end=cards"),
    );
    command.args(["--cpus", "2", "--net"]).args([
        "id=one,tap=one,mac=02:00:00:00:00:01",
        "id=jumbo,tap=jumbo,num_queues=4,queue_size=128",
        // Made, and gone with the VM.
        "id=made,tap=made,mac=02:00:00:00:00:03,mtu=1400",
    ]);
    let mut vm = case.start(&mut command)?;
    // Its server makes it before there is a guest.
    vm.wait_for("FACT kernel", BOOT)?;
    let made = Tap::find("made", 2)?;
    let report = Report::rest(&mut vm, BOOT)?;
    let names = checks.split(',').collect::<Vec<_>>();
    report.passed(3, &names)?;
    peer.is_well()?;
    are_described(&report)?;

    for (number, tap) in [&one, &jumbo, &made].into_iter().enumerate() {
        let guest = format!("198.18.{number}.2");
        for size in ["56", "1300"] {
            let words = ["ping", "-q", "-c", "3", "-w", "20", "-i", "0.2", "-s"];
            run("busybox", &[&words[..], &[size, &guest]].concat())
                .with_context(|| tap.name().to_owned())?;
        }
        for (is_up, state) in [(false, 0), (true, 1)] {
            tap.set_up(is_up)?;
            vm.wait_for(&format!("CARRIER eth{number} {state}"), SOON)?;
        }
        run("busybox", &["ping", "-q", "-c", "1", "-w", "20", &guest])?;
    }
    vm.signal(Signal::POWER)?;
    let exit = vm.wait(SOON)?;
    ensure!(exit.status.success(), "after power off: {}", exit.status);
    ensure!(Tap::find("made", 2).is_err(), "a tap is left");
    Ok(())
}

/// Whether the guest's kernel has been told what `--net` says.
fn are_described(report: &Report) -> Result<()> {
    // A queue for each direction.
    let expected: [&[&str]; 3] = [
        &[
            "eth0",
            "queues=2",
            "address=02:00:00:00:00:01",
            "mtu=1500",
            "carrier=1",
        ],
        &["eth1", "queues=4", "mtu=9000", "carrier=1"],
        &[
            "eth2",
            "queues=2",
            "address=02:00:00:00:00:03",
            "mtu=1400",
            "carrier=1",
        ],
    ];
    let cards: Vec<_> = report.facts("card").collect();
    ensure!(cards.len() == expected.len(), "{cards:?}");
    for (card, expected) in cards.iter().zip(expected) {
        let words: Vec<_> = card.split_whitespace().collect();
        let missing = expected.iter().find(|word| !words.contains(word));
        ensure!(missing.is_none(), "no {missing:?} in {card}");
    }
    Ok(())
}
