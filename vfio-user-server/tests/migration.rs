//! Migration: every state from every other, the stream of a state, and the log of written memory.

#![expect(clippy::unwrap_used, reason = "a test panics when it fails")]

mod support;

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::AsFd;

use proptest::prelude::*;
use support::{BASE, EARLY, Everything, Pair, count, errno, event, memfd, register};
use vfio_user_client::DeviceState::{
    self, Error, PreCopy, PreCopyP2p, Resuming, Running, RunningP2p, Stop, StopCopy,
};
use vfio_user_client::{DmaAccess, MigrationFlags};
use vfio_user_server::{
    Bar, Description, Device, Ids, MAX_SNAPSHOT, Migration, Options, Server, Snapshot,
};

/// The states that a device can be brought into.
const STATES: [DeviceState; 5] = [Stop, Running, StopCopy, Resuming, PreCopy];

fn is_running(state: DeviceState) -> bool {
    [Running, PreCopy].contains(&state)
}

#[test]
fn every_state_but_one_is_reached_from_every_other() {
    for from in STATES {
        for to in STATES {
            let pair = Pair::new(true);
            pair.client.set_device_state(from).unwrap();
            let result = pair.client.set_device_state(to);
            let is_way = (from, to) != (StopCopy, PreCopy);
            let expected = if is_way { 0 } else { 22 };
            assert_eq!(errno(&result), expected, "{from:?} to {to:?}");
            let reached = if is_way { to } else { from };
            assert_eq!(pair.client.device_state().unwrap(), reached);
            let mut server = pair.end();
            assert_eq!(
                server.device().stopped,
                !is_running(reached),
                "{from:?} to {to:?}"
            );
        }
    }
}

#[test]
fn states_that_nobody_can_ask_for_change_nothing() {
    let pair = Pair::new(true);
    let flags = MigrationFlags::STOP_COPY | MigrationFlags::PRE_COPY;
    assert_eq!(pair.client.migration_flags().unwrap(), flags);
    for from in STATES {
        pair.client.set_device_state(from).unwrap();
        for to in [Error, RunningP2p, PreCopyP2p] {
            assert_eq!(errno(pair.client.set_device_state(to)), 22);
            assert_eq!(pair.client.device_state().unwrap(), from);
        }
        pair.client.set_device_state(Running).unwrap();
    }
}

#[test]
fn a_reset_ends_a_migration() {
    for state in STATES {
        let pair = Pair::new(true);
        pair.client.set_device_state(state).unwrap();
        pair.client.reset().unwrap();
        assert_eq!(pair.client.device_state().unwrap(), Running);
        assert!(!pair.end().device().stopped);
    }
}

#[test]
fn a_client_that_goes_leaves_a_stopped_device_stopped() {
    for (state, left) in [
        (Running, Running),
        (PreCopy, Running),
        (Stop, Stop),
        (StopCopy, Stop),
        (Resuming, Resuming),
    ] {
        let pair = Pair::new(true);
        pair.client.set_device_state(state).unwrap();
        let pair = Pair::with(pair.end(), true);
        assert_eq!(pair.client.device_state().unwrap(), left);
        let run = pair.client.set_device_state(Running);
        // What was written of a state is half of it at best.
        assert_eq!(errno(run), if left == Resuming { 22 } else { 0 });
    }
}

/// All that can be read now, in pieces of this size.
fn saved(pair: &Pair, size: usize) -> Vec<u8> {
    let mut saved = Vec::new();
    loop {
        let mut piece = vec![0; size];
        let count = pair.client.migration_read(&mut piece).unwrap();
        saved.extend(&piece[..count]);
        if count < size {
            return saved;
        }
    }
}

#[test]
fn a_device_goes_on_elsewhere() {
    for (early, size) in [(false, 1 << 20), (true, 1 << 20), (true, 777), (false, 1)] {
        let source = Pair::new(true);
        source.write(register::SCRATCH, 0x1234);
        source.enable();
        source.set_config16(0xb2, 1 << 15);
        source.client.region_write(1, 0x20, &[0xab; 16]).unwrap();
        source.write(register::TRIGGER, 5);
        source.write(register::LEVEL, 1);
        let mut stream = Vec::new();
        if early {
            source.client.set_device_state(PreCopy).unwrap();
            stream.extend(saved(&source, size));
            assert!(stream.len() as u64 > EARLY);
            assert!(saved(&source, size).is_empty());
            source.write(register::SCRATCH + 0x100, 0x5678);
        }
        source.client.set_device_state(StopCopy).unwrap();
        stream.extend(saved(&source, size));
        assert!(saved(&source, size).is_empty());

        let target = Pair::new(true);
        let (vector, line) = (event(), event());
        target
            .client
            .set_irq_events(2, 5, &[vector.as_fd()])
            .unwrap();
        target.client.set_irq_events(0, 0, &[line.as_fd()]).unwrap();
        target.client.set_device_state(Resuming).unwrap();
        for piece in stream.chunks(size) {
            target.client.migration_write(piece).unwrap();
        }
        assert_eq!(count(&vector), 0);
        target.client.set_device_state(Stop).unwrap();
        target.client.set_device_state(Running).unwrap();
        assert_eq!(target.read(register::SCRATCH), 0x1234);
        assert_eq!(
            target.read(register::SCRATCH + 0x100),
            if early { 0x5678 } else { 0 }
        );
        assert_eq!(
            [target.config16(4), target.config16(0xb2)],
            [6, 1 << 15 | 99]
        );
        assert_eq!(target.config16(6) & 8, 8);
        let mut entry = [0; 16];
        target.client.region_read(1, 0x20, &mut entry).unwrap();
        assert_eq!(entry, [0xab; 16]);
        // The interrupt that was pending has come, and INTx waits for MSI-X to be disabled.
        assert_eq!((count(&vector), count(&line)), (1, 0));
        target.set_config16(0xb2, 0);
        assert_eq!(count(&line), 1);
        let mut server = target.end();
        assert_eq!(server.device().early, if early { EARLY } else { 0 });
    }
}

#[test]
fn a_cancelled_migration_begins_again_from_the_start() {
    let pair = Pair::new(true);
    pair.client.set_device_state(PreCopy).unwrap();
    let first = saved(&pair, 1000);
    pair.client.set_device_state(Running).unwrap();
    assert!(pair.client.migration_read(&mut [0; 8]).is_err());
    pair.client.set_device_state(PreCopy).unwrap();
    assert_eq!(saved(&pair, 1000), first);
}

#[test]
fn doorbells_that_ring_while_the_device_is_stopped_stay_rung() {
    let pair = Pair::new(true);
    let bells = pair.client.region_io_fds(0).unwrap();
    pair.client.set_device_state(Stop).unwrap();
    rustix::io::write(&bells[0].fd, &1_u64.to_ne_bytes()).unwrap();
    pair.client
        .region_write(0, register::DOORBELLS + 4, &7_u32.to_le_bytes())
        .unwrap();
    assert_eq!(pair.read(register::BELLS), 0);
    assert_eq!([count(&bells[0].fd), count(&bells[1].fd)], [1, 1]);
    rustix::io::write(&bells[1].fd, &1_u64.to_ne_bytes()).unwrap();
    pair.client.set_device_state(Running).unwrap();
    assert_eq!(pair.read(register::BELLS), 1 << 32);
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, cases: 64, ..ProptestConfig::default() })]

    /// A stream with some bytes changed, or cut, is refused or is a state; it does nothing worse.
    #[test]
    fn a_damaged_stream_does_no_harm(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        cut in any::<prop::sample::Index>(),
    ) {
        let source = Pair::new(true);
        source.write(register::SCRATCH, 1);
        source.client.set_device_state(StopCopy).unwrap();
        let mut stream = saved(&source, 4096);
        for (at, value) in changes {
            *at.get_mut(&mut stream) = value;
        }
        stream.truncate(cut.index(2 * stream.len()));
        let target = Pair::new(true);
        target.client.set_device_state(Resuming).unwrap();
        let _ = target.client.migration_write(&stream);
        let _ = target.client.set_device_state(Stop);
        target.client.reset().unwrap();
        prop_assert_eq!(target.client.device_state().unwrap(), Running);
    }
}

/// A device with a state of one piece.
struct Small(Vec<u8>);

impl Device for Small {
    fn read(&mut self, _: usize, _: u64, data: &mut [u8]) -> std::io::Result<()> {
        data.fill(self.0.len().to_le_bytes()[0]);
        Ok(())
    }

    fn write(&mut self, _: usize, _: u64, _: &[u8]) -> std::io::Result<()> {
        Ok(())
    }

    fn reset(&mut self) {}

    fn migration(&mut self) -> Migration<'_> {
        Migration::Snapshot(self)
    }
}

impl Snapshot for Small {
    fn save(&mut self) -> std::io::Result<Vec<u8>> {
        Ok(self.0.clone())
    }

    fn restore(&mut self, state: &[u8]) -> std::io::Result<()> {
        self.0 = state.to_vec();
        Ok(())
    }
}

fn small(state: Vec<u8>) -> vfio_user_client::Client {
    let ids = Ids {
        vendor: 1,
        device: 1,
        subsystem_vendor: 1,
        subsystem: 1,
        revision: 0,
        class: 0,
    };
    let description = Description::new(ids).bar(0, Bar::memory32(16));
    let server = Server::new(description, Options::default(), |_| Small(state)).unwrap();
    let (stream, _) = support::serve(server);
    let options = support::client_options(true);
    vfio_user_client::Client::handshake(stream, support::Guest::new(0), &options).unwrap()
}

#[test]
fn a_small_state_migrates_in_one_piece() {
    for size in [0, 1, 0xffff, 0x1_0000, 0x1_0001, 1_000_007] {
        let source = small((0..=255).cycle().take(size).collect());
        assert_eq!(source.migration_flags().unwrap(), MigrationFlags::STOP_COPY);
        assert_eq!(errno(source.set_device_state(PreCopy)), 22);
        source.set_device_state(StopCopy).unwrap();
        let mut stream = vec![0; 2_000_000];
        let count = source.migration_read(&mut stream).unwrap();
        let target = small(vec![]);
        target.set_device_state(Resuming).unwrap();
        target.migration_write(&stream[..count]).unwrap();
        target.set_device_state(Running).unwrap();
        let mut data = [0];
        target.region_read(0, 0, &mut data).unwrap();
        assert_eq!(data[0], size.to_le_bytes()[0]);
    }
    let too_large = small(vec![0; MAX_SNAPSHOT + 1]);
    too_large.set_device_state(StopCopy).unwrap();
    assert_eq!(
        errno(too_large.migration_read(&mut [0; 4096]).map(drop)),
        22
    );
}

#[test]
fn the_state_of_another_kind_of_device_is_refused() {
    let source = small(vec![]);
    source.set_device_state(StopCopy).unwrap();
    let mut stream = vec![0; 4096];
    let count = source.migration_read(&mut stream).unwrap();
    let target = Pair::new(true);
    target.client.set_device_state(Resuming).unwrap();
    target.client.migration_write(&stream[..count]).unwrap();
    assert_eq!(errno(target.client.set_device_state(Stop)), 22);
    assert_eq!(target.client.device_state().unwrap(), Resuming);
}

/// What happens while memory is logged.
#[derive(Clone, Debug)]
enum Step {
    /// The device writes: where, how much.
    Write(u64, u64),
    Read(u64, u64),
    /// The mapping of this number is taken away, or comes back.
    Toggle(usize),
    /// The log is read: where, how much, in which pages.
    Report(u64, u64, u64),
}

const PAGE: u64 = 4096;

/// Mappings: first page, number of pages, and whether they are by messages.
const MAPPINGS: [(u64, u64, bool); 4] = [
    (0, 16, false),
    (16, 16, true),
    (40, 8, false),
    (60, 4, true),
];
const PAGES: u64 = 64;

fn step() -> impl Strategy<Value = Step> {
    let place = 0..PAGES * PAGE;
    prop_oneof![
        6 => (place.clone(), 1..6 * PAGE).prop_map(|(at, len)| Step::Write(at, len)),
        1 => (place, 1..6 * PAGE).prop_map(|(at, len)| Step::Read(at, len)),
        2 => (0..MAPPINGS.len()).prop_map(Step::Toggle),
        2 => (0..PAGES, 1..PAGES, 9_u32..16)
            .prop_map(|(at, len, page)| Step::Report(at * PAGE, len * PAGE, 1 << page)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, cases: 64, ..ProptestConfig::default() })]

    /// The log of a whole device, by mappings and by messages, while mappings come and go, against a set of pages.
    #[test]
    fn the_log_has_every_page_that_the_device_wrote_and_no_other(
        twin in any::<bool>(),
        steps in prop::collection::vec(step(), 1..40),
    ) {
        let pair = Pair::new(twin);
        let memory = memfd(PAGES * PAGE);
        pair.enable();
        pair.client.start_dma_logging(PAGE, &[]).unwrap();
        let mut mapped = [false; MAPPINGS.len()];
        let toggle = |mapped: &mut [bool], number: usize| {
            let (start, pages, by_message) = MAPPINGS[number];
            let (start, size) = (start * PAGE, pages * PAGE);
            if mapped[number] {
                pair.client.dma_unmap(BASE + start, size).unwrap();
            } else {
                let file = (!by_message).then_some((memory.as_fd(), start));
                pair.client.dma_map(BASE + start, size, file, DmaAccess::ReadWrite).unwrap();
            }
            mapped[number] = !mapped[number];
        };
        (0..MAPPINGS.len()).for_each(|number| toggle(&mut mapped, number));
        let mut model = BTreeSet::new();
        for step in steps {
            match step {
                Step::Toggle(number) => toggle(&mut mapped, number),
                Step::Read(at, len) => drop(pair.sum_or_not(BASE + at, len)),
                Step::Write(at, len) => {
                    let pages = at / PAGE..=(at + len - 1) / PAGE;
                    let is_mapped = |page: &u64| {
                        MAPPINGS.iter().zip(mapped).any(|((start, pages, _), mapped)| {
                            mapped && (*start..start + pages).contains(page)
                        })
                    };
                    let all = pages.clone().all(|page| is_mapped(&page));
                    prop_assert_eq!(pair.fill(BASE + at, len, 1).is_ok(), all);
                    if all {
                        model.extend(pages);
                    }
                }
                Step::Report(at, len, page_size) => {
                    let log = pair.client.dma_log(BASE + at, len, page_size).unwrap();
                    let bits: BTreeSet<u64> = (0..)
                        .zip(&log)
                        .flat_map(|(word, bits)| (0..64).map(move |bit| (64 * word + bit, bits >> bit & 1)))
                        .filter_map(|(bit, set)| (set == 1).then_some(bit))
                        .collect();
                    let mut expected = BTreeSet::new();
                    for page in model.range(at / PAGE..(at + len) / PAGE) {
                        let start = page * PAGE - at;
                        expected.extend(start / page_size..=(start + PAGE - 1) / page_size);
                    }
                    prop_assert_eq!(bits, expected);
                    model.retain(|page| !(at / PAGE..(at + len) / PAGE).contains(page));
                }
            }
        }
    }
}

#[test]
fn writes_through_views_are_logged() {
    use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

    let mut server = Everything::server(Options::default());
    let host = server.device().host();
    let pair = Pair::with(server, true);
    let memory: File = memfd(4 * PAGE);
    let file = Some((memory.as_fd(), 0));
    pair.client
        .dma_map(BASE, 4 * PAGE, file, DmaAccess::ReadWrite)
        .unwrap();
    pair.enable();
    let start = pair.client.start_dma_logging(1 << 16, &[]).unwrap();
    assert_eq!(start, 1 << 16);
    let view = host.memory.view();
    assert_eq!(view.num_regions(), 1);
    view.write_obj(7_u32, GuestAddress(BASE + 2 * PAGE - 1))
        .unwrap();
    drop(view);
    assert_eq!(pair.client.dma_log(BASE, 4 * PAGE, PAGE).unwrap(), [0b110]);
    pair.client.stop_dma_logging().unwrap();
    assert_eq!(errno(pair.client.dma_log(BASE, PAGE, PAGE).map(drop)), 22);
    // A second log begins empty.
    pair.fill(BASE, 1, 1).unwrap();
    pair.client.start_dma_logging(PAGE, &[]).unwrap();
    assert_eq!(pair.client.dma_log(BASE, PAGE, PAGE).unwrap(), [0]);
}
