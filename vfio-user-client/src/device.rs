//! What the device is: the commands that ask, and their answers.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use vfio_user_protocol::{
    self as protocol, Command, DeviceFlags, IoFdFlags, IrqFlags, RegionFlags,
};
use zerocopy::IntoBytes;

use crate::calls::Expected;
use crate::client::Client;
use crate::connection::Request;
use crate::error::ConnError;
use crate::socket::MAX_FDS;

/// What kind of device it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Whether [`Client::reset`] works.
    pub resettable: bool,
    /// Whether it is a PCI device, whose regions and interrupts are those of `linux/vfio.h`.
    pub pci: bool,
    /// Number of regions.
    pub regions: u32,
    /// Number of kinds of interrupt.
    pub irqs: u32,
}

/// A region of the device.
#[derive(Clone, Debug)]
pub struct RegionInfo {
    /// Size in bytes; 0 if there is no such region.
    pub size: u64,
    /// Whether it can be read.
    pub readable: bool,
    /// Whether it can be written.
    pub writable: bool,
    /// The file that `areas` are parts of, if there are any. It is the server's: it may shrink at any time.
    pub file: Option<Arc<OwnedFd>>,
    /// The parts that can be mapped, in the order of their offsets. They lie in the region, do not overlap, and begin
    /// and end on pages, in the region and in the file.
    pub areas: Vec<MappedArea>,
}

/// A part of a region that can be mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MappedArea {
    /// Offset in the region, in bytes.
    pub offset: u64,
    /// Size in bytes.
    pub size: u64,
    /// Offset in the file, in bytes.
    pub file_offset: u64,
}

/// A kind of interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IrqInfo {
    /// How many there are.
    pub count: u32,
    /// Whether they can signal an eventfd.
    pub eventfd: bool,
    /// Whether they can be masked and unmasked.
    pub maskable: bool,
    /// Whether the device masks one when it signals it.
    pub automasked: bool,
    /// Whether they have to be set up all at once.
    pub noresize: bool,
}

/// A write to a region that signals an eventfd instead.
#[derive(Clone, Debug)]
pub struct IoEvent {
    /// Offset in the region, in bytes.
    pub offset: u64,
    /// Size of the write in bytes: 1, 2, 4 or 8, or 0 for any.
    pub size: u64,
    /// What is signalled. Several writes may signal the same eventfd.
    pub fd: Arc<OwnedFd>,
    /// The value that has to be written, or any.
    pub datamatch: Option<u64>,
    /// Whether the region is in I/O space.
    pub pio: bool,
}

impl Client {
    /// Asks what kind of device it is.
    ///
    /// # Errors
    ///
    /// [`ConnError`], as for every call.
    pub fn device_info(&self) -> Result<DeviceInfo, ConnError> {
        let query = protocol::DeviceInfo::query();
        let request = asks(
            Command::DeviceGetInfo,
            query.as_bytes(),
            size_of_val(&query),
            0,
        );
        self.query(
            &request,
            self.deadlines.control,
            |info: protocol::DeviceInfo, _| {
                let flags = DeviceFlags::from_bits_retain(info.flags);
                Ok(DeviceInfo {
                    resettable: flags.contains(DeviceFlags::RESET),
                    pci: flags.contains(DeviceFlags::PCI),
                    regions: info.num_regions,
                    irqs: info.num_irqs,
                })
            },
        )
    }

    /// Asks for the size of a region and for what of it can be mapped. Mappable parts smaller than a page are left out.
    ///
    /// # Errors
    ///
    /// [`ConnError::Layout`] if a part that can be mapped lies outside of the region or overlaps another, and those
    /// that every call has.
    pub fn region_info(&self, region: u32) -> Result<RegionInfo, ConnError> {
        let command = Command::DeviceGetRegionInfo;
        let (payload, mut fds) = self.sized(command, 1, |argsz| {
            protocol::RegionInfo::query(region, argsz)
        })?;
        let bad = |source| self.bad_answer(command, source);
        let (info, _) = protocol::take::<protocol::RegionInfo>(&payload).map_err(bad)?;
        let sparse = protocol::sparse_areas(&payload).map_err(bad)?;
        let flags = RegionFlags::from_bits_retain(info.flags);
        let file = fds.pop().filter(|_| flags.contains(RegionFlags::MMAP));
        let areas = match &file {
            Some(_) => mapped_areas(&info, sparse).ok_or(ConnError::Layout { region })?,
            None => Vec::new(),
        };
        Ok(RegionInfo {
            size: info.size,
            readable: flags.contains(RegionFlags::READ),
            writable: flags.contains(RegionFlags::WRITE),
            file: file.filter(|_| !areas.is_empty()).map(Arc::new),
            areas,
        })
    }

    /// Asks which writes to a region signal an eventfd. A server that does not know the question has none.
    ///
    /// # Errors
    ///
    /// [`ConnError::Descriptors`] if an entry names a descriptor that did not come, and those that every call has. The
    /// caller, who knows the region's size, has to check that the writes lie in it.
    pub fn region_io_fds(&self, region: u32) -> Result<Vec<IoEvent>, ConnError> {
        let command = Command::DeviceGetRegionIoFds;
        let answer = self.sized(command, MAX_FDS, |argsz| {
            protocol::RegionIoFds::query(region, argsz)
        });
        let (payload, fds) = match answer {
            Err(ConnError::Refused { errno, .. }) if UNKNOWN.contains(&errno) => {
                return Ok(Vec::new());
            }
            answer => answer?,
        };
        let fds: Vec<_> = fds.into_iter().map(Arc::new).collect();
        let entries =
            protocol::io_fds(&payload).map_err(|source| self.bad_answer(command, source))?;
        entries
            .into_iter()
            .filter(|entry| entry.kind == protocol::IoFd::EVENTFD)
            .map(|entry| io_event(&entry, &fds).ok_or(ConnError::Descriptors { command }))
            .collect()
    }

    /// Asks how many interrupts of a kind there are, and what can be done with them.
    ///
    /// # Errors
    ///
    /// [`ConnError`], as for every call.
    pub fn irq_info(&self, index: u32) -> Result<IrqInfo, ConnError> {
        let query = protocol::IrqInfo::query(index);
        let request = asks(
            Command::DeviceGetIrqInfo,
            query.as_bytes(),
            size_of_val(&query),
            0,
        );
        self.query(
            &request,
            self.deadlines.control,
            |info: protocol::IrqInfo, _| {
                let flags = IrqFlags::from_bits_retain(info.flags);
                Ok(IrqInfo {
                    count: info.count,
                    eventfd: flags.contains(IrqFlags::EVENTFD),
                    maskable: flags.contains(IrqFlags::MASKABLE),
                    automasked: flags.contains(IrqFlags::AUTOMASKED),
                    noresize: flags.contains(IrqFlags::NORESIZE),
                })
            },
        )
    }

    /// Resets the device.
    ///
    /// # Errors
    ///
    /// [`ConnError`], as for every call.
    pub fn reset(&self) -> Result<(), ConnError> {
        let request = asks(Command::DeviceReset, &[], 0, 0);
        self.call(&request, self.deadlines.reset).map(drop)
    }

    /// Asks with a query that says how much answer there is room for, and again if that was too little.
    fn sized<T: IntoBytes + zerocopy::Immutable>(
        &self,
        command: Command,
        max_fds: usize,
        query: impl Fn(u32) -> T,
    ) -> Result<(Vec<u8>, Vec<OwnedFd>), ConnError> {
        let mut argsz = FIRST_ARGSZ;
        loop {
            let query = query(argsz);
            let request = asks(command, query.as_bytes(), MAX_ARGSZ, max_fds);
            let mut reply = self.call(&request, self.deadlines.control)?;
            // Every answer of this kind begins with the size that it needs.
            let needed = protocol::take::<u32>(&reply.payload).map(|(needed, _)| needed);
            match needed.map_err(|source| self.bad_answer(command, source))? {
                needed if needed <= argsz => {
                    let fds = std::mem::take(&mut reply.fds);
                    return Ok((std::mem::take(&mut reply.payload), fds));
                }
                needed if needed as usize <= MAX_ARGSZ && argsz == FIRST_ARGSZ => argsz = needed,
                _ => return Err(ConnError::TooLong { command }),
            }
        }
    }
}

/// A command that is all query, and has an answer of at most `payload` bytes and `fds` descriptors.
fn asks(command: Command, query: &[u8], payload: usize, fds: usize) -> Request<'_> {
    Request {
        command,
        head: query,
        data: &[],
        fds: &[],
        expected: Expected { payload, fds },
    }
}

/// The mappable parts of a region, or `None` if they are not where they should be.
fn mapped_areas(
    info: &protocol::RegionInfo,
    sparse: Option<Vec<protocol::SparseArea>>,
) -> Option<Vec<MappedArea>> {
    let whole = protocol::SparseArea {
        offset: 0,
        size: info.size,
    };
    let mut areas = Vec::new();
    for area in sparse.unwrap_or_else(|| vec![whole]) {
        let area = MappedArea {
            offset: area.offset,
            size: area.size,
            file_offset: info.offset.checked_add(area.offset)?,
        };
        area.file_offset.checked_add(area.size)?;
        if area.end()? > info.size {
            return None;
        }
        if area.size > 0 && (area.offset | area.size | area.file_offset).is_multiple_of(PAGE_SIZE) {
            areas.push(area);
        }
    }
    areas.sort_unstable_by_key(|area| area.offset);
    let apart = areas
        .array_windows()
        .all(|[a, b]| a.end().is_some_and(|end| end <= b.offset));
    apart.then_some(areas)
}

impl MappedArea {
    fn end(&self) -> Option<u64> {
        self.offset.checked_add(self.size)
    }
}

/// An entry of the list of I/O descriptors, or `None` if its descriptor did not come.
fn io_event(entry: &protocol::IoFd, fds: &[Arc<OwnedFd>]) -> Option<IoEvent> {
    let flags = IoFdFlags::from_bits_retain(entry.flags);
    let fd = fds.get(usize::try_from(entry.fd_index).ok()?)?;
    Some(IoEvent {
        offset: entry.offset,
        size: entry.size,
        fd: Arc::clone(fd),
        datamatch: flags
            .contains(IoFdFlags::DATAMATCH)
            .then_some(entry.datamatch),
        pio: flags.contains(IoFdFlags::PIO),
    })
}

/// Room for an answer in the first attempt, in bytes: 250 mappable areas, or 80 doorbells.
const FIRST_ARGSZ: u32 = 4096;

/// Largest answer that is asked for, in bytes.
const MAX_ARGSZ: usize = 64 << 10;

/// What the guest's memory is mapped in, in bytes.
const PAGE_SIZE: u64 = 4096;

/// How servers refuse a command that they do not know: `EINVAL`, `ENOTTY`, `ENOSYS`, `EOPNOTSUPP`, or without an errno.
const UNKNOWN: [u32; 5] = [0, 22, 25, 38, 95];
