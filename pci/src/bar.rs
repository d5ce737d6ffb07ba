//! Base address registers: what a function decodes, and where (7.5.1.2.1).

use std::mem;

use thiserror::Error;

use crate::endpoint::BarIndex;
use crate::header::{self, Command};
use crate::register::{self, Register};
use crate::state::{BarsState, StateError};

/// What space a BAR is in, and how wide its address is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BarKind {
    /// I/O ports.
    Io,
    /// Memory, with a 32-bit address.
    Memory32 {
        /// Whether reads have no side effects and writes may be merged.
        prefetchable: bool,
    },
    /// Memory, with a 64-bit address: the register after this one is its upper half.
    Memory64 {
        /// Whether reads have no side effects and writes may be merged.
        prefetchable: bool,
    },
}

impl BarKind {
    /// The read-only bits at the bottom of the register: 3:0 for memory, 1:0 for I/O.
    pub const fn type_bits(self) -> u32 {
        match self {
            Self::Io => 0b0001,
            Self::Memory32 { prefetchable } => (prefetchable as u32) << 3,
            Self::Memory64 { prefetchable } => 0b0100 | (prefetchable as u32) << 3,
        }
    }

    /// The kind of BAR that this register belongs to.
    fn from_register(bar: BarIndex, register: u32) -> Result<Self, BarError> {
        let prefetchable = register & 0b1000 != 0;
        match register & 0b0111 {
            0b0000 => Ok(Self::Memory32 { prefetchable }),
            0b0100 => Ok(Self::Memory64 { prefetchable }),
            0b0010 | 0b0110 => Err(BarError::ReservedType { bar, register }),
            _ => Ok(Self::Io),
        }
    }

    /// The smallest and the largest size in bytes. An I/O BAR is at most 256 bytes (PCI Local Bus 3.0, 6.2.5.1).
    const fn size_limits(self) -> (u64, u64) {
        match self {
            Self::Io => (4, 256),
            Self::Memory32 { .. } => (16, 1 << 31),
            Self::Memory64 { .. } => (16, 1 << 63),
        }
    }

    /// The last address of the space: an x86 has 64 Ki ports.
    const fn last_address(self) -> u64 {
        match self {
            Self::Io => 0xffff,
            Self::Memory32 { .. } => u32::MAX as u64,
            Self::Memory64 { .. } => u64::MAX,
        }
    }

    const fn enabled_by(self) -> Command {
        match self {
            Self::Io => Command::IO_SPACE,
            Self::Memory32 { .. } | Self::Memory64 { .. } => Command::MEMORY_SPACE,
        }
    }
}

/// A BAR that a function has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BarSpec {
    /// What space it is in.
    pub kind: BarKind,
    /// How many bytes it decodes, a power of two.
    pub size: u64,
}

impl BarSpec {
    /// What BARs a device has, by the registers in its configuration space and the sizes of its regions in bytes,
    /// zero for those it has not. [`Bars::new`] checks them.
    ///
    /// A size that no BAR can have is rounded up. The upper half of a 64-bit BAR is never a BAR of its own, whatever
    /// its register or its size say: libvfio-user has 1 there until it is first written.
    pub fn from_registers(
        registers: [u32; 6],
        sizes: [u64; 6],
    ) -> Result<[Option<Self>; 6], BarError> {
        let mut specs = [None; 6];
        let mut is_upper_half = false;
        let raw = registers.into_iter().zip(sizes);
        for ((bar, slot), (register, size)) in BarIndex::ALL.into_iter().zip(&mut specs).zip(raw) {
            if mem::take(&mut is_upper_half) || size == 0 {
                continue;
            }
            let kind = BarKind::from_register(bar, register)?;
            let (smallest, _) = kind.size_limits();
            let size = size
                .max(smallest)
                .checked_next_power_of_two()
                .unwrap_or(size);
            let spec = Self { kind, size };
            is_upper_half = spec.is_64bit();
            *slot = Some(spec);
        }
        Ok(specs)
    }

    fn check(&self, bar: BarIndex) -> Result<(), BarError> {
        let (min, max) = self.kind.size_limits();
        if self.size.is_power_of_two() && (min..=max).contains(&self.size) {
            Ok(())
        } else {
            Err(BarError::Size {
                bar,
                size: self.size,
                min,
                max,
            })
        }
    }

    const fn is_64bit(&self) -> bool {
        matches!(self.kind, BarKind::Memory64 { .. })
    }

    /// The address bits that the guest can write, in the lower and the upper register.
    const fn writable(&self) -> (u32, u32) {
        halves(!(self.size - 1))
    }
}

/// Why a function cannot have these BARs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum BarError {
    /// A size that is no power of two, or out of bounds.
    #[error("{bar} is {size:#x} bytes, which is no power of two from {min:#x} to {max:#x}")]
    Size {
        /// Which BAR.
        bar: BarIndex,
        /// Its size.
        size: u64,
        /// The smallest that its kind can have.
        min: u64,
        /// The largest that its kind can have.
        max: u64,
    },
    /// A BAR in the upper half of another.
    #[error("{bar} is where the upper half of {lower} is")]
    UpperHalf {
        /// The BAR that cannot be.
        bar: BarIndex,
        /// The 64-bit BAR before it.
        lower: BarIndex,
    },
    /// The last BAR is a 64-bit one.
    #[error("BAR5 is a 64-bit BAR, and there is no register for its upper half")]
    NoUpperHalf,
    /// A memory BAR whose type, bits 2:1, is reserved: 01b was "below 1 MiB" before PCI 3.0.
    #[error("{bar} is of a reserved memory type: its register is {register:#010x}")]
    ReservedType {
        /// Which BAR.
        bar: BarIndex,
        /// Its register.
        register: u32,
    },
}

/// A function's six base address registers, and the expansion ROM's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bars {
    specs: [Option<BarSpec>; 6],
    registers: [Register; 6],
    rom: Option<BarSpec>,
    rom_register: Register,
}

/// The smallest and the largest expansion ROM in bytes: address bits 31:11 (7.5.1.2.4), and the firmware specification's
/// limit of 16 MiB.
const ROM_SIZES: (u64, u64) = (2 << 10, 16 << 20);

/// The bit of its register that has the expansion ROM decode.
const ROM_ENABLE: u32 = 1;

impl Bars {
    /// Registers for these BARs, all at address zero. The slot after a 64-bit BAR must be `None`.
    pub fn new(specs: [Option<BarSpec>; 6]) -> Result<Self, BarError> {
        let mut registers = [Register::default(); 6];
        let mut lower: Option<(BarIndex, BarSpec)> = None;
        for ((bar, spec), register) in BarIndex::ALL.into_iter().zip(specs).zip(&mut registers) {
            match (lower.take(), spec) {
                (None, None) => (),
                (None, Some(spec)) => {
                    spec.check(bar)?;
                    register.value = spec.kind.type_bits();
                    (register.writable, _) = spec.writable();
                    lower = spec.is_64bit().then_some((bar, spec));
                }
                (Some((_, lower)), None) => (_, register.writable) = lower.writable(),
                (Some((lower, _)), Some(_)) => return Err(BarError::UpperHalf { bar, lower }),
            }
        }
        match lower {
            None => Ok(Self {
                specs,
                registers,
                rom: None,
                rom_register: Register::default(),
            }),
            Some(_) => Err(BarError::NoUpperHalf),
        }
    }

    /// The same with an expansion ROM, whose size in bytes is rounded up to one that it can have.
    pub fn with_rom(self, size: u64) -> Result<Self, BarError> {
        let (min, max) = ROM_SIZES;
        if size > max {
            return Err(BarError::Size {
                bar: BarIndex::ROM,
                size,
                min,
                max,
            });
        }
        let rom = BarSpec {
            kind: BarKind::Memory32 { prefetchable: true },
            size: size.max(min).next_power_of_two(),
        };
        let (address, _) = rom.writable();
        Ok(Self {
            rom: Some(rom),
            rom_register: Register::new(0, address | ROM_ENABLE),
            ..self
        })
    }

    /// The guest reads at `offset` of the configuration space. Bytes outside the registers are left as they are.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        if let Some(offset) = offset.checked_sub(header::EXPANSION_ROM) {
            register::read(&[self.rom_register], offset.into(), data);
        } else if let Some(offset) = offset.checked_sub(header::BARS) {
            register::read(&self.registers, offset.into(), data);
        }
    }

    /// The guest writes at `offset` of the configuration space. Bytes outside the registers are dropped.
    ///
    /// Only address bits change, so all-ones reads back as the mask that tells a BAR's size.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        if let Some(offset) = offset.checked_sub(header::EXPANSION_ROM) {
            let rom = std::slice::from_mut(&mut self.rom_register);
            register::write(rom, offset.into(), data);
        } else if let Some(offset) = offset.checked_sub(header::BARS) {
            register::write(&mut self.registers, offset.into(), data);
        }
    }

    /// The address in this BAR's registers, decoded or not; `None` if there is no such BAR.
    pub fn address(&self, bar: BarIndex) -> Option<u64> {
        let spec = self.spec(bar)?;
        if bar == BarIndex::ROM {
            return Some(u64::from(self.rom_register.value) & !(spec.size - 1));
        }
        let mut registers = self.registers.iter().skip(bar.index());
        let mut next = || {
            registers
                .next()
                .map_or(0, |register| u64::from(register.value))
        };
        let low = next();
        let high = if spec.is_64bit() { next() } else { 0 };
        Some((high << 32 | low) & !(spec.size - 1))
    }

    /// Sets this BAR's address, as firmware would: bits that its registers do not have are dropped. Does nothing if
    /// there is no such BAR.
    pub fn set_address(&mut self, bar: BarIndex, address: u64) {
        let Some(spec) = self.spec(bar) else { return };
        let used = if spec.is_64bit() { 2 } else { 1 };
        let (low, high) = halves(address);
        if bar == BarIndex::ROM {
            let enable = self.rom_register.value & ROM_ENABLE;
            self.rom_register.write(low & !ROM_ENABLE | enable);
            return;
        }
        let registers = self.registers.iter_mut().skip(bar.index()).take(used);
        for (register, half) in registers.zip([low, high]) {
            register.write(half);
        }
    }

    /// What is to be saved of them.
    pub fn save(&self) -> BarsState {
        BarsState {
            registers: self.registers.map(|register| register.value),
            rom: self.rom_register.value,
        }
    }

    /// The same BARs where saved ones are.
    pub fn restored(&self, state: &BarsState) -> Result<Self, StateError> {
        let mut bars = self.clone();
        let registers = bars.registers.iter_mut().zip(state.registers).enumerate();
        for (index, (register, value)) in registers {
            *register = register
                .restored(value)
                .ok_or_else(|| StateError::impossible("base address registers", index, value))?;
        }
        bars.rom_register = bars.rom_register.restored(state.rom).ok_or_else(|| {
            let rom = BarIndex::ROM.index();
            StateError::impossible("base address registers", rom, state.rom)
        })?;
        Ok(bars)
    }

    /// What this BAR is, if there is one.
    pub fn spec(&self, bar: BarIndex) -> Option<&BarSpec> {
        if bar == BarIndex::ROM {
            return self.rom.as_ref();
        }
        self.specs.get(bar.index())?.as_ref()
    }

    /// Every BAR that there is, in order, and the ROM.
    pub fn specs(&self) -> impl Iterator<Item = (BarIndex, &BarSpec)> {
        let bars = BarIndex::ALL_AND_ROM.into_iter();
        bars.filter_map(|bar| Some((bar, self.spec(bar)?)))
    }

    /// Where each BAR answers, given the Command register.
    ///
    /// A BAR at address zero or past the end of its space answers nowhere. One that is being sized while its space is
    /// enabled does answer, at the top of that space, as a real one would: refusing that is up to
    /// [`BarMapper::map`](crate::BarMapper::map), which knows the host bridge's windows.
    pub fn decoded(&self, command: Command) -> Decoded {
        let rom_enabled = self.rom_register.value & ROM_ENABLE != 0;
        Decoded(BarIndex::ALL_AND_ROM.map(|bar| {
            let spec = self.spec(bar)?;
            let address = self.address(bar)?;
            let last = address.checked_add(spec.size - 1)?;
            let answers = command.contains(spec.kind.enabled_by())
                && (bar != BarIndex::ROM || rom_enabled)
                && address != 0
                && last <= spec.kind.last_address();
            answers.then_some(address)
        }))
    }
}

/// The lower and the upper half of a 64-bit value.
const fn halves(value: u64) -> (u32, u32) {
    ((value & 0xffff_ffff) as u32, (value >> 32) as u32)
}

/// Where each of a function's BARs answers; by default, nowhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Decoded([Option<u64>; 7]);

impl Decoded {
    /// Where this BAR answers, if it does.
    pub fn address(&self, bar: BarIndex) -> Option<u64> {
        self.0.get(bar.index()).copied().flatten()
    }

    /// What leads from `self` to `new`: the BARs to unmap, and then those to map with their addresses. A BAR that
    /// moved is in both.
    pub fn changes(
        &self,
        new: &Self,
    ) -> (
        impl Iterator<Item = BarIndex>,
        impl Iterator<Item = (BarIndex, u64)>,
    ) {
        let changed = move |bar: &BarIndex| self.address(*bar) != new.address(*bar);
        let unmap = BarIndex::ALL_AND_ROM.into_iter().filter(changed);
        let map = BarIndex::ALL_AND_ROM.into_iter().filter(changed);
        (
            unmap.filter(|bar| self.address(*bar).is_some()),
            map.filter_map(|bar| Some((bar, new.address(bar)?))),
        )
    }
}

#[cfg(test)]
mod tests;
