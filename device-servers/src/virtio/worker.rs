//! A thread that serves queues whenever it is given some.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{self, JoinHandle};

use rustix::event::{EventfdFlags, eventfd};

use super::device::Activation;
use super::queue::VirtQueue;

/// What a worker does with the queues that it is given.
pub trait Service: 'static {
    /// Serves the queues until `stop` [is set](Stop::is_set), finishes what it has taken out of them, and returns.
    fn serve(&mut self, activation: &mut Activation, stop: &Stop);
}

/// A thread that serves queues. It ends when this is dropped.
#[derive(Debug)]
pub struct Worker {
    orders: Option<Sender<Activation>>,
    returned: Receiver<Vec<VirtQueue>>,
    stop: Arc<Stop>,
    thread: Option<JoinHandle<()>>,
    is_busy: bool,
}

/// Says that a service is to return.
#[derive(Debug)]
pub struct Stop {
    event: OwnedFd,
    is_set: AtomicBool,
}

impl Stop {
    /// Whether to return. The descriptor is readable as long as that is so.
    pub fn is_set(&self) -> bool {
        self.is_set.load(Ordering::SeqCst)
    }

    fn new() -> io::Result<Self> {
        Ok(Self {
            event: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            is_set: AtomicBool::new(false),
        })
    }

    fn set(&self) {
        self.is_set.store(true, Ordering::SeqCst);
        // It can fail only if the counter is full, and then it is readable too.
        let _ = rustix::io::write(&self.event, &1_u64.to_ne_bytes());
    }

    fn clear(&self) {
        self.is_set.store(false, Ordering::SeqCst);
        // It can fail only if there is nothing to clear.
        let _ = rustix::io::read(&self.event, &mut [0; 8]);
    }
}

impl AsFd for Stop {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

impl Worker {
    /// Starts a thread of this name. `make` makes the service in it.
    ///
    /// # Errors
    ///
    /// What `make` returns, and if there can be no thread or descriptor.
    pub fn spawn<S, E>(
        name: &str,
        make: impl FnOnce() -> Result<S, E> + Send + 'static,
    ) -> Result<Self, E>
    where
        S: Service,
        E: From<io::Error> + Send + 'static,
    {
        let (orders, incoming) = channel();
        let (back, returned) = channel();
        let (made, is_made) = channel();
        let stop = Arc::new(Stop::new()?);
        let its_stop = Arc::clone(&stop);
        let builder = thread::Builder::new().name(name.to_owned());
        let thread = builder.spawn(move || {
            let result = make();
            let (service, result) = match result {
                Ok(service) => (Some(service), Ok(())),
                Err(error) => (None, Err(error)),
            };
            let is_awaited = made.send(result).is_ok();
            if let Some(service) = service.filter(|_| is_awaited) {
                work(service, &incoming, &back, &its_stop);
            }
        })?;
        is_made
            .recv()
            .unwrap_or_else(|_| Err(io::Error::other("the thread has ended").into()))?;
        Ok(Self {
            orders: Some(orders),
            returned,
            stop,
            thread: Some(thread),
            is_busy: false,
        })
    }

    /// Lets the thread serve queues. It must have been [stopped](Self::stop) since the last time.
    ///
    /// # Errors
    ///
    /// If the thread has ended, or is busy.
    pub fn start(&mut self, activation: Activation) -> io::Result<()> {
        if self.is_busy {
            return Err(io::ErrorKind::ResourceBusy.into());
        }
        let orders = self.orders.as_ref();
        let sent = orders.is_some_and(|orders| orders.send(activation).is_ok());
        self.is_busy = sent;
        sent.then_some(())
            .ok_or_else(|| io::Error::other("the thread that serves queues has ended"))
    }

    /// Lets the thread finish what it has taken, and returns its queues: none, if it had none.
    pub fn stop(&mut self) -> Vec<VirtQueue> {
        self.request_stop();
        if !std::mem::take(&mut self.is_busy) {
            return Vec::new();
        }
        let queues = self.returned.recv().unwrap_or_default();
        self.stop.clear();
        queues
    }

    /// Begins what [`stop`](Self::stop) then waits for, so that several workers stop at the same time.
    pub fn request_stop(&self) {
        if self.is_busy {
            self.stop.set();
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.stop();
        self.orders = None;
        if let Some(thread) = self.thread.take() {
            // It fails only if the thread panicked, which is reported where that happens.
            let _ = thread.join();
        }
    }
}

/// What the thread does until there are no more orders.
fn work(
    mut service: impl Service,
    orders: &Receiver<Activation>,
    back: &Sender<Vec<VirtQueue>>,
    stop: &Stop,
) {
    for mut activation in orders {
        service.serve(&mut activation, stop);
        if back.send(activation.queues).is_err() {
            return;
        }
    }
}
