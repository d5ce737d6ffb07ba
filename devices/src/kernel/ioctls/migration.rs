//! The ioctls of a device's migration: features (`VFIO_DEVICE_FEATURE`), and what its data tells of itself.
#![expect(unsafe_code, reason = "an ioctl takes an address")]

use std::io;
use std::ops::Range;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd};

use libc::c_int;
use vfio_bindings::bindings::vfio::{
    VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT, VFIO_DEVICE_FEATURE_DMA_LOGGING_START,
    VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP, VFIO_DEVICE_FEATURE_GET,
    VFIO_DEVICE_FEATURE_MIG_DATA_SIZE, VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE,
    VFIO_DEVICE_FEATURE_MIGRATION, VFIO_DEVICE_FEATURE_SET, vfio_precopy_info,
};

use super::{call, size, with_struct};

/// `VFIO_DEVICE_FEATURE_MIGRATION`: its flags.
pub(in crate::kernel) fn migration_flags(device: BorrowedFd<'_>) -> io::Result<u64> {
    let feature = VFIO_DEVICE_FEATURE_GET | VFIO_DEVICE_FEATURE_MIGRATION;
    // SAFETY: the feature is a number.
    let [flags] = unsafe { self::feature(device, feature, [0]) }?;
    Ok(flags)
}

/// `VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE`: the device's state.
pub(in crate::kernel) fn device_state(device: BorrowedFd<'_>) -> io::Result<u32> {
    let feature = VFIO_DEVICE_FEATURE_GET | VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE;
    // SAFETY: the feature is two numbers.
    let [answer] = unsafe { self::feature(device, feature, [0]) }?;
    let [state, _] = halves(answer);
    Ok(state)
}

/// The same, set. If that begins to read or to write the device's data, returns the data as a file.
pub(in crate::kernel) fn set_device_state(
    device: BorrowedFd<'_>,
    state: u32,
) -> io::Result<Option<OwnedFd>> {
    let feature = VFIO_DEVICE_FEATURE_SET | VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE;
    let no_file = u64::from((-1_i32).cast_unsigned()) << 32;
    // SAFETY: the feature is two numbers.
    let [answer] = unsafe { self::feature(device, feature, [u64::from(state) | no_file]) }?;
    let [_, fd] = halves(answer);
    let fd: c_int = fd.cast_signed();
    // SAFETY: the kernel has just made the descriptor, for us alone.
    Ok((fd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(fd) }))
}

/// `VFIO_DEVICE_FEATURE_MIG_DATA_SIZE`: about how many bytes of data a device that was stopped now would have.
pub(in crate::kernel) fn stop_copy_size(device: BorrowedFd<'_>) -> io::Result<u64> {
    let feature = VFIO_DEVICE_FEATURE_GET | VFIO_DEVICE_FEATURE_MIG_DATA_SIZE;
    // SAFETY: the feature is a number.
    let [size] = unsafe { self::feature(device, feature, [0]) }?;
    Ok(size)
}

/// `VFIO_MIG_GET_PRECOPY_INFO`, of a device's data: how many bytes are left of what it said first, and of what it has
/// changed since.
pub(in crate::kernel) fn precopy_info(data: BorrowedFd<'_>) -> io::Result<[u64; 2]> {
    let mut info = vfio_precopy_info {
        argsz: size::<vfio_precopy_info>(),
        ..Default::default()
    };
    with_struct(data, 21, &mut info)?;
    Ok([info.initial_bytes, info.dirty_bytes])
}

/// `VFIO_DEVICE_FEATURE_DMA_LOGGING_START`: the page size in bytes that the device logs by.
pub(in crate::kernel) fn start_dma_logging(
    device: BorrowedFd<'_>,
    page_size: u64,
    ranges: &[Range<u64>],
) -> io::Result<u64> {
    let count = u32::try_from(ranges.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let ranges: Vec<_> = ranges
        .iter()
        .map(|range| [range.start, range.end.saturating_sub(range.start)])
        .collect();
    let feature = VFIO_DEVICE_FEATURE_SET | VFIO_DEVICE_FEATURE_DMA_LOGGING_START;
    let data = [page_size, count.into(), ranges.as_ptr() as u64];
    // SAFETY: the kernel reads as many pairs of numbers from the address as the number before it says: all there are.
    let [page_size, ..] = unsafe { self::feature(device, feature, data) }?;
    Ok(page_size)
}

/// `VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP`.
pub(in crate::kernel) fn stop_dma_logging(device: BorrowedFd<'_>) -> io::Result<()> {
    let feature = VFIO_DEVICE_FEATURE_SET | VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP;
    // SAFETY: the feature has no data.
    unsafe { self::feature(device, feature, []) }.map(drop)
}

/// `VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT`: a bit for each page of a range, of so many bytes each, that was written
/// since the last time.
pub(in crate::kernel) fn dma_log(
    device: BorrowedFd<'_>,
    range: &Range<u64>,
    page_size: u64,
) -> io::Result<Vec<u64>> {
    let length = range.end.saturating_sub(range.start);
    let pages = length
        .checked_next_multiple_of(page_size)
        .and_then(|length| length.checked_div(page_size))
        .ok_or(io::ErrorKind::InvalidInput)?;
    let words = usize::try_from(pages.div_ceil(64)).map_err(|_| io::ErrorKind::InvalidInput)?;
    let mut bitmap = vec![0_u64; words];
    let feature = VFIO_DEVICE_FEATURE_GET | VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT;
    let data = [range.start, length, page_size, bitmap.as_mut_ptr() as u64];
    // SAFETY: the kernel sets a bit for each page at the address, where there is room for whole words of them.
    unsafe { self::feature(device, feature, data) }?;
    Ok(bitmap)
}

/// `VFIO_DEVICE_FEATURE`: gets or sets a feature, whose data `data` is and becomes.
///
/// # Safety
/// Where the feature has an address in its data, there must be as much memory as it reads or writes there.
unsafe fn feature<const WORDS: usize>(
    device: BorrowedFd<'_>,
    flags: u32,
    data: [u64; WORDS],
) -> io::Result<[u64; WORDS]> {
    #[repr(C)]
    struct Feature<const WORDS: usize> {
        argsz: u32,
        flags: u32,
        data: [u64; WORDS],
    }
    let mut feature = Feature {
        argsz: size::<Feature<WORDS>>(),
        flags,
        data,
    };
    let argument = std::ptr::from_mut(&mut feature).cast();
    // SAFETY: the struct is as long as it says. The caller answers for what it points to.
    unsafe { call(device, 17, argument) }?;
    Ok(feature.data)
}

/// The lower and the upper half, as the two fields of a struct.
fn halves(word: u64) -> [u32; 2] {
    let [a, b, c, d, e, f, g, h] = word.to_ne_bytes();
    [[a, b, c, d], [e, f, g, h]].map(u32::from_ne_bytes)
}
