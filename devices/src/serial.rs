//! The serial port, a 16550.

use std::fmt;
use std::io::{self, Write};
use std::mem;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
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

    /// Takes the state of the registers out, with the input that the guest has not read.
    pub fn save(&self) -> SerialState {
        let state = self.model().state();
        SerialState {
            divisor: [state.baud_divisor_low, state.baud_divisor_high],
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            input: state.in_buffer,
        }
    }

    /// Puts a state back. If the port had something to tell the guest, the guest is interrupted again.
    pub fn restore(&self, state: &SerialState) -> Result<(), SerialError> {
        let mut model = self.model();
        let (interrupt, input_empty) = (self.interrupt.clone(), self.input_empty.clone());
        let new = Model::with_events(interrupt.clone(), input_empty.clone(), Box::new(io::sink()));
        if state.input.len() > new.fifo_capacity() {
            return Err(SerialError::Input(state.input.len()));
        }
        let output = mem::replace(&mut *model, new).into_writer();
        *model = Model::from_state(&state.into(), interrupt, input_empty, output)
            .map_err(|_| SerialError::Interrupt)?;
        drop(model);
        // There is room for input, if none was restored.
        self.input_empty.in_buffer_empty();
        Ok(())
    }

    fn model(&self) -> MutexGuard<'_, Model> {
        self.model.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Why a state is none of a serial port.
#[derive(Debug, thiserror::Error)]
pub enum SerialError {
    /// There is more input than the port has room for.
    #[error("the serial port has no room for {0} bytes of input")]
    Input(usize),
    /// The guest cannot be interrupted.
    #[error("the serial port cannot interrupt the guest")]
    Interrupt,
}

/// The registers of a serial port, as a 16550 has them, and its input.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialState {
    /// The divisor latch, the low byte first.
    divisor: [u8; 2],
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    /// What the guest has not read yet.
    input: Vec<u8>,
}

impl From<&SerialState> for vm_superio::serial::SerialState {
    fn from(state: &SerialState) -> Self {
        let [baud_divisor_low, baud_divisor_high] = state.divisor;
        Self {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.input.clone(),
        }
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

#[cfg(test)]
mod tests {
    use super::*;
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    /// Offsets of registers, and bits in them (16550).
    const DATA: u64 = 0;
    const INTERRUPT_ENABLE: u64 = 1;
    const INTERRUPT_IDENTIFICATION: u64 = 2;
    const LINE_CONTROL: u64 = 3;
    const SCRATCH: u64 = 7;
    const DATA_AVAILABLE: u8 = 1;

    #[derive(Clone, Default)]
    struct Output(Arc<Mutex<Vec<u8>>>);

    impl Write for Output {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn serial() -> (Serial, EventFd, Output) {
        let [interrupt, input_empty] = [(); 2].map(|()| EventFd::new(EFD_NONBLOCK).unwrap());
        let output = Output::default();
        let port = interrupt.try_clone().unwrap();
        (
            Serial::new(port, input_empty, Box::new(output.clone())),
            interrupt,
            output,
        )
    }

    fn read(serial: &Serial, register: u64) -> u8 {
        let mut byte = [0];
        serial.read(register, &mut byte);
        byte[0]
    }

    #[test]
    fn goes_on_where_it_was_saved() {
        let (from, _, _) = serial();
        from.write(INTERRUPT_ENABLE, &[DATA_AVAILABLE]);
        from.write(LINE_CONTROL, &[3]);
        from.write(SCRATCH, &[0x5a]);
        from.input(b"ab");
        let state = from.save();

        let (to, interrupt, output) = serial();
        to.restore(&state).unwrap();
        assert_eq!(to.save(), state);
        assert!(
            interrupt.read().is_ok(),
            "the guest hears of the input again"
        );
        assert_eq!(read(&to, INTERRUPT_IDENTIFICATION) & 0xf, 4);
        assert_eq!([read(&to, LINE_CONTROL), read(&to, SCRATCH)], [3, 0x5a]);
        assert_eq!([read(&to, DATA), read(&to, DATA)], *b"ab");
        to.write(DATA, b"c");
        assert_eq!(*output.0.lock().unwrap(), b"c", "it still has its output");
    }

    #[test]
    fn more_input_than_there_is_room_for_is_refused() {
        let (serial, _, output) = serial();
        let before = serial.save();
        let state = SerialState {
            input: vec![0; 1 << 20],
            ..before.clone()
        };
        assert!(matches!(serial.restore(&state), Err(SerialError::Input(_))));
        assert_eq!(serial.save(), before);
        serial.write(DATA, b"d");
        assert_eq!(*output.0.lock().unwrap(), b"d");
    }
}
