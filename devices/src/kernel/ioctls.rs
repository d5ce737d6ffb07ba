//! The ioctls of VFIO's containers, groups and devices (linux/vfio.h), each as a safe function.
//!
//! vfio-ioctls has most of them, but in types that own the descriptors, take one device for a whole group, and keep
//! errors to themselves.
#![expect(unsafe_code, reason = "an ioctl takes an address")]

mod migration;

use std::ffi::CStr;
use std::io;
use std::ops::RangeInclusive;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr;

use iommufd_bindings::iommufd::{IOMMUFD_CMD_IOAS_IOVA_RANGES, iommu_ioas_iova_ranges};
use libc::{c_int, c_ulong};
use vfio_bindings::bindings::vfio::{
    VFIO_BASE, VFIO_IRQ_SET_DATA_EVENTFD, VFIO_IRQ_SET_DATA_NONE, VFIO_TYPE,
    vfio_device_attach_iommufd_pt, vfio_device_bind_iommufd, vfio_device_info, vfio_group_status,
    vfio_iommu_type1_dma_map, vfio_iommu_type1_dma_unmap, vfio_irq_info,
};

pub(super) use self::migration::{
    device_state, dma_log, migration_flags, precopy_info, set_device_state, start_dma_logging,
    stop_copy_size, stop_dma_logging,
};

/// `VFIO_GET_API_VERSION`.
pub(super) fn api_version(container: BorrowedFd<'_>) -> io::Result<c_int> {
    with_value(container, 0, 0)
}

/// `VFIO_CHECK_EXTENSION`: whether the container knows this kind of IOMMU.
pub(super) fn has_extension(container: BorrowedFd<'_>, extension: u32) -> io::Result<bool> {
    Ok(with_value(container, 1, extension)? > 0)
}

/// `VFIO_SET_IOMMU`.
pub(super) fn set_iommu(container: BorrowedFd<'_>, kind: u32) -> io::Result<()> {
    with_value(container, 2, kind).map(drop)
}

/// `VFIO_GROUP_GET_STATUS`: its flags.
pub(super) fn group_flags(group: BorrowedFd<'_>) -> io::Result<u32> {
    let mut status = vfio_group_status {
        argsz: size::<vfio_group_status>(),
        flags: 0,
    };
    with_struct(group, 3, &mut status)?;
    Ok(status.flags)
}

/// `VFIO_GROUP_SET_CONTAINER`.
pub(super) fn set_container(group: BorrowedFd<'_>, container: BorrowedFd<'_>) -> io::Result<()> {
    with_struct(group, 4, &mut container.as_raw_fd()).map(drop)
}

/// `VFIO_GROUP_UNSET_CONTAINER`.
pub(super) fn unset_container(group: BorrowedFd<'_>) -> io::Result<()> {
    with_value(group, 5, 0).map(drop)
}

/// `VFIO_GROUP_GET_DEVICE_FD`.
pub(super) fn device(group: BorrowedFd<'_>, name: &CStr) -> io::Result<OwnedFd> {
    // SAFETY: the kernel reads a string that ends in a NUL.
    let fd = unsafe { call(group, 6, name.as_ptr().cast_mut().cast()) }?;
    // SAFETY: the kernel has just made the descriptor, for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// `VFIO_DEVICE_GET_INFO`: its flags.
pub(super) fn device_flags(device: BorrowedFd<'_>) -> io::Result<u32> {
    let mut info = vfio_device_info {
        argsz: size::<vfio_device_info>(),
        ..Default::default()
    };
    with_struct(device, 7, &mut info)?;
    Ok(info.flags)
}

/// `VFIO_DEVICE_GET_REGION_INFO`: a `struct vfio_region_info` and its capabilities.
pub(super) fn region_info(device: BorrowedFd<'_>, index: u32) -> io::Result<Vec<u8>> {
    growing(device, 8, 32, |words| {
        // Behind `argsz` and `flags`; `cap_offset`, the other half of the word, is the kernel's.
        if let Some(word) = words.get_mut(1) {
            *word = index.into();
        }
    })
}

/// `VFIO_DEVICE_GET_IRQ_INFO`.
pub(super) fn irq_info(device: BorrowedFd<'_>, index: u32) -> io::Result<vfio_irq_info> {
    let mut info = vfio_irq_info {
        argsz: size::<vfio_irq_info>(),
        flags: 0,
        index,
        count: 0,
    };
    with_struct(device, 9, &mut info)?;
    Ok(info)
}

/// `VFIO_DEVICE_SET_IRQS` without data, for `count` interrupts; with none and the action "trigger", it disables them.
pub(super) fn set_irqs(
    device: BorrowedFd<'_>,
    action: u32,
    index: u32,
    count: u32,
) -> io::Result<()> {
    let flags = VFIO_IRQ_SET_DATA_NONE | action;
    let mut set = [20, flags, index, 0, count];
    with_struct(device, 10, &mut set).map(drop)
}

/// `VFIO_DEVICE_SET_IRQS` with eventfds, or with none for an interrupt that is to have none. Returns 0, or how many
/// vectors the host could give if those are fewer; then nothing has been done.
pub(super) fn set_irq_events(
    device: BorrowedFd<'_>,
    action: u32,
    index: u32,
    start: u32,
    events: &[Option<BorrowedFd<'_>>],
) -> io::Result<u32> {
    let count = u32::try_from(events.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let flags = VFIO_IRQ_SET_DATA_EVENTFD | action;
    let fds = events
        .iter()
        .map(|event| event.map_or(-1, |event| event.as_raw_fd()));
    let mut set: Vec<u32> = vec![20 + 4 * count, flags, index, start, count];
    set.extend(fds.map(c_int::cast_unsigned));
    // SAFETY: the kernel reads as many bytes as the first word says, which is as many as there are.
    let fewer = unsafe { call(device, 10, set.as_mut_ptr().cast()) }?;
    Ok(u32::try_from(fewer).unwrap_or(0))
}

/// `VFIO_DEVICE_RESET`.
pub(super) fn reset(device: BorrowedFd<'_>) -> io::Result<()> {
    with_value(device, 11, 0).map(drop)
}

/// A device that a hot reset would reset, too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Dependent {
    /// Its group; with a device of an iommufd its id there, 0 if it hinders nothing, or -1 if it is somebody else's.
    pub(super) id: u32,
    pub(super) segment: u16,
    pub(super) bus: u8,
    pub(super) devfn: u8,
}

/// `VFIO_DEVICE_GET_PCI_HOT_RESET_INFO`: all devices that a hot reset of this one would reset.
pub(super) fn hot_reset_info(device: BorrowedFd<'_>) -> io::Result<Vec<Dependent>> {
    /// More than a bus can have.
    const MOST: usize = 256;
    // `argsz`, `flags`, `count`, and two words for each device.
    let mut info = vec![0_u32; 3 + 2 * MOST];
    if let Some(argsz) = info.first_mut() {
        *argsz = u32::try_from(4 * (3 + 2 * MOST)).unwrap_or(0);
    }
    // SAFETY: the kernel writes no more bytes than the first word says, which is as many as there are.
    unsafe { call(device, 12, info.as_mut_ptr().cast()) }?;
    let count = info.get(2).copied().unwrap_or(0) as usize;
    let (devices, _) = info.get(3..).unwrap_or(&[]).as_chunks();
    let dependent = |&[id, address]: &[u32; 2]| {
        let [low, high, bus, devfn] = address.to_ne_bytes();
        Dependent {
            id,
            segment: u16::from_ne_bytes([low, high]),
            bus,
            devfn,
        }
    };
    Ok(devices.iter().take(count).map(dependent).collect())
}

/// `VFIO_DEVICE_PCI_HOT_RESET`, by right of having these groups, or of the iommufd if there are none.
pub(super) fn hot_reset(device: BorrowedFd<'_>, groups: &[BorrowedFd<'_>]) -> io::Result<()> {
    let count = u32::try_from(groups.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let mut set: Vec<u32> = vec![12 + 4 * count, 0, count];
    set.extend(groups.iter().map(|group| group.as_raw_fd().cast_unsigned()));
    // SAFETY: the kernel reads as many bytes as the first word says, which is as many as there are.
    unsafe { call(device, 13, set.as_mut_ptr().cast()) }.map(drop)
}

/// `VFIO_IOMMU_GET_INFO` (type 1): a `struct vfio_iommu_type1_info` and its capabilities.
pub(super) fn iommu_info(container: BorrowedFd<'_>) -> io::Result<Vec<u8>> {
    growing(container, 12, 24, |_| {})
}

/// `VFIO_IOMMU_MAP_DMA`: lets devices reach `size` bytes of this process's memory from `address` on at `iova`.
pub(super) fn map_dma(
    container: BorrowedFd<'_>,
    flags: u32,
    address: *const u8,
    iova: u64,
    size: u64,
) -> io::Result<()> {
    let mut map = vfio_iommu_type1_dma_map {
        argsz: self::size::<vfio_iommu_type1_dma_map>(),
        flags,
        vaddr: address as u64,
        iova,
        size,
    };
    with_struct(container, 13, &mut map).map(drop)
}

/// `VFIO_IOMMU_UNMAP_DMA`.
pub(super) fn unmap_dma(container: BorrowedFd<'_>, iova: u64, size: u64) -> io::Result<()> {
    let mut unmap = vfio_iommu_type1_dma_unmap {
        argsz: self::size::<vfio_iommu_type1_dma_unmap>(),
        iova,
        size,
        ..Default::default()
    };
    with_struct(container, 14, &mut unmap).map(drop)
}

/// `VFIO_DEVICE_BIND_IOMMUFD`: the device's id in the iommufd.
pub(super) fn bind_iommufd(device: BorrowedFd<'_>, iommufd: &impl AsRawFd) -> io::Result<u32> {
    let mut bind = vfio_device_bind_iommufd {
        argsz: size::<vfio_device_bind_iommufd>(),
        iommufd: iommufd.as_raw_fd(),
        ..Default::default()
    };
    with_struct(device, 18, &mut bind)?;
    Ok(bind.out_devid)
}

/// `VFIO_DEVICE_ATTACH_IOMMUFD_PT`: gives the device an address space.
pub(super) fn attach_iommufd(device: BorrowedFd<'_>, ioas: u32) -> io::Result<()> {
    let mut attach = vfio_device_attach_iommufd_pt {
        argsz: size::<vfio_device_attach_iommufd_pt>(),
        pt_id: ioas,
        ..Default::default()
    };
    with_struct(device, 19, &mut attach).map(drop)
}

/// `IOMMU_IOAS_IOVA_RANGES` (linux/iommufd.h): the addresses that an address space of an iommufd can translate.
pub(super) fn iova_ranges(
    iommufd: &impl AsRawFd,
    ioas: u32,
) -> io::Result<Vec<RangeInclusive<u64>>> {
    /// More than any IOMMU has.
    const MOST: usize = 256;
    let mut ranges = [[0_u64; 2]; MOST];
    let mut query = iommu_ioas_iova_ranges {
        size: size::<iommu_ioas_iova_ranges>(),
        ioas_id: ioas,
        num_iovas: u32::try_from(MOST).unwrap_or(0),
        allowed_iovas: ranges.as_mut_ptr() as u64,
        ..Default::default()
    };
    let request = request(IOMMUFD_CMD_IOAS_IOVA_RANGES);
    // SAFETY: the struct is as long as it says, and the array that it points to has room for as many ranges.
    let result = unsafe { libc::ioctl(iommufd.as_raw_fd(), request, ptr::from_mut(&mut query)) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    let ranges = ranges.iter().take(query.num_iovas as usize);
    Ok(ranges.map(|[start, last]| *start..=*last).collect())
}

/// Asks for a struct whose first field is its size in bytes, and again with more room if the kernel says that there is
/// more. `fill` sets the other fields.
fn growing(
    fd: BorrowedFd<'_>,
    number: u32,
    size: usize,
    fill: impl Fn(&mut [u64]),
) -> io::Result<Vec<u8>> {
    /// More than any chain of capabilities takes.
    const MOST: usize = 1 << 20;
    let mut size = size;
    loop {
        let mut words = vec![0_u64; size.div_ceil(8)];
        fill(&mut words);
        if let Some(argsz) = words.first_mut() {
            *argsz = size as u64;
        }
        // SAFETY: the kernel writes no more bytes than the first field says, which is as many as there are.
        unsafe { call(fd, number, words.as_mut_ptr().cast()) }?;
        let first = words.first().copied().unwrap_or(0);
        let needed = usize::try_from(first & u64::from(u32::MAX)).unwrap_or(0);
        if needed <= size || needed > MOST {
            let bytes = words.iter().flat_map(|word| word.to_ne_bytes());
            return Ok(bytes.take(size).collect());
        }
        size = needed;
    }
}

/// An ioctl whose argument is a number.
fn with_value(fd: BorrowedFd<'_>, number: u32, value: u32) -> io::Result<c_int> {
    // SAFETY: the kernel takes the argument of these ioctls for a number.
    unsafe { call(fd, number, ptr::without_provenance_mut(value as usize)) }
}

/// An ioctl whose argument is this very struct, or an array of the same layout.
fn with_struct<T>(fd: BorrowedFd<'_>, number: u32, argument: &mut T) -> io::Result<c_int> {
    // SAFETY: the argument is as long as it says, and the kernel reads and writes no more.
    unsafe { call(fd, number, ptr::from_mut(argument).cast()) }
}

/// # Safety
/// The ioctl with this number must take such an argument.
unsafe fn call(fd: BorrowedFd<'_>, number: u32, argument: *mut libc::c_void) -> io::Result<c_int> {
    // SAFETY: the caller sees to it.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), request(VFIO_BASE + number), argument) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result)
}

/// `_IO(VFIO_TYPE, number)`; iommufd's ioctls have the same type.
fn request(number: u32) -> c_ulong {
    c_ulong::from(VFIO_TYPE) << 8 | c_ulong::from(number)
}

fn size<T>() -> u32 {
    u32::try_from(size_of::<T>()).unwrap_or(0)
}
