//! The device's own thread: transfers that are done later, and the writer.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use vfio_user_server::Host;

use super::registers::{
    DMA_DONE, DMA_FAILED, DMA_LATER, DMA_MAX, DMA_READ, DMA_WRITE, Transfer, Values, checksum,
    pattern,
};

/// The registers, which the thread shares with the thread that serves the device, and the thread, once there is one.
#[derive(Debug)]
pub(super) struct Worker {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    host: Host,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    values: Values,
    /// Whether the thread accesses memory.
    is_busy: bool,
    is_stopped: bool,
    is_over: bool,
}

/// The vector that says that a transfer is finished.
const FINISHED: u16 = 1;

impl Worker {
    pub(super) fn new(host: Host) -> Self {
        Self {
            shared: Arc::new(Shared {
                host,
                state: Mutex::default(),
                changed: Condvar::new(),
            }),
            thread: None,
        }
    }

    /// Reads or changes the registers.
    pub(super) fn with<T>(&self, access: impl FnOnce(&mut Values) -> T) -> T {
        access(&mut self.shared.lock().values)
    }

    /// Changes the registers in a way that may give the thread something to do.
    pub(super) fn order(&mut self, change: impl FnOnce(&mut Values)) -> io::Result<()> {
        if self.thread.is_none() {
            let shared = Arc::clone(&self.shared);
            let thread = thread::Builder::new().name("demo".to_owned());
            self.thread = Some(thread.spawn(move || shared.work())?);
        }
        self.with(change);
        self.shared.changed.notify_all();
        Ok(())
    }

    /// Changes the registers while the thread does nothing.
    pub(super) fn interrupt(&self, change: impl FnOnce(&mut Values)) {
        let mut state = self.shared.lock();
        let was_stopped = std::mem::replace(&mut state.is_stopped, true);
        let mut state = self.shared.await_idle(state);
        change(&mut state.values);
        state.is_stopped = was_stopped;
        drop(state);
        self.shared.changed.notify_all();
    }

    /// Lets the thread do nothing, and returns once that is so.
    pub(super) fn stop(&self) {
        let mut state = self.shared.lock();
        state.is_stopped = true;
        drop(self.shared.await_idle(state));
    }

    /// Lets the thread go on.
    pub(super) fn start(&mut self) -> io::Result<()> {
        self.shared.lock().is_stopped = false;
        let has_work = self.with(|values| values.pending != 0 || values.writer.period != 0);
        if has_work { self.order(|_| {}) } else { Ok(()) }
    }

    /// Does a transfer, and returns the sum of what was read, if it was; `None` if it was refused.
    pub(super) fn transfer(host: &Host, transfer: &Transfer, command: u32) -> Option<Option<u32>> {
        if transfer.length > DMA_MAX {
            return None;
        }
        match command & !DMA_LATER {
            DMA_WRITE => {
                let bytes = (0..transfer.length).map(|index| pattern(transfer.seed, index));
                let bytes: Vec<_> = bytes.collect();
                host.memory.write(transfer.address(), &bytes).ok()?;
                Some(None)
            }
            DMA_READ => {
                let mut bytes = vec![0; usize::try_from(transfer.length).ok()?];
                host.memory.read(transfer.address(), &mut bytes).ok()?;
                Some(Some(checksum(&bytes)))
            }
            _ => None,
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.shared.lock().is_over = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            // It fails only if the thread panicked, which is reported where that happens.
            let _ = thread.join();
        }
    }
}

impl Shared {
    /// What the thread does until the device goes.
    fn work(&self) {
        let mut next_write = Instant::now();
        let mut state = self.lock();
        while !state.is_over {
            let now = Instant::now();
            let Values {
                pending,
                transfer,
                writer,
                ..
            } = state.values;
            let writes = writer.period != 0;
            if state.is_stopped || (pending == 0 && !writes) {
                state = self.wait(state, None);
            } else if pending != 0 {
                state.is_busy = true;
                drop(state);
                let result = Worker::transfer(&self.host, &transfer, pending);
                state = self.lock();
                state.values.finish(result);
                self.idle(&mut state);
                self.host.interrupts.trigger(FINISHED);
            } else if now < next_write {
                state = self.wait(state, Some(next_write - now));
            } else {
                next_write = now + Duration::from_micros(writer.period.into());
                state.is_busy = true;
                drop(state);
                let written = self.write(&transfer, writer.count);
                state = self.lock();
                let writer = &mut state.values.writer;
                writer.count = writer.count.wrapping_add(1);
                writer.errors = writer.errors.wrapping_add(u32::from(!written));
                self.idle(&mut state);
            }
        }
    }

    /// Writes the number of a write where it belongs.
    fn write(&self, transfer: &Transfer, number: u32) -> bool {
        const PAGE: u32 = 4096;
        let pages = transfer.length / PAGE;
        let Some(page) = number.checked_rem(pages) else {
            return false;
        };
        let offset = u64::from(page) * u64::from(PAGE);
        let bytes = u64::from(number).to_le_bytes();
        let address = transfer.address().checked_add(offset);
        address.is_some_and(|address| self.host.memory.write(address, &bytes).is_ok())
    }

    fn idle(&self, state: &mut State) {
        state.is_busy = false;
        self.changed.notify_all();
    }

    fn await_idle<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        let mut state = state;
        while state.is_busy {
            state = self.wait(state, None);
        }
        state
    }

    fn wait<'a>(
        &self,
        state: MutexGuard<'a, State>,
        limit: Option<Duration>,
    ) -> MutexGuard<'a, State> {
        match limit {
            Some(limit) => {
                let result = self.changed.wait_timeout(state, limit);
                result.unwrap_or_else(PoisonError::into_inner).0
            }
            None => {
                let result = self.changed.wait(state);
                result.unwrap_or_else(PoisonError::into_inner)
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Values {
    /// Notes how a transfer went.
    pub(super) fn finish(&mut self, result: Option<Option<u32>>) {
        self.pending = 0;
        self.dma_status = match result {
            Some(sum) => {
                self.dma_sum = sum.unwrap_or(self.dma_sum);
                DMA_DONE
            }
            None => DMA_FAILED,
        };
    }
}
