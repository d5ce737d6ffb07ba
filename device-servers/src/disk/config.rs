//! The device's configuration (`struct virtio_blk_config`; virtio 1.2, 5.2.4), and its features.

use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY,
    VIRTIO_BLK_F_WRITE_ZEROES,
};

use super::image::{Geometry, SECTOR};

/// What the driver is told of the disk.
#[derive(Clone, Copy, Debug)]
pub(super) struct Config {
    /// Bytes in the image.
    pub(super) size: u64,
    pub(super) geometry: Geometry,
    pub(super) readonly: bool,
    pub(super) queues: u16,
    pub(super) queue_size: u16,
}

pub(super) const FLUSH: u64 = 1 << VIRTIO_BLK_F_FLUSH;
pub(super) const CONFIG_WCE: u64 = 1 << VIRTIO_BLK_F_CONFIG_WCE;

/// Where `writeback` is, in bytes.
pub(super) const WRITEBACK: u64 = 0x20;

/// Most sectors that are discarded by one extent: 1 GiB.
pub(super) const MAX_DISCARD: u32 = 1 << 21;
/// Most sectors that become zeroes by one extent: 64 MiB, which are written where nothing better is possible.
pub(super) const MAX_ZEROES: u32 = 1 << 17;
/// Most extents of one request.
pub(super) const MAX_EXTENTS: u32 = 32;

/// Whether what is written has to survive a loss of power before the driver hears of it: a driver that does not flush, or
/// has said that it does not, has no cache to be flushed (virtio 1.2, 5.2.5.2).
pub(super) fn writes_through(features: u64, writeback: bool) -> bool {
    features & FLUSH == 0 || (features & CONFIG_WCE != 0 && !writeback)
}

impl Config {
    pub(super) fn features(&self) -> u64 {
        let mut features = vec![
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_BLK_SIZE,
            VIRTIO_BLK_F_TOPOLOGY,
            VIRTIO_BLK_F_FLUSH,
            VIRTIO_BLK_F_CONFIG_WCE,
        ];
        if self.queues > 1 {
            features.push(VIRTIO_BLK_F_MQ);
        }
        if self.readonly {
            features.push(VIRTIO_BLK_F_RO);
        } else {
            features.extend([VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES]);
        }
        features.into_iter().map(|feature| 1 << feature).sum()
    }

    pub(super) fn bytes(&self, writeback: bool) -> Vec<u8> {
        let Geometry {
            block,
            physical_block,
            ..
        } = self.geometry;
        let blocks_per_physical = (physical_block / block).max(1).ilog2();
        let sectors_per_block = block / SECTOR;
        let mut bytes = Vec::with_capacity(60);
        bytes.extend((self.size / u64::from(SECTOR)).to_le_bytes());
        // `size_max`, which is not offered; `seg_max`, for a chain with a header and a status; `geometry`, which is not.
        bytes.extend([0; 4]);
        bytes.extend(u32::from(self.queue_size.saturating_sub(2)).to_le_bytes());
        bytes.extend([0; 4]);
        bytes.extend(block.to_le_bytes());
        // `physical_block_exp`, `alignment_offset`, `min_io_size` and `opt_io_size`, of which 0 is "not known".
        bytes.extend([blocks_per_physical.to_le_bytes()[0], 0]);
        bytes.extend([0; 6]);
        bytes.extend([u8::from(writeback), 0]);
        bytes.extend(self.queues.to_le_bytes());
        bytes.extend(MAX_DISCARD.to_le_bytes());
        bytes.extend(MAX_EXTENTS.to_le_bytes());
        bytes.extend(sectors_per_block.to_le_bytes());
        bytes.extend(MAX_ZEROES.to_le_bytes());
        bytes.extend(MAX_EXTENTS.to_le_bytes());
        // `write_zeroes_may_unmap`
        bytes.extend([1, 0, 0, 0]);
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_who_flushes_has_a_cache() {
        for (features, writeback, expected) in [
            (0, true, true),
            (CONFIG_WCE, true, true),
            (FLUSH, true, false),
            // Without the feature, it is none of the driver's business.
            (FLUSH, false, false),
            (FLUSH | CONFIG_WCE, true, false),
            (FLUSH | CONFIG_WCE, false, true),
        ] {
            let found = writes_through(features, writeback);
            assert_eq!(found, expected, "{features:#x} {writeback}");
        }
    }
}
