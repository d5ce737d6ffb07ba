//! A driver of a virtio disk, in a few hundred instructions: what a kernel's driver does, by interrupts and with event
//! index and indirect descriptors, and nothing else.
//!
//! Outrigger and other VMMs can run it: it finds the disk wherever it is on bus 0, and its registers wherever the
//! capabilities say.

use iced_x86::IcedError;
use iced_x86::code_asm::{
    CodeLabel, al, byte_ptr, cx, dword_ptr, dx, eax, ebx, ecx, edi, edx, esi, esp, ptr, word_ptr,
};

use super::{Code, LOCAL_APIC, SCRATCH, STACK};

/// How many entries the queue has.
pub(super) const QUEUE_SIZE: u16 = 256;

// Where the queue is, and what the driver keeps for each chain.
pub(super) const DESCRIPTORS: u32 = 0x40_0000;
pub(super) const AVAILABLE: u32 = 0x40_2000;
pub(super) const USED: u32 = 0x40_4000;
/// Up to which buffer the driver wants no interrupt, and the device no notification.
pub(super) const USED_EVENT: u32 = AVAILABLE + 4 + 2 * QUEUE_SIZE as u32;
pub(super) const AVAILABLE_EVENT: u32 = USED + 4 + 8 * QUEUE_SIZE as u32;

// What the driver knows.
const COMMON: u32 = SCRATCH + 0x900;
/// The address of the doorbell.
pub(super) const DOORBELL: u32 = SCRATCH + 0x904;
const MULTIPLIER: u32 = SCRATCH + 0x908;
const MSIX: u32 = SCRATCH + 0x90c;
const MSIX_TABLE: u32 = SCRATCH + 0x910;
/// Where the driver goes on when it is interrupted.
pub(super) const RESUME: u32 = SCRATCH + 0x914;

/// The vector that the queue's interrupts come with.
const VECTOR: u8 = 0x50;

/// Vendor and device id of a modern virtio disk.
const DISK: u32 = 0x1042_1af4;
/// Memory space, bus master, and no INTx.
const COMMAND: u32 = 0x406;
/// Features of the lower half: flush, indirect descriptors and event index.
const FEATURES: u32 = 1 << 9 | 1 << 28 | 1 << 29;

impl Code {
    /// Finds the disk and gets it ready. Goes to `fails` if there is none, or it is not what the driver needs. Of the
    /// registers, only ESP is of use then.
    pub(super) fn start_disk(&mut self, fails: CodeLabel) -> Result<(), IcedError> {
        self.silence_firmware(VECTOR)?;
        self.find_device(DISK, fails)?;
        self.walk_capabilities()?;
        self.select_config(4)?;
        self.in_(eax, dx)?;
        self.or(eax, COMMAND.cast_signed())?;
        self.out(dx, eax)?;
        self.set_disk_up(fails)?;
        self.allow_interrupts()?;
        // The driver is interrupted only where it waits.
        self.cli()
    }

    /// The handler of the disk's interrupts, which goes to where [`RESUME`] says, with interrupts off.
    pub(super) fn disk_handler(&mut self) -> Result<(), IcedError> {
        self.handler(VECTOR)?;
        self.mov(esp, STACK)?;
        self.store(LOCAL_APIC + 0xb0, 0)?;
        self.jmp(dword_ptr(RESUME))
    }

    /// Notes where the registers are that the driver needs.
    fn walk_capabilities(&mut self) -> Result<(), IcedError> {
        let [
            mut next,
            mut over,
            mut skip,
            mut msix,
            mut notify,
            mut bar,
            mut start,
        ] = std::array::from_fn(|_| self.create_label());
        self.mov(esp, STACK)?;
        self.jmp(start)?;

        // Gives EAX the address in BAR number EDI.
        self.set_label(&mut bar)?;
        self.bar_address()?;
        self.ret()?;

        self.set_label(&mut start)?;
        self.select_config(0x34)?;
        self.in_(eax, dx)?;
        self.mov(ecx, eax)?;
        self.set_label(&mut next)?;
        self.and(ecx, 0xfc)?;
        self.jz(over)?;
        // Id, next capability, length and, for virtio's, what it tells of.
        self.read_capability(0)?;
        self.mov(esi, eax)?;
        self.cmp(al, 0x11)?;
        self.je(msix)?;
        self.cmp(al, 0x09)?;
        self.jne(skip)?;
        self.shr(eax, 24)?;
        self.cmp(eax, 2)?;
        self.je(notify)?;
        self.cmp(eax, 1)?;
        self.jne(skip)?;
        self.virtio_address(bar)?;
        self.mov(dword_ptr(COMMON), eax)?;
        self.jmp(skip)?;

        self.set_label(&mut notify)?;
        self.virtio_address(bar)?;
        self.mov(dword_ptr(DOORBELL), eax)?;
        self.read_capability(16)?;
        self.mov(dword_ptr(MULTIPLIER), eax)?;
        self.jmp(skip)?;

        self.set_label(&mut msix)?;
        self.lea(eax, ptr(ebx + ecx))?;
        self.mov(dword_ptr(MSIX), eax)?;
        self.read_capability(4)?;
        self.push(eax)?;
        self.mov(edi, eax)?;
        self.and(edi, 7)?;
        self.call(bar)?;
        self.pop(edi)?;
        self.and(edi, !7)?;
        self.add(eax, edi)?;
        self.mov(dword_ptr(MSIX_TABLE), eax)?;

        self.set_label(&mut skip)?;
        self.mov(ecx, esi)?;
        self.shr(ecx, 8)?;
        self.jmp(next)?;
        self.set_label(&mut over)
    }

    /// Gives EAX the address that virtio's capability at ECX tells of.
    fn virtio_address(&mut self, bar: CodeLabel) -> Result<(), IcedError> {
        self.read_capability(4)?;
        self.mov(edi, eax)?;
        self.and(edi, 0xff)?;
        self.call(bar)?;
        self.mov(edi, eax)?;
        self.read_capability(8)?;
        self.add(eax, edi)
    }

    /// Virtio 1.2, 3.1.1, and 4.1.4.3 for the registers of the common configuration.
    fn set_disk_up(&mut self, fails: CodeLabel) -> Result<(), IcedError> {
        let mut resets = self.create_label();
        self.mov(esi, dword_ptr(COMMON))?;
        let status = byte_ptr(esi + 0x14);
        self.mov(status, 0)?;
        self.set_label(&mut resets)?;
        self.cmp(status, 0)?;
        self.jne(resets)?;
        self.mov(status, 0x1)?;
        self.mov(status, 0x3)?;
        for (half, features) in [(0, FEATURES), (1, 1)] {
            self.mov(dword_ptr(esi), half)?;
            self.mov(eax, dword_ptr(esi + 4))?;
            self.and(eax, features.cast_signed())?;
            self.cmp(eax, features.cast_signed())?;
            self.jne(fails)?;
            self.mov(dword_ptr(esi + 8), half)?;
            self.mov(dword_ptr(esi + 12), eax)?;
        }
        self.mov(status, 0xb)?;
        self.cmp(status, 0xb)?;
        self.jne(fails)?;

        // Vector 0 for the queue, and none for the configuration.
        self.mov(edi, dword_ptr(MSIX_TABLE))?;
        for (word, value) in [LOCAL_APIC, 0, VECTOR.into(), 0].into_iter().enumerate() {
            let place = i32::try_from(4 * word).unwrap_or(0);
            self.mov(dword_ptr(edi + place), value)?;
        }
        self.mov(edx, dword_ptr(MSIX))?;
        self.select_config_of(edx + 0)?;
        self.in_(eax, dx)?;
        self.or(eax, (1u32 << 31).cast_signed())?;
        self.out(dx, eax)?;
        self.mov(word_ptr(esi + 0x10), 0xffff)?;

        self.mov(word_ptr(esi + 0x16), 0)?;
        self.mov(word_ptr(esi + 0x18), u32::from(QUEUE_SIZE))?;
        self.mov(word_ptr(esi + 0x1a), 0)?;
        self.cmp(word_ptr(esi + 0x1a), 0)?;
        self.jne(fails)?;
        for (place, address) in [(0x20, DESCRIPTORS), (0x28, AVAILABLE), (0x30, USED)] {
            self.mov(dword_ptr(esi + place), address)?;
            self.mov(dword_ptr(esi + place + 4), 0)?;
        }
        self.sub(ecx, ecx)?;
        self.mov(cx, word_ptr(esi + 0x1e))?;
        self.imul_2(ecx, dword_ptr(MULTIPLIER))?;
        self.add(dword_ptr(DOORBELL), ecx)?;
        self.mov(word_ptr(esi + 0x1c), 1)?;
        self.mov(status, 0xf)
    }
}
