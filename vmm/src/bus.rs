//! The machine's two address spaces: which device answers at which address or port.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::sync::{Arc, PoisonError, RwLock};

use devices::BusDevice;

/// A range that cannot be put on the bus.
#[derive(Debug, thiserror::Error)]
#[error("{0:#x?} overlaps what is there already")]
pub(crate) struct Overlap(RangeInclusive<u64>);

/// One address space. The lock is held for the look-up alone, and a device is called without it.
#[derive(Debug, Default)]
pub(crate) struct Bus {
    /// What there is, by its first address.
    ranges: RwLock<BTreeMap<u64, Place>>,
}

/// A device, and the last address that it answers at.
#[derive(Debug)]
struct Place {
    last: u64,
    device: Arc<dyn BusDevice>,
}

impl Bus {
    /// Has `device` answer at `range`.
    pub(crate) fn insert(
        &self,
        range: RangeInclusive<u64>,
        device: Arc<dyn BusDevice>,
    ) -> Result<(), Overlap> {
        let mut ranges = self.ranges.write().unwrap_or_else(PoisonError::into_inner);
        let below = ranges.range(..=*range.end()).next_back();
        if below.is_some_and(|(_, place)| place.last >= *range.start()) {
            return Err(Overlap(range));
        }
        ranges.insert(
            *range.start(),
            Place {
                last: *range.end(),
                device,
            },
        );
        Ok(())
    }

    /// Takes the device that starts at `start` off the bus.
    pub(crate) fn remove(&self, start: u64) {
        self.ranges
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&start);
    }

    /// Reads; where nothing answers, or not to all of it, all-ones.
    pub(crate) fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address, data.len()) {
            Some((offset, device)) => device.read(offset, data),
            None => {
                log::trace!(
                    "read of {} bytes at {address:#x}: nothing there",
                    data.len()
                );
                data.fill(0xff);
            }
        }
    }

    /// Writes; where nothing answers, or not to all of it, nothing happens.
    pub(crate) fn write(&self, address: u64, data: &[u8]) {
        match self.find(address, data.len()) {
            Some((offset, device)) => device.write(offset, data),
            None => log::trace!("write of {data:x?} at {address:#x}: nothing there"),
        }
    }

    fn find(&self, address: u64, length: usize) -> Option<(u64, Arc<dyn BusDevice>)> {
        let last = address.checked_add(u64::try_from(length).ok()?.checked_sub(1)?)?;
        let ranges = self.ranges.read().unwrap_or_else(PoisonError::into_inner);
        let (start, place) = ranges.range(..=address).next_back()?;
        (last <= place.last).then(|| (address - start, place.device.clone()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Offset;

    impl BusDevice for Offset {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(u8::try_from(offset).unwrap());
        }

        fn write(&self, _: u64, _: &[u8]) {}
    }

    fn read(bus: &Bus, address: u64, length: usize) -> Vec<u8> {
        let mut data = vec![0; length];
        bus.read(address, &mut data);
        data
    }

    #[test]
    fn access_reaches_the_device_it_is_wholly_within() {
        let bus = Bus::default();
        bus.insert(0x10..=0x1f, Arc::new(Offset)).unwrap();
        bus.insert(0x20..=0x2f, Arc::new(Offset)).unwrap();
        assert_eq!(read(&bus, 0x10, 1), [0]);
        assert_eq!(read(&bus, 0x1c, 4), [0xc; 4]);
        assert_eq!(read(&bus, 0x24, 2), [4; 2]);
        assert_eq!(read(&bus, 0x1e, 4), [0xff; 4], "straddles two devices");
        assert_eq!(read(&bus, 0x0f, 2), [0xff; 2]);
        assert_eq!(read(&bus, 0x30, 1), [0xff]);
        assert_eq!(read(&bus, u64::MAX, 2), [0xff; 2]);
        bus.remove(0x10);
        assert_eq!(read(&bus, 0x10, 1), [0xff]);
    }

    #[test]
    fn overlapping_ranges_are_refused() {
        let bus = Bus::default();
        bus.insert(0x10..=0x1f, Arc::new(Offset)).unwrap();
        for range in [0x10..=0x10, 0x1f..=0x20, 0..=0x10, 0..=0xff, 0x18..=0x19] {
            assert!(
                bus.insert(range.clone(), Arc::new(Offset)).is_err(),
                "{range:x?}"
            );
        }
        bus.insert(0..=0xf, Arc::new(Offset)).unwrap();
        bus.insert(u64::MAX..=u64::MAX, Arc::new(Offset)).unwrap();
    }
}
