//! The common configuration (virtio 1.2, 4.1.4.3), but for what its registers cause.

use vfio_user_server::PageLog;
use virtio_bindings::bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
    VIRTIO_F_RING_RESET, VIRTIO_F_VERSION_1,
};
use virtio_bindings::bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC,
};
use virtio_queue::{Error, Queue, QueueState};
use vm_memory::{GuestAddress, GuestMemory, GuestMemoryMmap, Permissions};

use super::layout;
use super::signals::Signals;

/// Bits of the device status (virtio 1.2, 2.1).
pub(super) mod status {
    use super::*;

    pub(in super::super) const DRIVER_OK: u8 = bit(VIRTIO_CONFIG_S_DRIVER_OK);
    pub(in super::super) const FEATURES_OK: u8 = bit(VIRTIO_CONFIG_S_FEATURES_OK);
    pub(in super::super) const NEEDS_RESET: u8 = bit(VIRTIO_CONFIG_S_NEEDS_RESET);
    /// Those that a driver sets.
    pub(in super::super) const DRIVERS: u8 = bit(VIRTIO_CONFIG_S_ACKNOWLEDGE)
        | bit(VIRTIO_CONFIG_S_DRIVER)
        | bit(VIRTIO_CONFIG_S_FAILED)
        | DRIVER_OK
        | FEATURES_OK;

    const fn bit(bit: u32) -> u8 {
        bit.to_le_bytes()[0]
    }
}

/// Features of every device here: modern, with indirect descriptors, event index and the reset of single queues.
pub(super) const TRANSPORT_FEATURES: u64 =
    VERSION_1 | 1 << VIRTIO_RING_F_INDIRECT_DESC | EVENT_IDX | RING_RESET;
const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;
const EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;
const RING_RESET: u64 = 1 << VIRTIO_F_RING_RESET;

/// The features that are not a device's own (virtio 1.2, 2.2).
pub(super) const RESERVED_FEATURES: u64 = ((1 << 41) - 1) & !((1 << 24) - 1);

/// The registers that the driver writes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Common {
    pub(super) device_feature_select: u32,
    pub(super) driver_feature_select: u32,
    pub(super) driver_features: u64,
    /// Without [`status::NEEDS_RESET`], which other threads set.
    pub(super) status: u8,
    pub(super) queue_select: u16,
    pub(super) queues: Vec<QueueRegisters>,
}

/// The registers of one queue, and how far the device has got in it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct QueueRegisters {
    pub(super) max_size: u16,
    pub(super) size: u16,
    pub(super) is_enabled: bool,
    pub(super) descriptors: u64,
    pub(super) available: u64,
    pub(super) used: u64,
    pub(super) next_available: u16,
    pub(super) next_used: u16,
}

/// What a write has to lead to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Effect {
    None,
    /// The driver has written the status.
    Status(u8),
    /// The driver enables the queue.
    Enable(u16),
    /// The driver resets the queue.
    Reset(u16),
}

impl Common {
    pub(super) fn new(sizes: &[u16]) -> Self {
        Self {
            queues: sizes.iter().copied().map(QueueRegisters::new).collect(),
            ..Self::default()
        }
    }

    /// What it is after a reset.
    pub(super) fn reset(&mut self) {
        let sizes: Vec<_> = self.queues.iter().map(|queue| queue.max_size).collect();
        *self = Self::new(&sizes);
    }

    /// All of the registers as they read now.
    pub(super) fn bytes(&self, features: u64, signals: &Signals) -> Vec<u8> {
        let queue = self.selected().cloned().unwrap_or_default();
        let exists = usize::from(self.queue_select) < self.queues.len();
        let notify_off = if exists { self.queue_select } else { 0 };
        let needs_reset = u8::from(signals.needs_reset()) * status::NEEDS_RESET;
        let mut bytes = Vec::with_capacity(64);
        bytes.extend(self.device_feature_select.to_le_bytes());
        bytes.extend(half(features, self.device_feature_select).to_le_bytes());
        bytes.extend(self.driver_feature_select.to_le_bytes());
        bytes.extend(half(self.driver_features, self.driver_feature_select).to_le_bytes());
        bytes.extend(signals.config_vector().to_le_bytes());
        bytes.extend(u16::try_from(self.queues.len()).unwrap_or(0).to_le_bytes());
        bytes.extend([self.status | needs_reset, signals.generation()]);
        bytes.extend(self.queue_select.to_le_bytes());
        bytes.extend(queue.size.to_le_bytes());
        bytes.extend(signals.queue_vector(self.queue_select).to_le_bytes());
        bytes.extend(u16::from(queue.is_enabled).to_le_bytes());
        bytes.extend(notify_off.to_le_bytes());
        bytes.extend(queue.descriptors.to_le_bytes());
        bytes.extend(queue.available.to_le_bytes());
        bytes.extend(queue.used.to_le_bytes());
        // `queue_notify_data`, which is not offered, and `queue_reset`, which is over when it has been written.
        bytes.extend([0; 4]);
        bytes
    }

    /// Writes one register, at its own width; halves of those with 64 bits are registers too (virtio 1.2, 4.1.3.1).
    /// Other writes do nothing.
    pub(super) fn write(&mut self, offset: u64, data: &[u8], signals: &Signals) -> Effect {
        let mut value = [0; 8];
        for (to, from) in value.iter_mut().zip(data) {
            *to = *from;
        }
        let [low, low_high, ..] = value;
        let word = u16::from_le_bytes([low, low_high]);
        let long = u64::from_le_bytes(value);
        let [dword, _] = halves(long);
        match (offset, data.len()) {
            (0x00, 4) => self.device_feature_select = dword,
            (0x08, 4) => self.driver_feature_select = dword,
            (0x0c, 4) => self.set_driver_features(dword),
            (0x10, 2) => signals.set_config_vector(word),
            (0x14, 1) => return Effect::Status(low),
            (0x16, 2) => self.queue_select = word,
            (0x18, 2) => self.configure(|queue| queue.size = word),
            (0x1a, 2) => signals.set_queue_vector(self.queue_select, word),
            (0x1c, 2) if word == 1 => return Effect::Enable(self.queue_select),
            (0x20..0x38, 4 | 8) => self.set_address(offset, long, data.len()),
            (0x3a, 2) if word == 1 && self.driver_features & RING_RESET != 0 => {
                return Effect::Reset(self.queue_select);
            }
            _ => log::debug!(
                "a write of {} bytes at {offset:#x} does nothing",
                data.len()
            ),
        }
        Effect::None
    }

    /// Whether the driver has accepted features that go together, of those that are offered.
    pub(super) fn accepts_features(&self, offered: u64) -> bool {
        self.driver_features & !offered == 0 && self.driver_features & VERSION_1 != 0
    }

    /// Whether the driver is ready.
    pub(super) fn is_live(&self) -> bool {
        self.status & status::DRIVER_OK != 0
    }

    /// A queue as the driver has set it up. `None` if it is not enabled.
    pub(super) fn queue(&self, index: u16) -> Option<Result<Queue, Error>> {
        let queue = self.queues.get(usize::from(index))?;
        queue.is_enabled.then(|| {
            let event_idx = self.driver_features & EVENT_IDX != 0;
            Queue::try_from(queue.state(event_idx))
        })
    }

    /// Whether all queues that are enabled are in `memory`.
    pub(super) fn is_reachable(&self, memory: &GuestMemoryMmap<PageLog>) -> bool {
        let is_in = |(address, size, access): (u64, u64, Permissions)| {
            let size = usize::try_from(size).unwrap_or(usize::MAX);
            memory.check_range(GuestAddress(address), size, access)
        };
        let mut queues = self.queues.iter().filter(|queue| queue.is_enabled);
        queues.all(|queue| queue.areas().into_iter().all(is_in))
    }

    fn selected(&self) -> Option<&QueueRegisters> {
        self.queues.get(usize::from(self.queue_select))
    }

    fn set_driver_features(&mut self, value: u32) {
        if self.status & status::FEATURES_OK != 0 {
            return;
        }
        let [low, high] = halves(self.driver_features);
        self.driver_features = match self.driver_feature_select {
            0 => join(value, high),
            1 => join(low, value),
            _ => self.driver_features,
        };
    }

    fn set_address(&mut self, offset: u64, value: u64, size: usize) {
        self.configure(|queue| {
            let address = match offset & !7 {
                0x20 => &mut queue.descriptors,
                0x28 => &mut queue.available,
                _ => &mut queue.used,
            };
            let [low, high] = halves(*address);
            let [dword, _] = halves(value);
            *address = match (offset & 7, size) {
                (0, 8) => value,
                (0, _) => join(dword, high),
                (4, 4) => join(low, dword),
                _ => return,
            };
        });
    }

    /// Changes the queue that is selected, unless it is enabled.
    fn configure(&mut self, change: impl FnOnce(&mut QueueRegisters)) {
        let queue = self.queues.get_mut(usize::from(self.queue_select));
        if let Some(queue) = queue.filter(|queue| !queue.is_enabled) {
            change(queue);
        }
    }
}

impl QueueRegisters {
    pub(super) fn new(max_size: u16) -> Self {
        Self {
            max_size,
            size: max_size,
            ..Self::default()
        }
    }

    /// Where its parts are, their sizes in bytes, and how the device accesses them (virtio 1.2, 2.7).
    fn areas(&self) -> [(u64, u64, Permissions); 3] {
        let size = u64::from(self.size);
        [
            (self.descriptors, 16 * size, Permissions::Read),
            (self.available, 6 + 2 * size, Permissions::Read),
            (self.used, 6 + 8 * size, Permissions::Write),
        ]
    }

    pub(super) fn state(&self, event_idx_enabled: bool) -> QueueState {
        QueueState {
            max_size: self.max_size,
            next_avail: self.next_available,
            next_used: self.next_used,
            event_idx_enabled,
            size: self.size,
            ready: self.is_enabled,
            desc_table: self.descriptors,
            avail_ring: self.available,
            used_ring: self.used,
        }
    }
}

/// The 32 bits of a feature word that are selected.
fn half(features: u64, select: u32) -> u32 {
    let [low, high] = halves(features);
    match select {
        0 => low,
        1 => high,
        _ => 0,
    }
}

fn halves(value: u64) -> [u32; 2] {
    let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
    [[a, b, c, d], [e, f, g, h]].map(u32::from_le_bytes)
}

fn join(low: u32, high: u32) -> u64 {
    u64::from(high) << 32 | u64::from(low)
}

// The registers end where the capability says that they do.
const _: () = assert!(layout::COMMON.end == 0x3c);
