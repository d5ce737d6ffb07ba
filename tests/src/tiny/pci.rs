//! A driver's way to a PCI device, by the ports of configuration space. It works in Outrigger and in other VMMs: the
//! device may be anywhere on bus 0, and its BARs anywhere or nowhere.
//!
//! EBX is the device's address in configuration space throughout, and EAX and EDX are used up.

use iced_x86::IcedError;
use iced_x86::code_asm::{
    AsmMemoryOperand, CodeLabel, dword_ptr, dx, eax, ebx, ecx, edi, edx, esp, ptr,
};

use super::Code;

/// What CONFIG_ADDRESS has for device 0 on bus 0, and for the one behind the last of that bus.
const FIRST: u32 = 0x8000_0000;
const LAST: u32 = 0x8001_0000;
const CONFIG_ADDRESS: u32 = 0xcf8;
const CONFIG_DATA: u32 = 0xcfc;
/// Where device 0's BAR 0 goes if it is above 4 GiB, out of the guest's reach, or nowhere; the next one goes 1 MiB behind
/// it, and the next device's 8 MiB.
const REACHABLE: u32 = 0xd000_0000;

impl Code {
    /// Gives EBX what CONFIG_ADDRESS has to be for the device with this vendor and device id, in the order in which they
    /// are in configuration space. Goes to `fails` if there is none on bus 0.
    pub fn find_device(&mut self, id: u32, fails: CodeLabel) -> Result<(), IcedError> {
        let (mut again, mut found) = (self.create_label(), self.create_label());
        self.mov(ebx, FIRST)?;
        self.set_label(&mut again)?;
        self.select_config(0)?;
        self.in_(eax, dx)?;
        self.cmp(eax, id.cast_signed())?;
        self.je(found)?;
        self.add(ebx, 1 << 11)?;
        self.cmp(ebx, LAST.cast_signed())?;
        self.jne(again)?;
        self.jmp(fails)?;
        self.set_label(&mut found)
    }

    /// Selects a register of that device's configuration space, for which DX is the port then.
    pub fn select_config(&mut self, register: i32) -> Result<(), IcedError> {
        self.select_config_of(ebx + register)
    }

    /// As [`Self::select_config`], for what CONFIG_ADDRESS has to be.
    pub(super) fn select_config_of(&mut self, address: AsmMemoryOperand) -> Result<(), IcedError> {
        self.lea(eax, address)?;
        self.mov(edx, CONFIG_ADDRESS)?;
        self.out(dx, eax)?;
        self.mov(edx, CONFIG_DATA)
    }

    /// Reads a register of the capability at ECX.
    pub(super) fn read_capability(&mut self, register: i32) -> Result<(), IcedError> {
        self.select_config_of(ebx + ecx + register)?;
        self.in_(eax, dx)
    }

    /// Gives EAX the address in BAR number EDI of that device. One that has none yet, or is out of reach, is given one.
    pub fn bar_address(&mut self) -> Result<(), IcedError> {
        let [mut narrow, mut above, mut moved, mut known] =
            std::array::from_fn(|_| self.create_label());
        self.mov(eax, ebx)?;
        self.and(eax, 0xf800)?;
        self.shl(eax, 12)?;
        self.mov(edx, edi)?;
        self.shl(edx, 20)?;
        self.lea(eax, ptr(eax + edx + REACHABLE.cast_signed()))?;
        self.push(eax)?;
        self.lea(edi, ptr(ebx + edi * 4 + 0x10))?;
        self.select_config_of(edi + 0)?;
        self.in_(eax, dx)?;
        self.test(eax, 4)?;
        self.jz(narrow)?;
        self.select_config_of(edi + 4)?;
        self.in_(eax, dx)?;
        self.test(eax, eax)?;
        self.jnz(above)?;
        self.select_config_of(edi + 0)?;
        self.in_(eax, dx)?;
        self.set_label(&mut narrow)?;
        self.and(eax, !0xf)?;
        self.jnz(known)?;
        self.jmp(moved)?;
        self.set_label(&mut above)?;
        self.sub(eax, eax)?;
        self.out(dx, eax)?;
        self.set_label(&mut moved)?;
        self.select_config_of(edi + 0)?;
        self.mov(eax, dword_ptr(esp))?;
        self.out(dx, eax)?;
        self.set_label(&mut known)?;
        self.add(esp, 4)
    }
}
