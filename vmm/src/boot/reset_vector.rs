//! All that there is of a BIOS: what a guest finds at the reset vector.
//!
//! On a hardware-reduced machine Linux passes over ACPI's reset register: it asks EFI to restart, and where there is none
//! it jumps to the reset vector in real mode (`native_machine_emergency_restart` in arch/x86/kernel/reboot.c).

use vm_memory::GuestAddress;

use super::{BootError, write_slice};
use crate::layout;
use crate::memory::Ram;

/// Writes the code that resets the machine.
pub(super) fn write_reset_vector(ram: &Ram) -> Result<(), BootError> {
    let port = layout::POWER.start() + devices::power::RESET;
    let [port_low, port_high, ..] = port.to_le_bytes();
    #[rustfmt::skip]
    let code = [
        0xba, port_low, port_high,          // mov dx, port
        0xb0, devices::power::RESET_VALUE,  // mov al, value
        0xee,                               // out dx, al
        0xf4,                               // hlt
        0xeb, 0xfd,                         // jmp to the hlt
    ];
    write_slice(ram, &code, GuestAddress(layout::RESET_VECTOR))
}
