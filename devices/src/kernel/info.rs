//! What the kernel says of regions and IOMMUs: structs with chains of capabilities behind them.

use std::ops::RangeInclusive;

use vfio_bindings::bindings::vfio::{
    VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE, VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL,
    VFIO_REGION_INFO_CAP_SPARSE_MMAP,
};

/// A `struct vfio_region_info` and its capabilities.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct RegionDescription {
    pub(super) flags: u32,
    pub(super) size: u64,
    /// Where the region is in the device's file, in bytes.
    pub(super) offset: u64,
    /// What of it can be mapped, if that is not all: offsets and sizes.
    pub(super) sparse: Option<Vec<(u64, u64)>>,
}

impl RegionDescription {
    pub(super) fn parse(bytes: &[u8]) -> Self {
        let area = |at| Some((word64(bytes, at)?, word64(bytes, at + 8)?));
        let sparse = capability(bytes, 12, VFIO_REGION_INFO_CAP_SPARSE_MMAP).map(|start| {
            let count = word32(bytes, start + 8).unwrap_or(0) as usize;
            (0..count)
                .map_while(|index| area(start + 16 + 16 * index))
                .collect()
        });
        Self {
            flags: word32(bytes, 4).unwrap_or(0),
            size: word64(bytes, 16).unwrap_or(0),
            offset: word64(bytes, 24).unwrap_or(0),
            sparse,
        }
    }
}

/// What follows from a `struct vfio_iommu_type1_info` and its capabilities.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Type1Info {
    /// The addresses that devices can be given; none if the kernel does not say.
    pub(super) ranges: Vec<RangeInclusive<u64>>,
    /// How many more mappings the container takes, if the kernel says.
    pub(super) available: Option<u32>,
}

impl Type1Info {
    pub(super) fn parse(bytes: &[u8]) -> Self {
        let range = |at| Some(word64(bytes, at)?..=word64(bytes, at + 8)?);
        let ranges = capability(bytes, 16, VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE).map(|start| {
            let count = word32(bytes, start + 8).unwrap_or(0) as usize;
            (0..count)
                .map_while(|index| range(start + 16 + 16 * index))
                .collect()
        });
        let available = capability(bytes, 16, VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL);
        Self {
            ranges: ranges.unwrap_or_default(),
            available: available.and_then(|start| word32(bytes, start + 8)),
        }
    }
}

/// Where the capability with this id starts, by a `struct vfio_info_cap_header`: id and version, 16 bits each, and the
/// offset of the next. `head` is where the offset of the first is.
fn capability(bytes: &[u8], head: usize, id: u32) -> Option<usize> {
    let mut start = word32(bytes, head)? as usize;
    // A chain cannot have more links than bytes; one that goes round in circles ends, too.
    for _ in 0..bytes.len() {
        if start == 0 {
            return None;
        }
        if word32(bytes, start)? & 0xffff == id {
            return Some(start);
        }
        start = word32(bytes, start + 4)? as usize;
    }
    None
}

fn word32(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_ne_bytes(bytes.try_into().ok()?))
}

fn word64(bytes: &[u8], at: usize) -> Option<u64> {
    let bytes = bytes.get(at..at.checked_add(8)?)?;
    Some(u64::from_ne_bytes(bytes.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(words: &[u32]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_ne_bytes()).collect()
    }

    #[test]
    fn sparse_areas_are_found_behind_other_capabilities() {
        let region = bytes(&[
            // argsz, flags, index, cap_offset, size, offset
            80,
            0xf,
            2,
            32,
            0x4000,
            0,
            0x5000,
            2,
            // MSI-X is mappable; next at 40
            1 << 16 | 3,
            40,
            // sparse, the last; one area
            1 << 16 | 1,
            0,
            1,
            0,
            0x1000,
            0,
            0x2000,
            0,
        ]);
        assert_eq!(
            RegionDescription::parse(&region),
            RegionDescription {
                flags: 0xf,
                size: 0x4000,
                offset: 0x2_0000_5000,
                sparse: Some(vec![(0x1000, 0x2000)]),
            }
        );
        let plain = &region[..32];
        assert_eq!(RegionDescription::parse(plain).sparse, None);
    }

    #[test]
    fn iommu_tells_its_ranges() {
        let info = bytes(&[
            // argsz, flags, iova_pgsizes, cap_offset, pad
            88,
            3,
            0x1000,
            0,
            24,
            0,
            // mappings that are left; next at 40
            1 << 16 | 3,
            36,
            65535,
            // ranges
            1 << 16 | 1,
            0,
            2,
            0,
            0,
            0,
            0xfedf_ffff,
            0,
            0xfef0_0000,
            0,
            0xffff_ffff,
            0x7f,
        ]);
        let info = Type1Info::parse(&info);
        assert_eq!(info.available, Some(65535));
        assert_eq!(info.ranges, [0..=0xfedf_ffff, 0xfef0_0000..=0x7f_ffff_ffff]);
    }

    #[test]
    fn endless_chain_ends() {
        let info = bytes(&[40, 3, 0, 0, 24, 0, 1 << 16 | 9, 24, 0, 0]);
        assert_eq!(Type1Info::parse(&info).available, None);
    }
}
