//! Guests of a few dozen instructions, in PVH ELF files of their own.
//!
//! They run in 32-bit protected mode without paging, and on any KVM, one that only emulates included.

pub mod counter;
pub mod demo;
pub mod disk;
mod pci;
mod virtio;

use std::io::Write;
use std::ops::{Deref, DerefMut};

use iced_x86::code_asm::{
    CodeAssembler, CodeLabel, al, cs, ds, dword_ptr, dx, eax, edx, esp, ptr, ss, word_ptr,
};
use iced_x86::{BlockEncoderOptions, IcedError};
use tempfile::NamedTempFile;

/// Where a guest's code is loaded and entered.
pub const CODE: u32 = 0x10_0000;
/// Memory that is a guest's own: the kernel is never loaded here, so it outlives a reset.
pub const SCRATCH: u32 = 0x20_0000;
/// The first serial port's data register.
pub const COM1: u16 = 0x3f8;
/// Outrigger's sleep control and reset registers, as its ACPI tables tell them.
pub const SLEEP_CONTROL: u16 = 0x600;
/// See [`SLEEP_CONTROL`].
pub const RESET: u16 = 0x602;
/// Configuration space of the first device behind the host bridge, in the window that the MCFG table tells.
pub const FIRST_DEVICE: u32 = 0xe000_0000 + (1 << 15);
/// Where a guest's stack ends, if it has one.
const STACK: u32 = SCRATCH + 0x2000;
/// The local APIC's registers.
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// The I/O APIC's registers.
pub const IO_APIC: u32 = 0xfec0_0000;

/// Assembles the code of a guest into a file that Outrigger can boot.
///
/// # Errors
/// When an instruction makes no sense, or the file cannot be written.
pub fn guest(
    code: impl FnOnce(&mut Code) -> Result<(), IcedError>,
) -> anyhow::Result<NamedTempFile> {
    let mut assembled = Code {
        assembler: CodeAssembler::new(32)?,
        handlers: Vec::new(),
    };
    code(&mut assembled)?;
    let Code {
        mut assembler,
        handlers,
    } = assembled;
    let options = BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS;
    let result = assembler.assemble_options(CODE.into(), options)?;
    let mut table = vec![0u64; usize::from(INTERRUPT_VECTORS)];
    for (vector, handler) in handlers {
        if let Some(gate) = table.get_mut(usize::from(vector)) {
            *gate = interrupt_gate(result.label_ip(&handler)?);
        }
    }
    let table: Vec<_> = table.into_iter().flat_map(u64::to_le_bytes).collect();
    let mut file = NamedTempFile::new()?;
    file.write_all(&elf([
        (CODE, &result.inner.code_buffer),
        (INTERRUPT_TABLE, &table),
    ]))?;
    file.flush()?;
    Ok(file)
}

/// Where the interrupt descriptor table is loaded, and how long it is.
const INTERRUPT_TABLE: u32 = 0x30_0000;
const INTERRUPT_VECTORS: u16 = 256;

/// A present 32-bit interrupt gate (Intel SDM, volume 3, 6.11) into the code segment that a PVH guest starts with.
fn interrupt_gate(handler: u64) -> u64 {
    const SELECTOR: u64 = 0x10;
    const PRESENT_32BIT_INTERRUPT: u64 = 0x8e00;
    (handler & 0xffff) | SELECTOR << 16 | PRESENT_32BIT_INTERRUPT << 32 | (handler >> 16) << 48
}

/// A guest's code while it is written: an assembler with building blocks.
///
/// # Errors
/// All methods fail when an instruction makes no sense.
#[expect(missing_debug_implementations, reason = "the assembler has none")]
pub struct Code {
    assembler: CodeAssembler,
    handlers: Vec<(u8, CodeLabel)>,
}

impl Deref for Code {
    type Target = CodeAssembler;

    fn deref(&self) -> &CodeAssembler {
        &self.assembler
    }
}

impl DerefMut for Code {
    fn deref_mut(&mut self) -> &mut CodeAssembler {
        &mut self.assembler
    }
}

impl Code {
    /// Sends a character to the serial port.
    pub fn print(&mut self, character: u8) -> Result<(), IcedError> {
        self.outb(COM1, character)
    }

    /// Sends a line to the serial port.
    pub fn print_line(&mut self, line: &str) -> Result<(), IcedError> {
        line.bytes().try_for_each(|byte| self.print(byte))?;
        self.print(b'\n')
    }

    /// Sends the character in AL.
    pub fn print_al(&mut self) -> Result<(), IcedError> {
        self.mov(dx, u32::from(COM1))?;
        self.out(dx, al)
    }

    /// Writes a byte to a port.
    pub fn outb(&mut self, port: u16, value: u8) -> Result<(), IcedError> {
        self.mov(dx, u32::from(port))?;
        self.mov(al, u32::from(value))?;
        self.out(dx, al)
    }

    /// Writes to a physical address.
    pub fn store(&mut self, address: u32, value: u32) -> Result<(), IcedError> {
        self.mov(dword_ptr(address), value)
    }

    /// Has interrupts of this vector reach their handler, and no others, also where a firmware or another VMM than
    /// Outrigger has loaded the guest.
    pub fn silence_firmware(&mut self, vector: u8) -> Result<(), IcedError> {
        // A firmware may have left interrupts of its own behind it.
        self.outb(0x21, 0xff)?;
        self.outb(0xa1, 0xff)?;
        // Whoever loads the guest chooses the code segment. The gate is to have the same.
        self.mov(word_ptr(INTERRUPT_TABLE + u32::from(vector) * 8 + 2), cs)
    }

    /// Switches the local APIC on and allows interrupts.
    pub fn allow_interrupts(&mut self) -> Result<(), IcedError> {
        const POINTER: u32 = SCRATCH + 0x800;
        let limit = u32::from(INTERRUPT_VECTORS) * 8 - 1;
        self.mov(esp, STACK)?;
        // Limit and base, packed.
        self.store(POINTER, limit | INTERRUPT_TABLE << 16)?;
        self.store(POINTER + 4, INTERRUPT_TABLE >> 16)?;
        self.lidt(ptr(POINTER))?;
        self.enable_apic()?;
        self.sti()
    }

    fn enable_apic(&mut self) -> Result<(), IcedError> {
        // By the spurious interrupt vector register.
        self.store(LOCAL_APIC + 0xf0, 0x1ff)
    }

    /// Starts the second CPU, which begins at `entry` in the same mode as the first did, without a stack.
    pub fn start_second_cpu(&mut self, entry: CodeLabel) -> Result<(), IcedError> {
        self.start_other_cpus(1, entry)
    }

    /// As [`Self::start_second_cpu`], so many of them. The local APIC's id tells which is which.
    pub fn start_other_cpus(&mut self, count: u32, entry: CodeLabel) -> Result<(), IcedError> {
        /// A page that a CPU in real mode can be started in, and what is in it.
        const PAGE: u32 = 0x8000;
        const TABLE: u32 = PAGE + 0x40;
        const TABLE_POINTER: u32 = PAGE + 0x80;
        #[rustfmt::skip]
        const REAL_MODE: [u8; 24] = [
            0x0f, 0x01, 0x16, 0x80, 0x80,   // lgdt [TABLE_POINTER]
            0x0f, 0x20, 0xc0,               // mov eax, cr0
            0x0c, 0x01,                     // or al, 1
            0x0f, 0x22, 0xc0,               // mov cr0, eax
            0x66, 0xea, 0, 0, 0, 0, 0x10, 0, // jmp 0x10:entry
            0x90, 0x90, 0x90,
        ];
        const ENTRY: u32 = PAGE + 15;
        /// No descriptor, none, flat code, flat data (Intel SDM, volume 3, 3.4.5).
        const DESCRIPTORS: [u64; 4] = [0, 0, 0x00cf_9b00_0000_ffff, 0x00cf_9300_0000_ffff];

        let mut on = self.create_label();
        for (word, address) in REAL_MODE.as_chunks().0.iter().zip((PAGE..).step_by(4)) {
            self.store(address, u32::from_le_bytes(*word))?;
        }
        let table = DESCRIPTORS.iter().flat_map(|entry| entry.to_le_bytes());
        let table: Vec<_> = table.collect();
        for (word, address) in table.as_chunks().0.iter().zip((TABLE..).step_by(4)) {
            self.store(address, u32::from_le_bytes(*word))?;
        }
        self.store(TABLE_POINTER, 31 | TABLE << 16)?;
        self.store(TABLE_POINTER + 4, 0)?;
        // The call leaves the address of what follows it, where the second CPU begins.
        self.mov(esp, STACK)?;
        self.call(on)?;
        self.mov(eax, 0x18)?;
        self.mov(ds, eax)?;
        self.mov(ss, eax)?;
        self.jmp(entry)?;
        self.set_label(&mut on)?;
        self.pop(eax)?;
        self.mov(dword_ptr(ENTRY), eax)?;
        self.enable_apic()?;
        // The interrupt command register: INIT, and then a start-up message that names the page.
        for id in 1..=count {
            self.store(LOCAL_APIC + 0x310, id << 24)?;
            self.store(LOCAL_APIC + 0x300, 0x4500)?;
            self.store(LOCAL_APIC + 0x300, 0x4600 | PAGE >> 12)?;
        }
        Ok(())
    }

    /// What follows handles interrupts of this vector, up to [`Code::end_handler`]; it may use EAX and EDX.
    pub fn begin_handler(&mut self, vector: u8) -> Result<(), IcedError> {
        self.handler(vector)?;
        self.push(eax)?;
        self.push(edx)
    }

    /// What follows is where interrupts of this vector go.
    fn handler(&mut self, vector: u8) -> Result<(), IcedError> {
        let mut handler = self.create_label();
        self.set_label(&mut handler)?;
        self.handlers.push((vector, handler));
        Ok(())
    }

    /// Ends a handler. (KVM's emulator knows no IRET in protected mode: the flags are restored, and the code segment,
    /// which is the same, is dropped from the stack.)
    pub fn end_handler(&mut self) -> Result<(), IcedError> {
        self.store(LOCAL_APIC + 0xb0, 0)?;
        self.pop(edx)?;
        self.pop(eax)?;
        self.push(dword_ptr(esp + 8))?;
        self.popfd()?;
        self.ret_1(8)
    }

    /// Has the I/O APIC send INTA of the first device to vector 0x60.
    ///
    /// # Errors
    /// As of the assembler.
    pub fn route_intx(&mut self) -> Result<(), IcedError> {
        // Pin A of device 1 is the second of four lines from GSI 16 on.
        const GSI: u32 = 17;
        // The redirection entry: level-triggered, active low, to APIC 0.
        for (register, value) in [
            (0x11 + 2 * GSI, 0),
            (0x10 + 2 * GSI, 1 << 15 | 1 << 13 | 0x60),
        ] {
            self.store(IO_APIC, register)?;
            self.store(IO_APIC + 0x10, value)?;
        }
        Ok(())
    }

    /// Waits until the word at a physical address has this value.
    pub fn wait_for(&mut self, address: u32, value: u32) -> Result<(), IcedError> {
        let mut again = self.create_label();
        self.set_label(&mut again)?;
        self.pause()?;
        self.cmp(dword_ptr(address), value)?;
        self.jne(again)
    }

    /// Switches the machine off.
    pub fn power_off(&mut self) -> Result<(), IcedError> {
        // Sleep type 5, as \_S5 says, and the bit that enters it.
        self.outb(SLEEP_CONTROL, 5 << 2 | 1 << 5)?;
        self.halt()
    }

    /// Waits for what comes.
    pub fn halt(&mut self) -> Result<(), IcedError> {
        let mut again = self.create_label();
        self.set_label(&mut again)?;
        self.hlt()?;
        self.jmp(again)
    }
}

/// An ELF file with these pieces of memory, and a note that says where to enter it: `XEN_ELFNOTE_PHYS32_ENTRY`.
fn elf(pieces: [(u32, &[u8]); 2]) -> Vec<u8> {
    const LOAD: u32 = 1;
    const NOTE: u32 = 4;
    /// The note and the two pieces.
    const COUNT: u16 = 3;
    const HEADER: u16 = 64;
    const SEGMENT: u16 = 56;

    let mut note = Vec::new();
    for word in [4u32, 4, 18] {
        note.extend(word.to_le_bytes()); // lengths of name and value, and the type
    }
    note.extend(b"Xen\0");
    note.extend(CODE.to_le_bytes());

    let mut segments = vec![(NOTE, 0, note.as_slice())];
    segments.extend(
        pieces
            .iter()
            .map(|(address, bytes)| (LOAD, *address, *bytes)),
    );

    let mut elf = Vec::new();
    elf.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    elf.extend(2u16.to_le_bytes()); // an executable
    elf.extend(62u16.to_le_bytes()); // for x86-64
    elf.extend(1u32.to_le_bytes());
    for address in [CODE.into(), HEADER.into(), 0] {
        elf.extend(u64::to_le_bytes(address)); // entry, program headers, section headers
    }
    elf.extend(0u32.to_le_bytes());
    for half in [HEADER, SEGMENT, COUNT, 0, 0, 0] {
        elf.extend(half.to_le_bytes()); // sizes and counts of headers
    }
    let mut offset = u64::from(HEADER + COUNT * SEGMENT);
    for (kind, address, bytes) in &segments {
        let size = bytes.len() as u64;
        elf.extend(kind.to_le_bytes());
        elf.extend(7u32.to_le_bytes());
        for value in [
            offset,
            u64::from(*address),
            u64::from(*address),
            size,
            size,
            4,
        ] {
            elf.extend(value.to_le_bytes());
        }
        offset += size;
    }
    for (_, _, bytes) in segments {
        elf.extend(bytes);
    }
    elf
}
