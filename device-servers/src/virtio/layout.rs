//! Where everything is in the BAR, and what configuration space says about it.

use std::ops::Range;

use vfio_user_server::{Bar, Description, Doorbell, Ids, MsixTable, Place, WINDOW_SIZE, Window};

use super::device::Identity;

/// Most queues of a device: each has a doorbell, and they fit into one message.
pub const MAX_QUEUES: u16 = 128;

/// The BAR that has everything.
pub(super) const BAR: usize = 0;

// What is where in the BAR, in bytes.
pub(super) const COMMON: Range<u64> = 0..0x3c;
pub(super) const ISR: Range<u64> = 0x1000..0x1001;
pub(super) const CONFIG: Range<u64> = 0x2000..0x3000;
pub(super) const NOTIFY: u64 = 0x3000;
const MSIX_TABLE: u32 = 0x4000;
const MSIX_PENDING: u32 = 0x6000;
const BAR_SIZE: u64 = 0x8000;

/// Bytes from the doorbell of one queue to that of the next.
pub(super) const NOTIFY_STRIDE: u32 = 4;

/// Vendor id of virtio devices, and the device id of type 0 (virtio 1.2, 4.1.2).
const VENDOR: u16 = 0x1af4;
const FIRST_DEVICE: u16 = 0x1040;

// Values of `cfg_type` (virtio 1.2, 4.1.4).
const COMMON_CFG: u8 = 1;
const NOTIFY_CFG: u8 = 2;
const ISR_CFG: u8 = 3;
const DEVICE_CFG: u8 = 4;
const PCI_CFG: u8 = 5;

/// Id of a vendor-specific capability (PCI Code and ID Assignment, 2).
const VENDOR_SPECIFIC: u8 = 0x09;

/// The PCI device for a virtio device with so many queues and so many bytes of configuration.
pub(super) fn description(identity: Identity, queues: u16, config: usize) -> Description {
    let device = FIRST_DEVICE.saturating_add(identity.kind);
    let config = u64::try_from(config).unwrap_or(u64::MAX);
    let config = CONFIG.start..CONFIG.start.saturating_add(config).min(CONFIG.end);
    let notify = NOTIFY..NOTIFY + u64::from(queues) * u64::from(NOTIFY_STRIDE);
    let description = Description::new(Ids {
        vendor: VENDOR,
        device,
        subsystem_vendor: VENDOR,
        subsystem: device,
        revision: 1,
        class: identity.class,
    })
    // A bridge has room above 4 GiB for prefetchable memory alone. Reading the ISR status has an effect, but no virtual
    // machine reads what it was not asked to.
    .bar(0, Bar::memory64(BAR_SIZE).prefetchable())
    .intx()
    .power_management()
    .express()
    .msix(MsixTable {
        vectors: vectors(queues),
        table_bar: 0,
        table_offset: MSIX_TABLE,
        pending_bar: 0,
        pending_offset: MSIX_PENDING,
    });
    let places = [
        (COMMON_CFG, COMMON, None),
        (ISR_CFG, ISR, None),
        (DEVICE_CFG, config, None),
        (NOTIFY_CFG, notify, Some(NOTIFY_STRIDE)),
    ];
    let description = places.into_iter().fold(description, |description, place| {
        description.capability(VENDOR_SPECIFIC, &capability(place), &[])
    });
    let window = Window {
        data: WINDOW_DATA,
        place: window_place,
    };
    let body = [&capability((PCI_CFG, 0..0, None))[..], &[0; WINDOW_SIZE]].concat();
    let description = description.window(VENDOR_SPECIFIC, &body, &WINDOW_WRITABLE, window);
    (0..queues)
        .map(doorbell)
        .fold(description, Description::doorbell)
}

// What `struct virtio_pci_cfg_cap` has behind the id and the pointer, in bytes (virtio 1.2, 4.1.4.9). The driver writes
// `bar`, `offset` and `length`, and what it then accesses by `pci_cfg_data`.
const WINDOW_DATA: usize = 14;
const WINDOW_WRITABLE: [u8; WINDOW_DATA + WINDOW_SIZE] = [
    0, 0, 0xff, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
];

/// What `pci_cfg_data` accesses, by the bytes behind the id and the pointer.
fn window_place(registers: &[u8]) -> Option<Place> {
    let [_, _, bar, _, _, _, rest @ ..] = registers else {
        return None;
    };
    let (offset, rest) = rest.split_first_chunk()?;
    let (length, _) = rest.split_first_chunk()?;
    let [offset, length] = [offset, length].map(|bytes| u32::from_le_bytes(*bytes));
    if !matches!(length, 1 | 2 | 4) || !offset.is_multiple_of(length) {
        return None;
    }
    Some(Place {
        bar: *bar,
        offset: offset.into(),
        length: usize::try_from(length).ok()?,
    })
}

/// Number of MSI-X vectors: one for each queue, and one for changes of the configuration.
pub(super) fn vectors(queues: u16) -> u16 {
    queues.saturating_add(1)
}

/// What follows the id and the pointer of `struct virtio_pci_cap` (virtio 1.2, 4.1.4), and of `virtio_pci_notify_cap`.
fn capability((kind, place, multiplier): (u8, Range<u64>, Option<u32>)) -> Vec<u8> {
    const HEAD: u8 = 16;
    // What follows is a multiplier or a window.
    let has_more = multiplier.is_some() || kind == PCI_CFG;
    let size = if has_more { HEAD + 4 } else { HEAD };
    let [offset, length] =
        [place.start, place.end - place.start].map(|value| u32::try_from(value).unwrap_or(0));
    let mut body = vec![size, kind, 0, 0, 0, 0];
    body.extend(offset.to_le_bytes());
    body.extend(length.to_le_bytes());
    body.extend(multiplier.into_iter().flat_map(u32::to_le_bytes));
    body
}

/// The doorbell of a queue. Drivers write its number, 16 bits wide (virtio 1.2, 4.1.5.2).
fn doorbell(queue: u16) -> Doorbell {
    Doorbell {
        bar: 0,
        offset: NOTIFY + u64::from(queue) * u64::from(NOTIFY_STRIDE),
        size: 2,
        value: None,
    }
}
