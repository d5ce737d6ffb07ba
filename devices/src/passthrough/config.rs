//! An endpoint's configuration space: which registers are the VMM's own, and what a write to them leads to.
//!
//! The VMM owns what it virtualises (identity, BARs, interrupts, the headers of capabilities) and answers for it
//! without asking the device. All else is the device's.

use std::collections::BTreeMap;
use std::ops::Range;

use pci::header::{self, Command};
use pci::{
    BarIndex, BarSpec, Bars, Capability, ConfigSpace, Decoded, ExtendedCapability, InterruptPin,
    Msi, MsiMessage, Msix, MsixLayout,
};

use super::probe::ProbeError;
use super::state::{ConfigState, RestoreError};

/// Device Capabilities in the PCI Express capability, and its function-level reset bit (PCIe 5.0, 7.5.3.3).
const DEVICE_CAPABILITIES: u16 = 4;
const FLR_CAPABLE: u32 = 1 << 28;
/// Device Control, and the bit of its second byte that starts a function-level reset (7.5.3.4).
const DEVICE_CONTROL: u16 = 8;
const INITIATE_FLR: u8 = 1 << 7;
/// The same in the Advanced Features capability, which conventional devices have (7.9.22).
const AF_CAPABILITIES: u16 = 3;
const AF_FLR_CAPABLE: u8 = 1 << 1;
const AF_CONTROL: u16 = 4;
const AF_INITIATE_FLR: u8 = 1;
/// Power Management Control/Status, and its power state (7.5.2.2).
const POWER_CONTROL: u16 = 4;
const POWER_STATE: u16 = 3;

/// The bits of the Status register that the device owns: an interrupt is pending, and the errors.
const DEVICE_STATUS: u16 = 0xf908;

/// Capabilities that a guest cannot use here (the rest of the list is the kernel's own).
const HIDDEN_EXTENDED: [u16; 7] = [
    ExtendedCapability::ARI,
    ExtendedCapability::ATS,
    ExtendedCapability::SRIOV,
    ExtendedCapability::PRI,
    ExtendedCapability::PASID,
    ExtendedCapability::RESIZABLE_BAR,
    ExtendedCapability::VF_RESIZABLE_BAR,
];

/// A configuration space with all that a guest can do to it.
#[derive(Debug, Clone)]
pub(super) struct Config {
    /// The values of what the VMM owns.
    space: ConfigSpace,
    /// How many bytes the device has.
    size: u16,
    /// Which bits of each byte the VMM owns.
    owned: Box<[u8]>,
    pub(super) bars: Bars,
    pub(super) msi: Option<(u16, Msi)>,
    pub(super) msix: Option<(u16, Msix)>,
    /// Where the power management capability is.
    power: Option<u16>,
    /// The power state that the guest has chosen; 0 is on.
    power_state: u16,
    /// Where a write starts a function-level reset: bytes and bits in them.
    resets: Vec<(u16, u8)>,
    /// What of the device's own registers says what it can, and never changes.
    abilities: Vec<Range<u16>>,
}

/// What a write leads to, apart from the new values.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Effects {
    /// A function-level reset, and nothing else.
    pub(super) reset: bool,
    /// Vectors of MSI or MSI-X whose message changed.
    pub(super) messages: Vec<(u16, Option<MsiMessage>)>,
    /// The registers that the device is to see, as offsets and values.
    pub(super) forward: Vec<Forward>,
}

/// A register write for the device.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Forward {
    pub(super) offset: u16,
    pub(super) data: Vec<u8>,
    /// Whether it is the control register of MSI or MSI-X, which not every backend wants.
    pub(super) message_control: bool,
}

impl Config {
    /// Makes the configuration space of an endpoint on the root bus out of what the device's own reads, `size` bytes
    /// of it, and the BARs that it has.
    pub(super) fn new(mut space: ConfigSpace, size: u16, bars: Bars) -> Result<Self, ProbeError> {
        let mut owned = vec![0; ConfigSpace::SIZE.into()].into_boxed_slice();
        let mut own = |range: Range<u16>| {
            if let Some(bytes) = owned.get_mut(range.start.into()..range.end.into()) {
                bytes.fill(0xff);
            }
        };
        own(0..header::END);
        own(size..ConfigSpace::SIZE);

        let mut msi = None;
        let mut msix = None;
        let mut power = None;
        let mut resets = Vec::new();
        let mut abilities = Vec::new();
        let list: Vec<_> = pci::capabilities(|offset| space.dword(offset)).collect();
        for capability in list {
            let Capability { id, offset } = capability?;
            let start = u16::from(offset);
            own(start..start + 2);
            match id {
                Capability::POWER_MANAGEMENT => {
                    power = Some(start);
                    abilities.push(start + 2..start + 4);
                }
                Capability::MSI => {
                    let state = Msi::new(space.word(start + 2));
                    own(start..start + u16::from(state.length()));
                    msi = Some((start, state));
                }
                Capability::MSIX => {
                    own(start..start + 12);
                    let layout = MsixLayout::parse(&space, offset)?;
                    msix = Some((start, Msix::new(layout.vectors)));
                }
                Capability::EXPRESS => {
                    own(start..start + 4);
                    pci::make_integrated_endpoint(&mut space, offset);
                    own(start + 0x0c..start + 0x14);
                    abilities.push(start + DEVICE_CAPABILITIES..start + DEVICE_CAPABILITIES + 4);
                    if space.word(start + 2) & 0xf >= 2 {
                        own(start + 0x2c..start + 0x34);
                        abilities.push(start + 0x24..start + 0x28);
                    }
                    if space.dword(start + DEVICE_CAPABILITIES) & FLR_CAPABLE != 0 {
                        resets.push((start + DEVICE_CONTROL + 1, INITIATE_FLR));
                    }
                }
                Capability::ADVANCED_FEATURES
                    if space.byte(start + AF_CAPABILITIES) & AF_FLR_CAPABLE != 0 =>
                {
                    resets.push((start + AF_CONTROL, AF_INITIATE_FLR));
                }
                _ => {}
            }
        }
        let list: Vec<_> = pci::extended_capabilities(|offset| space.dword(offset)).collect();
        for capability in list {
            let ExtendedCapability { id, offset, .. } = capability?;
            own(offset..offset + 4);
            if HIDDEN_EXTENDED.contains(&id) {
                pci::hide_extended_capability(&mut space, offset)?;
            }
        }

        let mut config = Self {
            space,
            size,
            owned,
            bars,
            msi,
            msix,
            power,
            power_state: 0,
            resets,
            abilities,
        };
        config.set_up_header();
        Ok(config)
    }

    /// The header after power-on, and what the guest can write there.
    fn set_up_header(&mut self) {
        let space = &mut self.space;
        let function = space.byte(header::HEADER_TYPE) & !header::MULTI_FUNCTION;
        space.set(header::HEADER_TYPE, &[function]);
        space.set(header::BIST, &[0]);
        space.set(header::COMMAND, &[0; 2]);
        let command = Command::all().bits();
        space.set_writable(header::COMMAND, &command.to_le_bytes());
        space.set_writable(header::CACHE_LINE_SIZE, &[0xff]);
        space.set_writable(header::INTERRUPT_LINE, &[0xff]);
        let status = header::STATUS.into();
        if let Some(bytes) = self.owned.get_mut(status..status + 2) {
            bytes.copy_from_slice(&(!DEVICE_STATUS).to_le_bytes());
        }
        self.show_virtual_registers();
    }

    /// Copies the registers that have a model of their own into the bytes that the guest reads.
    fn show_virtual_registers(&mut self) {
        let mut bars = [0; (header::BARS_END - header::BARS) as usize];
        self.bars.read(header::BARS, &mut bars);
        self.space.set(header::BARS, &bars);
        let mut rom = [0; 4];
        self.bars.read(header::EXPANSION_ROM, &mut rom);
        self.space.set(header::EXPANSION_ROM, &rom);
        if let Some((offset, msix)) = &self.msix {
            self.space.set(offset + 2, &msix.control().to_le_bytes());
        }
    }

    /// Sets the addresses of the BARs, as firmware would.
    pub(super) fn set_bars(&mut self, bars: Bars) {
        self.bars = bars;
        self.show_virtual_registers();
    }

    /// Sets the addresses of the BARs to zero, as a function-level reset does.
    pub(super) fn forget_addresses(&mut self) {
        for bar in BarIndex::ALL_AND_ROM {
            self.bars.set_address(bar, 0);
        }
        self.show_virtual_registers();
    }

    /// How many bytes the device has.
    pub(super) fn size(&self) -> u16 {
        self.size
    }

    /// What is the same in every device of its kind, whatever the guest does, by offset, in dwords that are not zero.
    /// BARs are not among it. To be asked before a guest has done anything.
    pub(super) fn constants(&self) -> BTreeMap<u16, u32> {
        let mut constants = BTreeMap::new();
        for offset in (0..ConfigSpace::SIZE).step_by(4) {
            let is_bar = (header::BARS..header::BARS_END).contains(&offset)
                || offset == header::EXPANSION_ROM;
            let mut value = [0; 4];
            self.read(offset, &mut value, |_| false);
            for (at, byte) in (offset..).zip(&mut value) {
                if self.abilities.iter().any(|range| range.contains(&at)) {
                    *byte = self.space.byte(at);
                }
                *byte &= !self.space.writable(at);
            }
            let value = u32::from_le_bytes(value);
            if !is_bar && value != 0 {
                constants.insert(offset, value);
            }
        }
        constants
    }

    /// What is to be saved of what the VMM owns.
    pub(super) fn save(&self) -> ConfigState {
        ConfigState {
            space: self.space.save(),
            bars: self.bars.save(),
            msi: self.msi.as_ref().map(|(_, msi)| msi.save()),
            msix: self.msix.as_ref().map(|(_, msix)| msix.save()),
            power_state: self.power_state.to_le_bytes()[0],
        }
    }

    /// The same configuration space with what was saved.
    pub(super) fn restored(&self, state: &ConfigState) -> Result<Self, RestoreError> {
        let mut config = self.clone();
        config.space = self.space.restored(&state.space)?;
        config.bars = self.bars.restored(&state.bars)?;
        config.msi = match (&self.msi, &state.msi) {
            (Some((start, msi)), Some(state)) => Some((*start, msi.restored(state)?)),
            (None, None) => None,
            _ => return Err(RestoreError::Capability("MSI")),
        };
        config.msix = match (&self.msix, &state.msix) {
            (Some((start, msix)), Some(state)) => Some((*start, msix.restored(state)?)),
            (None, None) => None,
            _ => return Err(RestoreError::Capability("MSI-X")),
        };
        let power_state = u16::from(state.power_state);
        if power_state & !POWER_STATE != 0 || power_state != 0 && self.power.is_none() {
            return Err(RestoreError::PowerState(state.power_state));
        }
        config.power_state = power_state;
        config.show_virtual_registers();
        Ok(config)
    }

    /// The registers of the VMM's that the device has to see, too, as writes.
    pub(super) fn visible_to_device(&self) -> Vec<Forward> {
        let mut effects = Effects::default();
        effects.forward(header::COMMAND, &self.command().bits().to_le_bytes(), false);
        if let Some((start, msi)) = &self.msi {
            effects.forward(start + 2, &msi.save().control.to_le_bytes(), true);
        }
        if let Some((start, msix)) = &self.msix {
            effects.forward(start + 2, &msix.control().to_le_bytes(), true);
        }
        // Last, since it may hear nothing more then.
        if let Some(power) = self.power
            && self.power_state != 0
        {
            let state = self.power_state.to_le_bytes();
            effects.forward(power + POWER_CONTROL, &state, false);
        }
        effects.forward
    }

    pub(super) fn command(&self) -> Command {
        Command::from_bits_retain(self.space.word(header::COMMAND))
    }

    pub(super) fn interrupt_pin(&self) -> Option<InterruptPin> {
        InterruptPin::from_register(self.space.byte(header::INTERRUPT_PIN))
    }

    /// Where the BARs answer: nowhere while the function is not powered.
    pub(super) fn decoded(&self) -> Decoded {
        if self.power_state == 0 {
            self.bars.decoded(self.command())
        } else {
            Decoded::default()
        }
    }

    /// How many of these bytes the device must be asked for, from the first on: none, or as many as it has.
    pub(super) fn devices_part(&self, offset: u16, length: usize) -> usize {
        let start = usize::from(offset);
        let end = (start + length).min(self.size.into());
        let owned = self.owned.get(start..end).unwrap_or(&[]);
        if owned.iter().all(|&bits| bits == 0xff) {
            0
        } else {
            owned.len()
        }
    }

    /// Reads: what the device owns is in `data` already.
    pub(super) fn read(&self, offset: u16, data: &mut [u8], pending: impl Fn(u16) -> bool) {
        let mut ours = [0; 4];
        let Some(ours) = ours.get_mut(..data.len()) else {
            return;
        };
        self.space.read(offset, ours);
        if let Some((start, msi)) = &self.msi {
            let end = start + u16::from(msi.length());
            if (*start..end).contains(&offset) {
                msi.read(offset - start, ours, pending);
            }
        }
        let owned = self.owned.iter().skip(offset.into());
        for ((data, ours), owned) in data.iter_mut().zip(ours).zip(owned) {
            *data = *data & !owned | *ours & owned;
        }
    }

    /// Writes what the VMM owns, and says what is to be done about it and what is the device's.
    pub(super) fn write(&mut self, offset: u16, data: &[u8]) -> Effects {
        let mut effects = Effects::default();
        if self.starts_reset(offset, data) {
            effects.reset = true;
            return effects;
        }
        let command = self.command();
        self.space.write(offset, data);
        if self.command() != command {
            effects.forward(header::COMMAND, &self.command().bits().to_le_bytes(), false);
        }
        self.bars.write(offset, data);
        self.write_msi(offset, data, &mut effects);
        self.write_msix(offset, data, &mut effects);
        self.show_virtual_registers();
        if let Some(power) = self.power
            && let Some(state) = byte_at(offset, data, power + POWER_CONTROL)
        {
            self.power_state = u16::from(state) & POWER_STATE;
        }
        self.forward_devices(offset, data, &mut effects);
        effects
    }

    fn starts_reset(&self, offset: u16, data: &[u8]) -> bool {
        let starts = |&(at, bit)| byte_at(offset, data, at).is_some_and(|byte| byte & bit != 0);
        self.resets.iter().any(starts)
    }

    fn write_msi(&mut self, offset: u16, data: &[u8], effects: &mut Effects) {
        let Some((start, msi)) = &mut self.msi else {
            return;
        };
        let end = *start + u16::from(msi.length());
        if !(*start..end).contains(&offset) {
            return;
        }
        let control = |msi: &Msi| {
            let mut control = [0; 2];
            msi.read(2, &mut control, |_| false);
            control
        };
        let before = control(msi);
        let changes = msi.write(offset - *start, data);
        // If both are enabled, which a guest must not do, MSI-X it is.
        if !self.msix.as_ref().is_some_and(|(_, msix)| msix.enabled()) {
            effects.messages.extend(changes);
        }
        let after = control(msi);
        if after != before {
            effects.forward(*start + 2, &after, true);
        }
    }

    fn write_msix(&mut self, offset: u16, data: &[u8], effects: &mut Effects) {
        let Some((start, msix)) = &mut self.msix else {
            return;
        };
        let before = msix.control();
        let mut control = before.to_le_bytes();
        for (byte, index) in control.iter_mut().zip(0..) {
            if let Some(written) = byte_at(offset, data, *start + 2 + index) {
                *byte = written;
            }
        }
        effects
            .messages
            .extend(msix.set_control(u16::from_le_bytes(control)));
        if msix.control() != before {
            effects.forward(*start + 2, &msix.control().to_le_bytes(), true);
        }
    }

    /// Has the device see what it owns, in naturally aligned pieces.
    fn forward_devices(&self, offset: u16, data: &[u8], effects: &mut Effects) {
        let devices = |offset: u16| self.owned.get(usize::from(offset)) != Some(&0xff);
        let whole = (offset..).take(data.len()).all(devices);
        if whole {
            effects.forward(offset, data, false);
            return;
        }
        // What is left of a dword is a word or bytes.
        if let (Some((low, high)), true) = (data.split_at_checked(data.len() / 2), data.len() > 1) {
            let middle = offset + u16::try_from(low.len()).unwrap_or(0);
            self.forward_devices(offset, low, effects);
            self.forward_devices(middle, high, effects);
        }
    }
}

impl Effects {
    fn forward(&mut self, offset: u16, data: &[u8], message_control: bool) {
        self.forward.push(Forward {
            offset,
            data: data.to_vec(),
            message_control,
        });
    }
}

/// What an access of `data` at `offset` writes to the byte at `at`.
fn byte_at(offset: u16, data: &[u8], at: u16) -> Option<u8> {
    data.get(usize::from(at.checked_sub(offset)?)).copied()
}

/// What BARs the device has, by its registers and the sizes of its regions.
pub(super) fn bars(space: &ConfigSpace, sizes: [u64; 6]) -> Result<Bars, pci::BarError> {
    let mut offset = header::BARS;
    let registers = [(); 6].map(|()| {
        let register = space.dword(offset);
        offset += 4;
        register
    });
    Bars::new(BarSpec::from_registers(registers, sizes)?)
}
