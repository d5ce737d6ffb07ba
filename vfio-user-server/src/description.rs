//! What a device is, as its author says it.

mod bar;
mod layout;

use std::ops::Range;

use thiserror::Error;

pub use self::bar::Bar;
pub(crate) use self::layout::{Layout, Places, WindowPlace};

/// What a PCI device is: its identity, its BARs, its capabilities, its interrupts and its doorbells.
///
/// Capabilities are laid out in the order in which they are added, from 0x40 on (0x100 for the extended ones), each at
/// a multiple of 16, or of 4 if there is no room for that.
#[derive(Debug)]
pub struct Description {
    ids: Ids,
    bars: [Option<Bar>; BARS],
    /// A BAR that was added and cannot be.
    wrong_bar: Option<u8>,
    intx: bool,
    msi: Option<u16>,
    msix: Option<MsixTable>,
    capabilities: Vec<Capability>,
    extended: Vec<Capability>,
    window: Option<(usize, Window)>,
    doorbells: Vec<Doorbell>,
}

/// Who made the device, and what it is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ids {
    /// Vendor id.
    pub vendor: u16,
    /// Device id.
    pub device: u16,
    /// Subsystem vendor id.
    pub subsystem_vendor: u16,
    /// Subsystem id.
    pub subsystem: u16,
    /// Revision id.
    pub revision: u8,
    /// Base class, subclass and programming interface, as in `0x01_08_02` for NVMe.
    pub class: u32,
}

/// Where the MSI-X table and its pending bits are. Accesses to both are served by the library.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsixTable {
    /// Number of vectors, from 1 to 2048.
    pub vectors: u16,
    /// BAR of the table.
    pub table_bar: u8,
    /// Offset of the table in its BAR in bytes, a multiple of 8. An entry takes 16 bytes.
    pub table_offset: u32,
    /// BAR of the pending bits.
    pub pending_bar: u8,
    /// Offset of the pending bits in their BAR in bytes, a multiple of 8. They take 8 bytes for each 64 vectors.
    pub pending_offset: u32,
}

/// A place in a BAR of which nothing but the fact that it was written to matters.
///
/// A VMM that can has it signal an eventfd, without a message and without the device's other registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Doorbell {
    /// The BAR.
    pub bar: u8,
    /// Offset in the BAR, in bytes.
    pub offset: u64,
    /// Size of the write in bytes: 1, 2, 4 or 8. Writes of other sizes do not ring.
    pub size: u8,
    /// The value that has to be written, or any.
    pub value: Option<u64>,
}

/// A register in configuration space through which a guest accesses BARs that it has not mapped, as firmware may have to.
///
/// It is part of a capability, whose other registers say where the access goes.
#[derive(Clone, Copy, Debug)]
pub struct Window {
    /// Offset of the register, of [`WINDOW_SIZE`] bytes, from the end of the capability's header, in bytes.
    pub data: usize,
    /// Where an access goes, by the bytes of the capability after its header. `None` if they say no place that can be
    /// accessed: the register then keeps what is written to it.
    pub place: fn(&[u8]) -> Option<Place>,
}

/// Something in a BAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The BAR.
    pub bar: u8,
    /// Offset in the BAR, in bytes.
    pub offset: u64,
    /// How many bytes: the first of the register.
    pub length: usize,
}

/// A capability: its id, and the registers after its header.
#[derive(Clone, Debug)]
struct Capability {
    id: u16,
    version: u8,
    body: Vec<u8>,
    writable: Vec<u8>,
}

/// Why a description describes no device that could be.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum DescriptionError {
    /// There are six BARs, of which each can be added once.
    #[error("there cannot be such a BAR {0}, or another")]
    NoSuchBar(u8),
    /// A BAR has a size that it cannot have: a power of two, from 4 to 256 bytes in I/O space, and from 16 bytes to
    /// 2 GiB in memory space, or more with 64 bits.
    #[error("BAR {bar} cannot have {size:#x} bytes")]
    BarSize {
        /// The BAR.
        bar: u8,
        /// Its size in bytes.
        size: u64,
    },
    /// A 64-bit BAR takes two registers, and the second one is in use or is none.
    #[error("BAR {0} has 64 bits and no room for them")]
    UpperHalf(u8),
    /// A mappable area does not consist of pages of the BAR and of its file, or the file is too short.
    #[error("the area {area:#x?} of BAR {bar} cannot be mapped")]
    Area {
        /// The BAR.
        bar: u8,
        /// The area, in bytes.
        area: Range<u64>,
    },
    /// The MSI-X table or the pending bits are not in their BAR, not aligned, or in a mappable area.
    #[error("the MSI-X table or its pending bits cannot be where they are said to be")]
    Msix,
    /// MSI has 1, 2, 4, 8, 16 or 32 vectors, MSI-X 1 to 2048.
    #[error("there cannot be {0} vectors")]
    Vectors(u16),
    /// A doorbell is not in its BAR, or in a mappable area, or has no possible size.
    #[error("there can be no doorbell like {0:?}")]
    Doorbell(Doorbell),
    /// There are more doorbells than one message can carry descriptors for.
    #[error("there are more than {MAX_DOORBELLS} doorbells")]
    Doorbells,
    /// The register of a window is not in its capability.
    #[error("the register of the window is not in its capability")]
    Window,
    /// The capabilities do not fit into configuration space. Extended ones need a PCI Express capability.
    #[error("the capabilities do not fit into configuration space")]
    Capabilities,
}

/// Number of BARs.
pub(crate) const BARS: usize = 6;

/// Bytes of the register of a [`Window`].
pub const WINDOW_SIZE: usize = 4;

/// Most doorbells of a device: as many as one message can carry descriptors for.
pub const MAX_DOORBELLS: usize = crate::socket::MAX_FDS;

impl Description {
    /// A device without anything but an identity.
    pub fn new(ids: Ids) -> Self {
        Self {
            ids,
            bars: [const { None }; BARS],
            wrong_bar: None,
            intx: false,
            msi: None,
            msix: None,
            capabilities: Vec::new(),
            extended: Vec::new(),
            window: None,
            doorbells: Vec::new(),
        }
    }

    /// Adds one of the six BARs.
    #[must_use]
    pub fn bar(mut self, index: u8, bar: Bar) -> Self {
        match self.bars.get_mut(usize::from(index)) {
            Some(slot @ None) => *slot = Some(bar),
            _ => self.wrong_bar = Some(index),
        }
        self
    }

    /// Adds the wired interrupt INTA.
    #[must_use]
    pub fn intx(mut self) -> Self {
        self.intx = true;
        self
    }

    /// Adds MSI with so many vectors, with 64-bit addresses and mask bits.
    #[must_use]
    pub fn msi(mut self, vectors: u16) -> Self {
        self.msi = Some(vectors);
        let capable = vectors.checked_ilog2().unwrap_or(0);
        let control = 0x0180 | u16::try_from(capable << 1).unwrap_or(0);
        let mut body = vec![0; 0x16];
        let mut writable = vec![0; 0x16];
        put(&mut body, 0, &control.to_le_bytes());
        put(&mut writable, 0, &0x0071_u16.to_le_bytes());
        put(&mut writable, 2, &0xffff_fffc_u32.to_le_bytes());
        put(&mut writable, 6, &u32::MAX.to_le_bytes());
        put(&mut writable, 10, &u16::MAX.to_le_bytes());
        let vectors = u32::try_from((1_u64 << vectors.min(32)) - 1).unwrap_or(u32::MAX);
        put(&mut writable, 14, &vectors.to_le_bytes());
        self.with(MSI, body, writable)
    }

    /// Adds MSI-X.
    #[must_use]
    pub fn msix(mut self, table: MsixTable) -> Self {
        self.msix = Some(table);
        let control = table.vectors.wrapping_sub(1) & 0x7ff;
        let table_at = table.table_offset & !7 | u32::from(table.table_bar & 7);
        let pending_at = table.pending_offset & !7 | u32::from(table.pending_bar & 7);
        let mut body = control.to_le_bytes().to_vec();
        body.extend(table_at.to_le_bytes());
        body.extend(pending_at.to_le_bytes());
        let mut writable = vec![0; 10];
        put(&mut writable, 0, &0xc000_u16.to_le_bytes());
        self.with(MSIX, body, writable)
    }

    /// Adds power management: D0 and D3hot, which keeps the device's state.
    #[must_use]
    pub fn power_management(self) -> Self {
        // Version 3; No_Soft_Reset; the power state can be written.
        let body = vec![0x03, 0, 0x08, 0, 0, 0];
        let writable = vec![0, 0, 0x03, 0, 0, 0];
        self.with(POWER_MANAGEMENT, body, writable)
    }

    /// Makes it a PCI Express endpoint, with 4096 bytes of configuration space and function-level reset.
    #[must_use]
    pub fn express(self) -> Self {
        let mut body = vec![0; 0x3a];
        let mut writable = vec![0; 0x3a];
        // Version 2, endpoint.
        put(&mut body, 0, &[0x02, 0]);
        // Role-based error reporting and function-level reset.
        put(&mut body, 2, &0x1000_8000_u32.to_le_bytes());
        put(&mut body, 6, &0x2810_u16.to_le_bytes());
        put(&mut writable, 6, &0x7fff_u16.to_le_bytes());
        // A link of 2.5 GT/s with one lane.
        put(&mut body, 10, &0x0000_0011_u32.to_le_bytes());
        put(&mut body, 16, &0x0011_u16.to_le_bytes());
        put(&mut writable, 14, &0x0040_u16.to_le_bytes());
        // Completion timeout.
        put(&mut writable, 38, &0x001f_u16.to_le_bytes());
        self.with(EXPRESS, body, writable)
    }

    /// Adds a capability of any kind: its id, the bytes after the id and the pointer to the next, and which of their bits
    /// can be written.
    #[must_use]
    pub fn capability(self, id: u8, body: &[u8], writable: &[u8]) -> Self {
        self.with(id, body.to_vec(), writable.to_vec())
    }

    /// Adds a capability, as [`capability`](Self::capability) does, with a window, of which a device has one at most. What
    /// is accessed through it is read and written as if the client had accessed that BAR.
    #[must_use]
    pub fn window(mut self, id: u8, body: &[u8], writable: &[u8], window: Window) -> Self {
        self.window = Some((self.capabilities.len(), window));
        self.capability(id, body, writable)
    }

    /// Adds the Device Serial Number.
    #[must_use]
    pub fn serial_number(self, number: u64) -> Self {
        self.extended_capability(SERIAL_NUMBER, 1, &number.to_le_bytes(), &[])
    }

    /// Adds a vendor-specific extended capability: its id and revision, its registers, and which of their bits can be
    /// written.
    #[must_use]
    pub fn vendor_specific(self, id: u16, revision: u8, registers: &[u8], writable: &[u8]) -> Self {
        let size = u32::try_from(registers.len() + 8).unwrap_or(0) & 0xfff;
        let head = u32::from(id) | u32::from(revision & 0xf) << 16 | size << 20;
        let body = [&head.to_le_bytes(), registers].concat();
        let writable = [&[0; 4], writable].concat();
        self.extended_capability(VENDOR_SPECIFIC, 1, &body, &writable)
    }

    /// Adds an extended capability of any kind: its id and version, the bytes after its header, and which of their bits
    /// can be written.
    #[must_use]
    pub fn extended_capability(
        mut self,
        id: u16,
        version: u8,
        body: &[u8],
        writable: &[u8],
    ) -> Self {
        self.extended.push(Capability {
            id,
            version,
            body: body.to_vec(),
            writable: writable.to_vec(),
        });
        self
    }

    /// Adds a doorbell. They are numbered in the order in which they are added, from 0 on.
    #[must_use]
    pub fn doorbell(mut self, doorbell: Doorbell) -> Self {
        self.doorbells.push(doorbell);
        self
    }

    fn with(mut self, id: u8, body: Vec<u8>, writable: Vec<u8>) -> Self {
        self.capabilities.push(Capability {
            id: id.into(),
            version: 0,
            body,
            writable,
        });
        self
    }
}

// Capability ids (PCI Code and ID Assignment, 2 and 3).
const POWER_MANAGEMENT: u8 = 0x01;
const MSI: u8 = 0x05;
const EXPRESS: u8 = 0x10;
const MSIX: u8 = 0x11;
const SERIAL_NUMBER: u16 = 0x0003;
const VENDOR_SPECIFIC: u16 = 0x000b;

impl MsixTable {
    /// What of its BAR the table takes, in bytes.
    pub(crate) fn table(&self) -> Range<u64> {
        let start = u64::from(self.table_offset);
        start..start + 16 * u64::from(self.vectors)
    }

    /// What of its BAR the pending bits take, in bytes.
    pub(crate) fn pending(&self) -> Range<u64> {
        let start = u64::from(self.pending_offset);
        start..start + 8 * u64::from(self.vectors).div_ceil(64)
    }
}

fn put(bytes: &mut [u8], offset: usize, value: &[u8]) {
    if let Some(bytes) = bytes.get_mut(offset..offset + value.len()) {
        bytes.copy_from_slice(value);
    }
}
