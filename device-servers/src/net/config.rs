//! The card's features and its configuration (virtio 1.2, 5.1.3 and 5.1.4).

use virtio_bindings::bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, VIRTIO_NET_F_CTRL_MAC_ADDR,
    VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6, VIRTIO_NET_F_HOST_ECN,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_USO, VIRTIO_NET_F_MAC,
    VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS,
    VIRTIO_NET_S_ANNOUNCE, VIRTIO_NET_S_LINK_UP,
};

use super::state::State;

/// What the driver is told of the card, and what does not change.
#[derive(Clone, Copy, Debug)]
pub(super) struct Config {
    /// Pairs of queues.
    pub(super) pairs: u16,
    /// Entries of each queue.
    pub(super) queue_size: u16,
    /// The longest packet without its Ethernet header, in bytes, if it is known.
    pub(super) mtu: Option<u16>,
    /// Whether the tap splits UDP packets, and gives the driver such as are to be split. The driver is offered both all the
    /// same.
    pub(super) has_uso: bool,
}

/// Bytes of what is before each packet: `struct virtio_net_hdr_v1` (virtio 1.2, 5.1.6).
pub(super) const HEADER: usize = 12;

/// Where `num_buffers` is in it.
pub(super) const NUM_BUFFERS: usize = 10;

/// Bytes of the longest packet: IPv6 has up to 65535 behind its header of 40. Before it are an Ethernet header with a
/// VLAN tag, and the header.
pub(super) const MAX_PACKET: usize = HEADER + 18 + 40 + 65535;

pub(super) const MERGEABLE: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;
pub(super) const MULTI_QUEUE: u64 = 1 << VIRTIO_NET_F_MQ;
pub(super) const CONTROL: u64 = 1 << VIRTIO_NET_F_CTRL_VQ;
pub(super) const CONTROL_MAC: u64 = 1 << VIRTIO_NET_F_CTRL_MAC_ADDR;
pub(super) const CONTROL_OFFLOADS: u64 = 1 << VIRTIO_NET_F_CTRL_GUEST_OFFLOADS;
pub(super) const ANNOUNCE: u64 = 1 << VIRTIO_NET_F_GUEST_ANNOUNCE;

const GUEST_CSUM: u64 = 1 << VIRTIO_NET_F_GUEST_CSUM;
const GUEST_TSO4: u64 = 1 << VIRTIO_NET_F_GUEST_TSO4;
const GUEST_TSO6: u64 = 1 << VIRTIO_NET_F_GUEST_TSO6;
const GUEST_ECN: u64 = 1 << VIRTIO_NET_F_GUEST_ECN;
const GUEST_USO: u64 = 1 << VIRTIO_NET_F_GUEST_USO4 | 1 << VIRTIO_NET_F_GUEST_USO6;

/// The features that the driver can switch off and on (virtio 1.2, 5.1.6.5.6).
pub(super) const GUEST_OFFLOADS: u64 = GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6 | GUEST_ECN | GUEST_USO;

impl Config {
    pub(super) fn features(&self) -> u64 {
        let mut features = vec![
            VIRTIO_NET_F_CSUM,
            VIRTIO_NET_F_GUEST_CSUM,
            VIRTIO_NET_F_CTRL_GUEST_OFFLOADS,
            VIRTIO_NET_F_MAC,
            VIRTIO_NET_F_GUEST_TSO4,
            VIRTIO_NET_F_GUEST_TSO6,
            VIRTIO_NET_F_GUEST_ECN,
            VIRTIO_NET_F_GUEST_USO4,
            VIRTIO_NET_F_GUEST_USO6,
            VIRTIO_NET_F_HOST_TSO4,
            VIRTIO_NET_F_HOST_TSO6,
            VIRTIO_NET_F_HOST_ECN,
            VIRTIO_NET_F_HOST_USO,
            VIRTIO_NET_F_MRG_RXBUF,
            VIRTIO_NET_F_STATUS,
            VIRTIO_NET_F_CTRL_VQ,
            VIRTIO_NET_F_GUEST_ANNOUNCE,
            VIRTIO_NET_F_CTRL_MAC_ADDR,
        ];
        if self.mtu.is_some() {
            features.push(VIRTIO_NET_F_MTU);
        }
        if self.pairs > 1 {
            features.push(VIRTIO_NET_F_MQ);
        }
        features.into_iter().map(|feature| 1 << feature).sum()
    }

    /// How many pairs the driver knows of, if it has accepted these features. The control queue is behind them (virtio
    /// 1.2, 5.1.2).
    pub(super) fn known_pairs(&self, features: u64) -> u16 {
        if features & MULTI_QUEUE == 0 {
            1
        } else {
            self.pairs
        }
    }

    /// `struct virtio_net_config`, up to `mtu`.
    pub(super) fn bytes(&self, state: &State) -> Vec<u8> {
        let [link_up, announce] = [
            u16::from(state.is_link_up) << VIRTIO_NET_S_LINK_UP.ilog2(),
            u16::from(state.announces) << VIRTIO_NET_S_ANNOUNCE.ilog2(),
        ];
        let mut bytes = state.mac.bytes().to_vec();
        bytes.extend((link_up | announce).to_le_bytes());
        bytes.extend(self.pairs.to_le_bytes());
        bytes.extend(self.mtu.unwrap_or(0).to_le_bytes());
        bytes
    }
}

/// What a tap, which may know of packets of UDP to be split, is to be told (`TUN_F_*` of `linux/if_tun.h`) if the driver
/// takes these features: those that depend on others count only with them (virtio 1.2, 5.1.3.1).
pub(super) fn tap_offload(features: u64, has_uso: bool) -> u32 {
    let has = |feature: u64, flag: u32| {
        if features & feature == feature {
            flag
        } else {
            0
        }
    };
    if features & GUEST_CSUM == 0 {
        return 0;
    }
    let tso = has(GUEST_TSO4, libc::TUN_F_TSO4) | has(GUEST_TSO6, libc::TUN_F_TSO6);
    let ecn = if tso == 0 {
        0
    } else {
        has(GUEST_ECN, libc::TUN_F_TSO_ECN)
    };
    let uso = if has_uso { has(GUEST_USO, USO) } else { 0 };
    libc::TUN_F_CSUM | tso | ecn | uso
}

/// Those for UDP, which the kernel takes together.
pub(super) const USO: u32 = libc::TUN_F_USO4 | libc::TUN_F_USO6;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn taps_are_told_what_they_take() {
        use libc::{TUN_F_CSUM, TUN_F_TSO_ECN, TUN_F_TSO4, TUN_F_TSO6};
        let all = TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN | USO;
        for (features, offload) in [
            (0, 0),
            (u64::MAX, all),
            (GUEST_OFFLOADS & !GUEST_CSUM, 0),
            (GUEST_CSUM | GUEST_ECN, TUN_F_CSUM),
            (
                GUEST_CSUM | GUEST_TSO6 | GUEST_ECN,
                TUN_F_CSUM | TUN_F_TSO6 | TUN_F_TSO_ECN,
            ),
            (GUEST_CSUM | 1 << VIRTIO_NET_F_GUEST_USO4, TUN_F_CSUM),
        ] {
            assert_eq!(tap_offload(features, true), offload, "{features:#x}");
            assert_eq!(
                tap_offload(features, false),
                offload & !USO,
                "{features:#x}"
            );
        }
    }
}
