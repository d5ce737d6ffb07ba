//! The transport's state, as it migrates.

use super::common::{Common, QueueRegisters, status};
use super::signals::NO_VECTOR;

/// Version of the encoding. It is another whenever a field comes or goes.
const VERSION: u32 = 1;

/// Most bytes of a device's own state.
const MAX_DEVICE: usize = 64 << 10;

/// Most bytes that a state can have, with [`MAX_QUEUES`](super::MAX_QUEUES) queues.
pub(super) const MAX_STATE: usize = 128 << 10;

/// Why a device cannot have a state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Unfit {
    #[error(
        "the state that is to be taken over is of a device with {theirs} queues, and this one has {ours}"
    )]
    Queues { theirs: u16, ours: usize },
    #[error(
        "the state that is to be taken over is of a device whose driver has accepted features {0:#x}, which this one does not \
         offer"
    )]
    Features(u64),
    #[error("the state that is to be taken over is none that a device can have")]
    Impossible,
}

/// All that migrates.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct State {
    pub(super) common: Common,
    pub(super) isr: u8,
    pub(super) generation: u8,
    pub(super) needs_reset: bool,
    pub(super) config_vector: u16,
    pub(super) queue_vectors: Vec<u16>,
    pub(super) device: Vec<u8>,
}

impl State {
    pub(super) fn encode(&self) -> Vec<u8> {
        let Common {
            device_feature_select,
            driver_feature_select,
            driver_features,
            status,
            queue_select,
            queues,
        } = &self.common;
        let mut bytes = VERSION.to_le_bytes().to_vec();
        bytes.extend(device_feature_select.to_le_bytes());
        bytes.extend(driver_feature_select.to_le_bytes());
        bytes.extend(driver_features.to_le_bytes());
        bytes.extend([*status, self.isr, self.generation, self.needs_reset.into()]);
        bytes.extend(queue_select.to_le_bytes());
        bytes.extend(self.config_vector.to_le_bytes());
        bytes.extend(u16::try_from(queues.len()).unwrap_or(0).to_le_bytes());
        for (queue, vector) in queues.iter().zip(&self.queue_vectors) {
            bytes.extend(vector.to_le_bytes());
            bytes.extend(queue.size.to_le_bytes());
            bytes.extend(u16::from(queue.is_enabled).to_le_bytes());
            bytes.extend(queue.next_available.to_le_bytes());
            bytes.extend(queue.next_used.to_le_bytes());
            bytes.extend(queue.descriptors.to_le_bytes());
            bytes.extend(queue.available.to_le_bytes());
            bytes.extend(queue.used.to_le_bytes());
        }
        let length = u32::try_from(self.device.len()).unwrap_or(u32::MAX);
        bytes.extend(length.to_le_bytes());
        bytes.extend(&self.device);
        bytes
    }

    /// Parses the state of a device whose queues may have as many entries as those of `ours`, of which `features` may
    /// have been accepted.
    pub(super) fn decode(bytes: &[u8], ours: &Common, features: u64) -> Result<Self, Unfit> {
        let (theirs, state) = Self::parse(bytes, ours).ok_or(Unfit::Impossible)?;
        let Some(state) = state else {
            let ours = ours.queues.len();
            return Err(Unfit::Queues { theirs, ours });
        };
        let lacking = state.common.driver_features & !features;
        if state.has(status::FEATURES_OK) && lacking != 0 {
            return Err(Unfit::Features(lacking));
        }
        if !state.is_possible(features) {
            return Err(Unfit::Impossible);
        }
        Ok(state)
    }

    /// Returns how many queues there are, and all that there is if there are as many here. `None` if nothing is like that.
    fn parse(bytes: &[u8], ours: &Common) -> Option<(u16, Option<Self>)> {
        let mut bytes = Bytes(bytes);
        if bytes.u32()? != VERSION {
            return None;
        }
        let mut common = Common {
            device_feature_select: bytes.u32()?,
            driver_feature_select: bytes.u32()?,
            driver_features: bytes.u64()?,
            ..Common::default()
        };
        let [status, isr, generation, needs_reset] = bytes.take()?;
        common.status = status;
        common.queue_select = bytes.u16()?;
        let vectors = super::layout::vectors(u16::try_from(ours.queues.len()).ok()?);
        let is_vector = |vector: &u16| *vector == NO_VECTOR || *vector < vectors;
        let config_vector = Some(bytes.u16()?).filter(is_vector)?;
        let queues = bytes.u16()?;
        if usize::from(queues) != ours.queues.len() {
            return Some((queues, None));
        }
        let mut queue_vectors = Vec::new();
        for queue in &ours.queues {
            queue_vectors.push(Some(bytes.u16()?).filter(is_vector)?);
            common.queues.push(QueueRegisters {
                max_size: queue.max_size,
                size: bytes.u16()?,
                is_enabled: flag(bytes.u16()?)?,
                next_available: bytes.u16()?,
                next_used: bytes.u16()?,
                descriptors: bytes.u64()?,
                available: bytes.u64()?,
                used: bytes.u64()?,
            });
        }
        let length = usize::try_from(bytes.u32()?).ok()?;
        let Bytes(device) = bytes;
        let state = Self {
            common,
            isr,
            generation,
            needs_reset: flag(needs_reset.into())?,
            config_vector,
            queue_vectors,
            device: device.to_vec(),
        };
        let is_whole = device.len() == length && length <= MAX_DEVICE;
        is_whole.then_some((queues, Some(state)))
    }

    fn has(&self, status: u8) -> bool {
        self.common.status & status != 0
    }

    /// Whether the registers can have come to be like this.
    fn is_possible(&self, features: u64) -> bool {
        let common = &self.common;
        let has_features = self.has(status::FEATURES_OK);
        let mut queues = common.queues.iter().filter(|queue| queue.is_enabled);
        common.status & !status::DRIVERS == 0
            && (!has_features || common.accepts_features(features))
            && (has_features || !self.has(status::DRIVER_OK))
            && queues.all(|queue| virtio_queue::Queue::try_from(queue.state(false)).is_ok())
    }
}

/// What has not been parsed.
struct Bytes<'a>(&'a [u8]);

impl Bytes<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (bytes, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*bytes)
    }

    fn u16(&mut self) -> Option<u16> {
        self.take().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.take().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.take().map(u64::from_le_bytes)
    }
}

fn flag(value: u16) -> Option<bool> {
    match value {
        0 => Some(false),
        1 => Some(true),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ours() -> Common {
        Common::new(&[256, 64])
    }

    fn state() -> State {
        let mut common = ours();
        common.driver_features = 1 << 32 | 1 << 29;
        common.status = 0xf;
        common.queues[1] = QueueRegisters {
            max_size: 64,
            size: 32,
            is_enabled: true,
            descriptors: 0x1000,
            available: 0x2002,
            used: 0x3004,
            next_available: 0xffff,
            next_used: 7,
        };
        State {
            common,
            isr: 1,
            generation: 3,
            needs_reset: false,
            config_vector: 2,
            queue_vectors: vec![NO_VECTOR, 1],
            device: b"device".to_vec(),
        }
    }

    fn decode(state: &State) -> Result<State, Unfit> {
        State::decode(&state.encode(), &ours(), 1 << 32 | 1 << 29)
    }

    #[test]
    fn a_state_survives() {
        assert_eq!(decode(&state()), Ok(state()));
        assert!(state().encode().len() < MAX_STATE);
    }

    #[test]
    fn impossible_states_are_refused() {
        let changes: [fn(&mut State); 8] = [
            |state| state.common.driver_features = 1 << 29,
            |state| state.common.status = 0x4,
            |state| state.common.status |= status::NEEDS_RESET,
            |state| state.common.queues[1].size = 128,
            |state| state.common.queues[1].size = 33,
            |state| state.common.queues[1].used = 0x3002,
            |state| state.config_vector = 3,
            |state| state.queue_vectors[1] = 3,
        ];
        for (number, change) in changes.into_iter().enumerate() {
            let mut state = state();
            change(&mut state);
            assert_eq!(decode(&state), Err(Unfit::Impossible), "{number}");
        }
    }

    #[test]
    fn what_another_device_has_more_of_is_named() {
        let mut theirs = state();
        theirs.common.driver_features |= 1 << 3 | 1;
        assert_eq!(decode(&theirs), Err(Unfit::Features(9)));
        theirs.common.status = 0;
        theirs.common.queues.truncate(1);
        let unfit = Unfit::Queues { theirs: 1, ours: 2 };
        assert_eq!(decode(&theirs), Err(unfit));
        // Until it has said that this is all, the driver has accepted nothing.
        let mut theirs = state();
        theirs.common.driver_features |= 1;
        theirs.common.status = 3;
        assert_eq!(decode(&theirs), Ok(theirs));
    }

    #[test]
    fn damaged_states_are_refused() {
        let bytes = state().encode();
        let decode = |bytes: &[u8]| State::decode(bytes, &ours(), u64::MAX);
        for cut in 0..bytes.len() {
            assert_eq!(decode(&bytes[..cut]), Err(Unfit::Impossible), "{cut}");
        }
        let longer = decode(&[&bytes[..], &[0]].concat());
        assert_eq!(longer, Err(Unfit::Impossible));
    }
}
