//! The transport: the registers, and what they cause.

use std::io;
use std::sync::Arc;

use vfio_user_server::{
    Device, DoorbellEvent, Host, Migration, Options, Server, ServerError, StateStream,
};

use super::common::{
    Common, Effect, QueueRegisters, RESERVED_FEATURES, TRANSPORT_FEATURES, status,
};
use super::device::{Activation, VirtioDevice};
use super::layout::{self, BAR, COMMON, CONFIG, ISR, MAX_QUEUES, NOTIFY, NOTIFY_STRIDE};
use super::queue::VirtQueue;
use super::signals::{ConfigSignal, Signals};
use super::state::{MAX_STATE, State};

/// Makes a server of a virtio device.
///
/// # Errors
///
/// [`ServerError`] if there are no descriptors for as many doorbells, or there are more than
/// [`MAX_QUEUES`] queues.
pub fn server<D: VirtioDevice>(
    device: D,
    options: Options,
) -> Result<Server<Transport<D>>, ServerError> {
    let sizes = device.queue_sizes();
    let queues = u16::try_from(sizes.len())
        .ok()
        .filter(|queues| *queues <= MAX_QUEUES);
    let queues = queues.ok_or_else(|| {
        io::Error::other(format!(
            "a device cannot have more than {MAX_QUEUES} queues"
        ))
    })?;
    let description = layout::description(device.identity(), queues, device.config().len());
    Server::new(description, options, |host| {
        let signals = Signals::new(host.interrupts.clone(), queues);
        Transport {
            device,
            host: host.clone(),
            bells: (0..usize::from(queues))
                .map_while(|bell| host.doorbells.take(bell))
                .collect(),
            common: Common::new(&sizes),
            signals: Arc::new(signals),
            is_running: true,
            is_active: false,
            saving: Vec::new(),
            loading: Vec::new(),
        }
    })
}

/// A virtio device, as a PCI device.
#[derive(Debug)]
pub struct Transport<D: VirtioDevice> {
    device: D,
    host: Host,
    bells: Vec<DoorbellEvent>,
    common: Common,
    signals: Arc<Signals>,
    /// Whether the device is not stopped.
    is_running: bool,
    /// Whether the device has its queues.
    is_active: bool,
    /// The state that is being read, and the one that is being written.
    saving: Vec<u8>,
    loading: Vec<u8>,
}

impl<D: VirtioDevice> Transport<D> {
    /// The device.
    pub fn device(&mut self) -> &mut D {
        &mut self.device
    }

    /// What is offered to the driver.
    fn features(&self) -> u64 {
        self.device.features() & !RESERVED_FEATURES | TRANSPORT_FEATURES
    }

    fn write_common(&mut self, offset: u64, data: &[u8]) {
        match self.common.write(offset, data, &self.signals) {
            Effect::None => {}
            Effect::Status(0) => self.reset_virtio(),
            Effect::Status(value) => self.set_status(value),
            Effect::Enable(queue) => self.change_queue(queue, |queue| queue.is_enabled = true),
            Effect::Reset(queue) => {
                self.change_queue(queue, |queue| {
                    *queue = QueueRegisters::new(queue.max_size);
                });
            }
        }
    }

    /// Sets bits of the status. None can be cleared, and those that have to wait for others are not set without them.
    fn set_status(&mut self, value: u8) {
        let mut value = value & status::DRIVERS;
        if !self.common.accepts_features(self.features()) {
            value &= !status::FEATURES_OK;
        }
        if (self.common.status | value) & status::FEATURES_OK == 0 {
            value &= !status::DRIVER_OK;
        }
        let was_live = self.common.is_live();
        self.common.status |= value;
        if !was_live && self.common.is_live() && !self.common.is_reachable(&self.host.memory.view())
        {
            let reason = "the driver has a queue where the device can reach no memory";
            self.signals.need_reset(&reason);
        }
        self.update();
    }

    /// Changes a queue while the device is not active.
    fn change_queue(&mut self, queue: u16, change: impl FnOnce(&mut QueueRegisters)) {
        self.deactivate();
        if let Some(queue) = self.common.queues.get_mut(usize::from(queue)) {
            change(queue);
        }
        self.update();
    }

    /// Activates the device if it should be active.
    fn update(&mut self) {
        let should_be = self.is_running && self.common.is_live() && !self.signals.needs_reset();
        if !should_be || self.is_active {
            return;
        }
        match self.activate() {
            Ok(()) => self.is_active = true,
            Err(error) => self.signals.need_reset(&error),
        }
    }

    fn activate(&mut self) -> io::Result<()> {
        let mut queues = Vec::new();
        for (index, bell) in (0..).zip(&self.bells) {
            let Some(queue) = self.common.queue(index) else {
                continue;
            };
            let queue =
                queue.map_err(|error| io::Error::other(format!("queue {index}: {error}")))?;
            let (memory, signals) = (self.host.memory.clone(), Arc::clone(&self.signals));
            queues.push(VirtQueue::new(index, queue, memory, bell.clone(), signals));
        }
        self.device.activate(Activation {
            features: self.common.driver_features,
            queues,
            config: ConfigSignal(Arc::clone(&self.signals)),
        })
    }

    /// Takes the queues back, if the device has them, and notes how far it has got.
    fn deactivate(&mut self) {
        if !std::mem::take(&mut self.is_active) {
            return;
        }
        for queue in self.device.deactivate() {
            let registers = self.common.queues.get_mut(usize::from(queue.index()));
            if let Some(registers) = registers {
                (registers.next_available, registers.next_used) = queue.position();
            }
        }
    }

    /// The driver's reset.
    fn reset_virtio(&mut self) {
        self.deactivate();
        self.device.reset();
        self.common.reset();
        self.signals.reset();
    }

    /// The doorbell at an offset of the BAR.
    fn bell(&self, offset: u64) -> Option<&DoorbellEvent> {
        let bell = offset.checked_sub(NOTIFY)? / u64::from(NOTIFY_STRIDE);
        self.bells.get(usize::try_from(bell).ok()?)
    }
}

impl<D: VirtioDevice> Device for Transport<D> {
    fn read(&mut self, bar: usize, offset: u64, data: &mut [u8]) -> io::Result<()> {
        if bar != BAR {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let (start, bytes) = if COMMON.contains(&offset) {
            let bytes = self.common.bytes(self.features(), &self.signals);
            (COMMON.start, bytes)
        } else if ISR.contains(&offset) {
            (ISR.start, vec![self.signals.take_isr()])
        } else if CONFIG.contains(&offset) {
            (CONFIG.start, self.device.config())
        } else {
            (offset, Vec::new())
        };
        let skip = usize::try_from(offset - start).unwrap_or(usize::MAX);
        let bytes = bytes.into_iter().skip(skip).chain(std::iter::repeat(0));
        for (to, from) in data.iter_mut().zip(bytes) {
            *to = from;
        }
        Ok(())
    }

    fn write(&mut self, bar: usize, offset: u64, data: &[u8]) -> io::Result<()> {
        if bar != BAR {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        if COMMON.contains(&offset) {
            self.write_common(offset, data);
        } else if CONFIG.contains(&offset) {
            self.device.write_config(offset - CONFIG.start, data);
        } else if let Some(bell) = self.bell(offset) {
            // A driver that writes it at another width than most.
            ring(bell);
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.reset_virtio();
    }

    fn memory_changed(&mut self) {
        // Queues may have become reachable.
        if self.is_active {
            self.bells.iter().for_each(ring);
        }
    }

    fn stop(&mut self) -> io::Result<()> {
        self.deactivate();
        if let Err(error) = self.device.stop() {
            self.update();
            return Err(error);
        }
        self.is_running = false;
        Ok(())
    }

    fn start(&mut self) -> io::Result<()> {
        self.device.start()?;
        self.is_running = true;
        self.update();
        Ok(())
    }

    fn migration(&mut self) -> Migration<'_> {
        if self.device.migrates() {
            Migration::Stream(self)
        } else {
            Migration::None
        }
    }
}

impl<D: VirtioDevice> StateStream for Transport<D> {
    fn read_state(&mut self, offset: u64, data: &mut [u8]) -> io::Result<usize> {
        if offset == 0 {
            self.saving = self.state().encode();
        }
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let rest = self.saving.get(start..).unwrap_or(&[]);
        let count = rest.len().min(data.len());
        for (to, from) in data.iter_mut().zip(rest) {
            *to = *from;
        }
        if count < data.len() {
            self.device.saved();
        }
        Ok(count)
    }

    fn write_state(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        if offset == 0 {
            self.loading.clear();
        }
        if self.loading.len() + data.len() > MAX_STATE {
            return Err(io::ErrorKind::InvalidData.into());
        }
        self.loading.extend_from_slice(data);
        Ok(())
    }

    fn state_written(&mut self, _size: u64) -> io::Result<()> {
        let bytes = std::mem::take(&mut self.loading);
        let state = State::decode(&bytes, &self.common, self.features())
            .map_err(|unfit| io::Error::new(io::ErrorKind::InvalidData, unfit))?;
        self.device.restore(&state.device)?;
        self.signals
            .restore(state.isr, state.generation, state.needs_reset);
        self.signals.set_config_vector(state.config_vector);
        for (queue, vector) in (0..).zip(state.queue_vectors) {
            self.signals.set_queue_vector(queue, vector);
        }
        self.common = state.common;
        Ok(())
    }
}

impl<D: VirtioDevice> Transport<D> {
    fn state(&self) -> State {
        let queues = (0..).zip(&self.common.queues);
        State {
            common: self.common.clone(),
            isr: self.signals.isr(),
            generation: self.signals.generation(),
            needs_reset: self.signals.needs_reset(),
            config_vector: self.signals.config_vector(),
            queue_vectors: queues
                .map(|(queue, _)| self.signals.queue_vector(queue))
                .collect(),
            device: self.device.save(),
        }
    }
}

fn ring(bell: &DoorbellEvent) {
    // It can fail only if the counter is full, and then it has rung.
    let _ = rustix::io::write(bell, &1_u64.to_ne_bytes());
}
