//! What guests do with the bench's [device](crate::device), and what they say meanwhile.

use iced_x86::IcedError;
use iced_x86::code_asm::{CodeLabel, dx, eax, ebp, edi, esi};
use tests::tiny::Code;

use crate::device::DEVICE;

/// What guests print before and after what is measured, and when there is no device.
pub(crate) const BEGIN: u8 = b'B';
/// See [`BEGIN`].
pub(crate) const END: u8 = b'E';
/// See [`BEGIN`].
pub(crate) const FAILED: u8 = b'!';

/// Gives EBP the address of BAR 0 of the device with this number, and EBX its place in configuration space, and switches
/// the device on. Goes to `fails` if there is none.
pub(crate) fn find(code: &mut Code, number: u32, fails: CodeLabel) -> Result<(), IcedError> {
    code.find_device(DEVICE + (number << 16), fails)?;
    code.mov(edi, 0)?;
    code.bar_address()?;
    code.mov(ebp, eax)?;
    // Memory space, bus master, and no INTx.
    code.select_config(4)?;
    code.in_(eax, dx)?;
    code.or(eax, 0x406)?;
    code.out(dx, eax)
}

/// Does something so many times, with ESI to count them down.
pub(crate) fn times(
    code: &mut Code,
    count: u32,
    act: impl FnOnce(&mut Code) -> Result<(), IcedError>,
) -> Result<(), IcedError> {
    let mut again = code.create_label();
    code.mov(esi, count)?;
    code.set_label(&mut again)?;
    act(code)?;
    code.dec(esi)?;
    code.jnz(again)
}
