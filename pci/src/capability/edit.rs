//! Edits by which a function that is passed through shows a guest only what works there.

use super::{CapabilityError, EXTENDED_START, capabilities, extended_capabilities};
use crate::config::ConfigSpace;
use crate::header;

/// Unlinks the capability at `offset` from its list. Its registers stay as they are.
pub fn hide_capability(config: &mut ConfigSpace, offset: u8) -> Result<(), CapabilityError> {
    let pointer = pointer_to(config, offset)?;
    let next = config.byte(u16::from(offset) + 1);
    config.set(pointer, &[next]);
    Ok(())
}

/// Where the pointer to the capability at `offset` is.
fn pointer_to(config: &ConfigSpace, offset: u8) -> Result<u16, CapabilityError> {
    let mut pointer = header::CAPABILITIES;
    for capability in capabilities(|offset| config.dword(offset)) {
        let capability = capability?;
        if capability.offset == offset {
            return Ok(pointer);
        }
        pointer = u16::from(capability.offset) + 1;
    }
    Err(CapabilityError::NotFound {
        offset: offset.into(),
    })
}

/// Bits 31:20 of an extended capability's header, where the next one is (7.6.3).
const NEXT: u32 = 0xfff0_0000;

/// Unlinks the extended capability at `offset` from its list. Its registers stay as they are, but for the header of
/// the first one.
///
/// Nothing points to the first one: the list always starts at 0x100. It becomes a Null capability, id and version
/// zero, that still points to the next, as Linux' vfio-pci and QEMU do; if it is the only one, that is an empty list
/// (7.6.1).
pub fn hide_extended_capability(
    config: &mut ConfigSpace,
    offset: u16,
) -> Result<(), CapabilityError> {
    let previous = before_extended(config, offset)?;
    let next = config.dword(offset) & NEXT;
    let id_and_version = match previous {
        Some(previous) => config.dword(previous) & !NEXT,
        None => 0,
    };
    let unlinked = id_and_version | next;
    config.set(previous.unwrap_or(EXTENDED_START), &unlinked.to_le_bytes());
    Ok(())
}

/// The extended capability before the one at `offset`, if that is not the first one.
fn before_extended(config: &ConfigSpace, offset: u16) -> Result<Option<u16>, CapabilityError> {
    let mut previous = None;
    for capability in extended_capabilities(|offset| config.dword(offset)) {
        let capability = capability?;
        if capability.offset == offset {
            return Ok(previous);
        }
        previous = Some(capability.offset);
    }
    Err(CapabilityError::NotFound { offset })
}

/// Device/Port Type in bits 7:4 of the PCI Express Capabilities register (7.5.3.2).
const PORT_TYPE: u16 = 0xf << 4;
const ENDPOINT: u16 = 0x0 << 4;
const LEGACY_ENDPOINT: u16 = 0x1 << 4;
const INTEGRATED_ENDPOINT: u16 = 0x9 << 4;

/// Makes the PCI Express capability at `offset` that of a Root Complex Integrated Endpoint, if it is an endpoint's.
///
/// On the root bus there is no link, so the link registers become zero and read-only: Link Capabilities, Control and
/// Status (7.5.3.6 to 7.5.3.8), and since version 2 of the capability their second set (7.5.3.18 to 7.5.3.20).
pub fn make_integrated_endpoint(config: &mut ConfigSpace, offset: u8) {
    let offset = u16::from(offset);
    let flags = config.word(offset + 2);
    if !matches!(flags & PORT_TYPE, ENDPOINT | LEGACY_ENDPOINT) {
        return;
    }
    let integrated = flags & !PORT_TYPE | INTEGRATED_ENDPOINT;
    config.set(offset + 2, &integrated.to_le_bytes());

    let version = flags & 0xf;
    blank(config, offset + 0x0c);
    if version >= 2 {
        blank(config, offset + 0x2c);
    }
}

/// Makes 8 bytes zero and read-only, unless they would reach beyond the space of the capability.
fn blank(config: &mut ConfigSpace, offset: u16) {
    if offset + 8 <= EXTENDED_START {
        config.set(offset, &[0; 8]);
        config.set_writable(offset, &[0; 8]);
        config.set_clearable(offset, &[0; 8]);
    }
}
