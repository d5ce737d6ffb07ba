//! The device: its state, and what becomes of it when it stops, migrates and starts.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::{EventfdFlags, eventfd};

use super::announce::ANNOUNCEMENTS;
use super::config::{ANNOUNCE, CONTROL, Config, GUEST_OFFLOADS, tap_offload};
use super::control::Control;
use super::error::NetError;
use super::link::LinkWatch;
use super::mac::MacAddress;
use super::pair::Pair;
use super::state::State;
use super::tap::Tap;
use crate::virtio::{Activation, Identity, VirtQueue, VirtioDevice, Worker};

/// A virtio network card. Its module says what it does.
#[derive(Debug)]
pub struct Net {
    shared: Arc<Shared>,
    /// The address that it has until the driver sets another.
    mac: MacAddress,
    pairs: Vec<Worker>,
    control: Worker,
    /// Whether it has come from another host and did not run here yet.
    has_arrived: bool,
}

/// What the threads of the card share.
#[derive(Debug)]
pub(super) struct Shared {
    /// One for each pair of queues.
    pub(super) taps: Vec<Tap>,
    /// What is signalled to each pair when it may be used otherwise than before.
    pub(super) changed: Vec<OwnedFd>,
    pub(super) config: Config,
    state: Mutex<State>,
}

/// Type of a network card (virtio 1.2, 5.1.1), and its class: network, Ethernet.
const IDENTITY: Identity = Identity {
    kind: 1,
    class: 0x02_00_00,
};

impl Net {
    /// Makes the threads of the card.
    pub(super) fn new(
        taps: Vec<Tap>,
        link: Option<LinkWatch>,
        config: Config,
        mac: MacAddress,
    ) -> Result<Self, NetError> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let changed = taps.iter().map(|_| eventfd(0, flags));
        let shared = Arc::new(Shared {
            changed: changed.collect::<Result<_, _>>().map_err(io::Error::from)?,
            taps,
            config,
            state: Mutex::new(State::new(mac, link.as_ref().is_none_or(is_up))),
        });
        let pair = |number| {
            let shared = Arc::clone(&shared);
            let make = move || Ok::<_, NetError>(Pair::new(shared, number));
            Worker::spawn(&format!("net-{number}"), make)
        };
        let pairs = (0..config.pairs).map(pair).collect::<Result<_, _>>()?;
        let its_shared = Arc::clone(&shared);
        let make = move || Ok::<_, NetError>(Control::new(its_shared, link));
        let control = Worker::spawn("net-control", make)?;
        shared.use_taps(1)?;
        Ok(Self {
            shared,
            mac,
            pairs,
            control,
            has_arrived: false,
        })
    }

    /// Gives the workers their queues.
    fn start_workers(&mut self, activation: Activation) -> io::Result<()> {
        let Activation {
            features,
            queues,
            config,
        } = activation;
        let known = self.shared.config.known_pairs(features);
        let mut of_pairs: Vec<Vec<_>> = self.pairs.iter().map(|_| Vec::new()).collect();
        let mut of_control = Vec::new();
        for queue in queues {
            let pair = queue.index() / 2;
            if pair < known {
                if let Some(queues) = of_pairs.get_mut(usize::from(pair)) {
                    queues.push(queue);
                }
            } else if queue.index() == 2 * known && features & CONTROL != 0 {
                of_control.push(queue);
            }
        }
        let order = |queues| Activation {
            features,
            queues,
            config: config.clone(),
        };
        for (worker, queues) in self.pairs.iter_mut().zip(of_pairs) {
            worker.start(order(queues))?;
        }
        self.control.start(order(of_control))
    }
}

impl VirtioDevice for Net {
    fn identity(&self) -> Identity {
        IDENTITY
    }

    fn features(&self) -> u64 {
        self.shared.config.features()
    }

    fn queue_sizes(&self) -> Vec<u16> {
        let Config {
            pairs, queue_size, ..
        } = self.shared.config;
        vec![queue_size; 2 * usize::from(pairs) + 1]
    }

    fn config(&self) -> Vec<u8> {
        self.shared.config.bytes(&self.shared.state())
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {
        // Nothing of it is the driver's to write (virtio 1.2, 5.1.4).
    }

    fn activate(&mut self, activation: Activation) -> io::Result<()> {
        let features = activation.features;
        self.shared.begin(features)?;
        if std::mem::take(&mut self.has_arrived) {
            self.shared.arrive(features);
        }
        self.start_workers(activation).inspect_err(|_| {
            self.deactivate();
        })
    }

    fn deactivate(&mut self) -> Vec<VirtQueue> {
        let workers = || self.pairs.iter().chain([&self.control]);
        workers().for_each(Worker::request_stop);
        let workers = self.pairs.iter_mut().chain([&mut self.control]);
        workers.flat_map(Worker::stop).collect()
    }

    fn reset(&mut self) {
        self.has_arrived = false;
        self.shared.reset(self.mac);
    }

    fn stop(&mut self) -> io::Result<()> {
        // Only the workers do anything, and they have stopped.
        Ok(())
    }

    fn start(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn migrates(&self) -> bool {
        true
    }

    fn save(&self) -> Vec<u8> {
        self.shared.state().encode(&self.shared.config)
    }

    fn saved(&mut self) {}

    fn restore(&mut self, state: &[u8]) -> io::Result<()> {
        let mut ours = self.shared.state();
        let theirs = State::decode(state, &self.shared.config, ours.is_link_up);
        *ours = theirs.inspect_err(|error| log::warn!("the network card: {error}"))?;
        self.has_arrived = true;
        Ok(())
    }
}

impl Shared {
    /// Whether the driver uses a pair of queues.
    pub(super) fn is_used(&self, pair: u16) -> bool {
        pair < self.state().pairs
    }

    /// Whether the driver is to announce itself.
    pub(super) fn is_to_announce(&self) -> bool {
        self.state().announces
    }

    /// How many announcements there are to be, and of what address.
    pub(super) fn announcements(&self) -> (u8, MacAddress) {
        let state = self.state();
        (state.announcements, state.mac)
    }

    /// There is one announcement less to be.
    pub(super) fn announced(&self) {
        let mut state = self.state();
        state.announcements = state.announcements.saturating_sub(1);
    }

    /// The tap is up or down. Returns whether it was otherwise before.
    pub(super) fn set_link(&self, is_up: bool) -> bool {
        let before = std::mem::replace(&mut self.state().is_link_up, is_up);
        if before != is_up {
            // A tap that came back has to be looked at again.
            self.signal();
        }
        before != is_up
    }

    pub(super) fn set_mac(&self, mac: MacAddress) -> bool {
        self.state().mac = mac;
        true
    }

    /// The driver will announce itself.
    pub(super) fn driver_announces(&self) -> bool {
        self.state().announces = false;
        true
    }

    /// The driver uses so many pairs from now on. Returns whether it can.
    pub(super) fn use_pairs(&self, pairs: u16, features: u64) -> bool {
        let known = self.config.known_pairs(features);
        let is_possible = known > 1 && (1..=known).contains(&pairs);
        if !is_possible || self.use_taps(pairs).is_err() {
            return false;
        }
        self.state().pairs = pairs;
        self.signal();
        true
    }

    /// The driver takes these offloads from now on. Returns whether it can.
    pub(super) fn set_offloads(&self, offloads: u64) -> bool {
        let is_done = self.offload(offloads).is_ok();
        if is_done {
            self.state().offloads = Some(offloads);
        }
        is_done
    }

    /// The driver is ready, and has accepted these features.
    fn begin(&self, features: u64) -> io::Result<()> {
        let (offloads, pairs) = {
            let mut state = self.state();
            let is_new = state.offloads.is_none();
            let offloads = state.offloads.unwrap_or(u64::MAX) & features & GUEST_OFFLOADS;
            state.offloads = Some(offloads);
            state.pairs = state.pairs.min(self.config.known_pairs(features));
            if is_new {
                // What came for the driver before may be of a kind that this one does not take.
                self.taps.iter().for_each(Tap::drain);
            }
            (offloads, state.pairs)
        };
        self.offload(offloads)?;
        self.use_taps(pairs)
    }

    /// The card has come from another host.
    fn arrive(&self, features: u64) {
        let mut state = self.state();
        state.announces = features & ANNOUNCE != 0 && features & CONTROL != 0;
        state.announcements = ANNOUNCEMENTS;
    }

    fn reset(&self, mac: MacAddress) {
        let mut state = self.state();
        *state = State::new(mac, state.is_link_up);
    }

    /// Has the tap give packets to the first queues only.
    fn use_taps(&self, pairs: u16) -> io::Result<()> {
        for (number, tap) in (0..).zip(&self.taps).skip(1) {
            tap.attach(number < pairs).inspect_err(|error| {
                log::warn!("cannot change which queues of the tap are used: {error}");
            })?;
        }
        Ok(())
    }

    fn offload(&self, offloads: u64) -> io::Result<()> {
        let Some(tap) = self.taps.first() else {
            return Ok(());
        };
        let result = tap.set_offload(tap_offload(offloads, self.config.has_uso));
        result.inspect_err(|error| log::warn!("the tap does not take offloads: {error}"))
    }

    /// Has all pairs see how they are used.
    fn signal(&self) {
        for event in &self.changed {
            // It can fail only if the counter is full, and then it is readable too.
            let _ = rustix::io::write(event, &1_u64.to_ne_bytes());
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn is_up(link: &LinkWatch) -> bool {
    // It is taken to be up as long as the kernel does not say otherwise.
    link.ask().is_err() || link.read().unwrap_or(true)
}
