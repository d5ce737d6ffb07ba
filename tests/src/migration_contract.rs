//! What every backend of the passthrough endpoint whose device can migrate has to do, whatever is behind it.

use anyhow::{Context as _, Result, bail, ensure};
use devices::{Backend, Chunk, DeviceState, Migration, MigrationFlags, Next, Region};
use pci::BarIndex;

/// Two devices of a kind that can migrate, by their registers.
#[derive(Debug)]
pub struct Subject {
    /// A register, as BAR and offset, and how many bytes it has.
    pub register: (BarIndex, u64, usize),
    /// What to write to it, and read again.
    pub value: [u8; 4],
    /// Whether a reset sets it to zero.
    pub is_reset: bool,
    /// Whether data that is not a device's state is noticed before the device runs with it.
    pub notices_garbage: bool,
}

/// How much is read at a time: not much, so that there are several pieces, and no piece ends where the device's do.
const PIECE: usize = 17;

/// More pieces than any of these devices has.
const MOST_PIECES: usize = 1 << 20;

/// Puts two devices to the test. Both run afterwards.
///
/// # Errors
/// When they do not do what they have to.
pub fn check(from: &dyn Backend, to: &dyn Backend, subject: &Subject) -> Result<()> {
    let source = from.migration().context("the source cannot migrate")?;
    let destination = to.migration().context("the destination cannot migrate")?;
    at_rest(source).context("a device that runs")?;
    subject.write(from, subject.value)?;
    cancelled(from, source, subject).context("a cancelled migration")?;
    let state = saved(source).context("saving")?;
    refused(to, destination, subject, &state).context("data that is no state")?;
    restored(destination, &state).context("restoring")?;
    subject.expect(to, subject.value).context("the copy")?;
    source.set_state(DeviceState::Running)?;
    subject
        .expect(from, subject.value)
        .context("the original")?;
    log(source).context("the log of written memory")
}

impl Subject {
    fn write(&self, device: &dyn Backend, value: [u8; 4]) -> Result<()> {
        let (bar, offset, size) = self.register;
        let value = value.get(..size).unwrap_or(&value);
        Ok(device.write(Region::Bar(bar), offset, value)?)
    }

    fn expect(&self, device: &dyn Backend, value: [u8; 4]) -> Result<()> {
        let (bar, offset, size) = self.register;
        let mut data = vec![0; size];
        device.read(Region::Bar(bar), offset, &mut data)?;
        ensure!(value.starts_with(&data), "the register is {data:x?}");
        Ok(())
    }
}

fn at_rest(device: &dyn Migration) -> Result<()> {
    ensure!(device.flags().contains(MigrationFlags::STOP_COPY));
    is_in(device, DeviceState::Running)?;
    ensure!(
        device.read(&mut [0; 8]).is_err(),
        "it has data while it runs"
    );
    ensure!(
        device.write(&[0; 8]).is_err(),
        "it takes data while it runs"
    );
    for state in [DeviceState::Stop, DeviceState::Running] {
        device.set_state(state)?;
        is_in(device, state)?;
    }
    Ok(())
}

/// The device goes on with what it knows, wherever a migration of it ends.
fn cancelled(device: &dyn Backend, migration: &dyn Migration, subject: &Subject) -> Result<()> {
    let mut ways = vec![vec![DeviceState::StopCopy]];
    if migration.flags().contains(MigrationFlags::PRE_COPY) {
        ways.push(vec![DeviceState::PreCopy]);
        ways.push(vec![DeviceState::PreCopy, DeviceState::StopCopy]);
    }
    for way in ways {
        for state in &way {
            migration.set_state(*state)?;
            is_in(migration, *state)?;
            migration.read(&mut [0; PIECE])?;
        }
        if way.last() == Some(&DeviceState::StopCopy) {
            let back = migration.set_state(DeviceState::PreCopy);
            ensure!(back.is_err(), "a stopped device goes back to precopy");
            is_in(migration, DeviceState::StopCopy)?;
        }
        migration.set_state(DeviceState::Running)?;
        is_in(migration, DeviceState::Running)?;
        subject.expect(device, subject.value)?;
    }
    Ok(())
}

/// The state of a device, which is left in [`DeviceState::StopCopy`].
fn saved(device: &dyn Migration) -> Result<Vec<u8>> {
    let mut state = Vec::new();
    if device.flags().contains(MigrationFlags::PRE_COPY) {
        device.set_state(DeviceState::PreCopy)?;
        read_until(device, Next::Later, &mut state)?;
    }
    device.set_state(DeviceState::StopCopy)?;
    if let Some(remaining) = device.remaining() {
        ensure!(remaining > 0, "nothing remains before anything is read");
    }
    read_until(device, Next::End, &mut state)?;
    ensure!(!state.is_empty(), "it has no state");
    let beyond = device.read(&mut [0; PIECE])?;
    let end = Chunk {
        length: 0,
        next: Next::End,
    };
    ensure!(beyond == end, "after the end there is {beyond:?}");
    Ok(state)
}

fn read_until(device: &dyn Migration, end: Next, state: &mut Vec<u8>) -> Result<()> {
    for _ in 0..MOST_PIECES {
        let mut piece = [0; PIECE];
        let Chunk { length, next } = device.read(&mut piece)?;
        state.extend_from_slice(piece.get(..length).context("more than there is room for")?);
        if next == end {
            return Ok(());
        }
        ensure!(next == Next::More, "its data goes on with {next:?}");
    }
    bail!("its data has no end");
}

/// Garbage, and a state without its end, are refused; a reset makes the device as good as new.
fn refused(
    device: &dyn Backend,
    migration: &dyn Migration,
    subject: &Subject,
    state: &[u8],
) -> Result<()> {
    let half = state.get(..state.len() / 2).unwrap_or(state);
    for (what, data) in [("garbage", &[0xa5; 64][..]), ("half a state", half)] {
        migration.set_state(DeviceState::Resuming)?;
        let written = migration.write(data);
        let runs = migration.set_state(DeviceState::Running);
        if subject.notices_garbage || written.is_err() {
            ensure!(runs.is_err(), "the device runs with {what}");
        }
        device.reset()?;
        is_in(migration, DeviceState::Running)?;
        if subject.is_reset {
            subject.expect(device, [0; 4]).context(what)?;
        }
    }
    Ok(())
}

fn restored(device: &dyn Migration, state: &[u8]) -> Result<()> {
    device.set_state(DeviceState::Resuming)?;
    is_in(device, DeviceState::Resuming)?;
    for piece in state.chunks(PIECE + 2) {
        device.write(piece)?;
    }
    for state in [DeviceState::Stop, DeviceState::Running] {
        device.set_state(state)?;
        is_in(device, state)?;
    }
    Ok(())
}

/// Either there is no log, or it has a bit for each page.
fn log(device: &dyn Migration) -> Result<()> {
    const PAGES: u64 = 130;
    let range = || 0..PAGES * 4096;
    ensure!(
        device.dirty(range(), 4096).is_err(),
        "there is a log before there should be one"
    );
    let Ok(page_size) = device.start_dirty(4096, &[range()]) else {
        return Ok(());
    };
    if let Ok(log) = device.dirty(range(), page_size) {
        let pages = range().end.div_ceil(page_size);
        let words = usize::try_from(pages.div_ceil(64))?;
        ensure!(
            log.len() == words,
            "there are {} words for {pages} pages",
            log.len()
        );
        ensure!(
            log.iter().all(|word| *word == 0),
            "it wrote to memory: {log:x?}"
        );
    }
    device.stop_dirty()?;
    Ok(())
}

fn is_in(device: &dyn Migration, expected: DeviceState) -> Result<()> {
    let state = device.state()?;
    ensure!(state == expected, "it is in {state:?}, not in {expected:?}");
    Ok(())
}
