//! The serial port, a 16550.

use std::fmt;
use std::io::{self, Write};
use std::mem;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_superio::Trigger;
use vm_superio::serial::SerialEvents;
use vmm_sys_util::eventfd::EventFd;

use crate::bus::BusDevice;

/// A serial port whose other end is a terminal, a file or a socket.
pub struct Serial {
    interrupt: Interrupt,
    input_empty: InputEmpty,
    model: Mutex<Model>,
}

type Model = vm_superio::Serial<Interrupt, InputEmpty, Box<dyn Write + Send>>;

#[derive(Clone)]
struct Interrupt(Arc<EventFd>);

impl Trigger for Interrupt {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// Signalled when the guest has taken all input that there was.
#[derive(Clone)]
struct InputEmpty(Arc<EventFd>);

impl SerialEvents for InputEmpty {
    fn buffer_read(&self) {}

    fn out_byte(&self) {}

    fn tx_lost_byte(&self) {}

    fn in_buffer_empty(&self) {
        // A full counter is as good a signal.
        let _ = self.0.write(1);
    }
}

impl Serial {
    /// A port that signals `interrupt`, writes what the guest sends to `output`, and signals `input_empty` when the
    /// guest has taken all that [`Serial::input`] gave it.
    pub fn new(interrupt: EventFd, input_empty: EventFd, output: Box<dyn Write + Send>) -> Self {
        let interrupt = Interrupt(Arc::new(interrupt));
        let input_empty = InputEmpty(Arc::new(input_empty));
        let model = Model::with_events(interrupt.clone(), input_empty.clone(), output);
        Self {
            interrupt,
            input_empty,
            model: Mutex::new(model),
        }
    }

    /// How many bytes of input there is room for.
    pub fn input_capacity(&self) -> usize {
        self.model().fifo_capacity()
    }

    /// Gives the guest as much input as there is room for. What a port in loop-back mode is given is lost.
    pub fn input(&self, bytes: &[u8]) {
        if let Err(error) = self.model().enqueue_raw_bytes(bytes) {
            log::debug!("serial port: input lost: {error:?}");
        }
    }

    /// Puts the registers into their state after power-on.
    pub fn reset(&self) {
        let new =
            |output| Model::with_events(self.interrupt.clone(), self.input_empty.clone(), output);
        let mut model = self.model();
        let old = mem::replace(&mut *model, new(Box::new(io::sink())));
        *model = new(old.into_writer());
    }

    fn model(&self) -> MutexGuard<'_, Model> {
        self.model.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl BusDevice for Serial {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match (data, u8::try_from(offset)) {
            ([byte], Ok(offset)) => *byte = self.model().read(offset),
            // The registers are a byte wide.
            (data, _) => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (&[byte], Ok(offset)) = (data, u8::try_from(offset))
            && let Err(error) = self.model().write(offset, byte)
        {
            log::debug!("serial port: {error:?}");
        }
    }
}

impl fmt::Debug for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Serial")
    }
}
