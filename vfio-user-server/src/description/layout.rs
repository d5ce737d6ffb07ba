//! Checking a description, and laying out configuration space.

use std::ops::Range;

use super::bar::Kind;
use super::{
    BARS, Bar, Description, DescriptionError, Doorbell, EXPRESS, MAX_DOORBELLS, MSI, MSIX,
    MsixTable, Place, WINDOW_SIZE, Window,
};
use crate::config::{CONVENTIONAL_SIZE, ConfigSpace, EXPRESS_SIZE, command, register};

/// A description that has been checked.
#[derive(Debug)]
pub(crate) struct Layout {
    pub(crate) config: ConfigSpace,
    pub(crate) places: Places,
    bars: [Option<Bar>; BARS],
    pub(crate) intx: bool,
    pub(crate) msi: u16,
    pub(crate) msix: Option<MsixTable>,
    pub(crate) window: Option<WindowPlace>,
    pub(crate) doorbells: Vec<Doorbell>,
}

/// Where in configuration space the capabilities are that the library acts upon, in bytes.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Places {
    pub(crate) msi: Option<usize>,
    pub(crate) msix: Option<usize>,
    pub(crate) express: Option<usize>,
}

/// A window, and where its capability is in configuration space.
#[derive(Clone, Debug)]
pub(crate) struct WindowPlace {
    /// The bytes of the capability after its header.
    pub(crate) registers: Range<usize>,
    /// The register that is the window.
    pub(crate) data: Range<usize>,
    pub(crate) place: fn(&[u8]) -> Option<Place>,
}

impl WindowPlace {
    fn new(window: Window, registers: Range<usize>) -> Result<Self, DescriptionError> {
        let start = registers.start.saturating_add(window.data);
        let data = start..start.saturating_add(WINDOW_SIZE);
        if data.end > registers.end {
            return Err(DescriptionError::Window);
        }
        Ok(Self {
            registers,
            data,
            place: window.place,
        })
    }

    /// Whether an access is, with some of its bytes, one to what the window is on.
    pub(crate) fn is_at(&self, offset: u64, count: usize) -> bool {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        start < self.data.end && self.data.start < start.saturating_add(count)
    }
}

impl Layout {
    pub(crate) fn bar(&self, index: usize) -> Option<&Bar> {
        self.bars.get(index)?.as_ref()
    }
}

impl Description {
    /// Checks it, and lays it out.
    pub(crate) fn lay_out(self) -> Result<Layout, DescriptionError> {
        self.check_bars()?;
        self.check_msix()?;
        self.check_doorbells()?;
        if let Some(vectors) = self.msi
            && !matches!(vectors, 1 | 2 | 4 | 8 | 16 | 32)
        {
            return Err(DescriptionError::Vectors(vectors));
        }
        let (config, places, window) = self.config_space()?;
        Ok(Layout {
            config,
            places,
            bars: self.bars,
            intx: self.intx,
            msi: self.msi.unwrap_or(0),
            msix: self.msix,
            window,
            doorbells: self.doorbells,
        })
    }

    fn check_bars(&self) -> Result<(), DescriptionError> {
        if let Some(bar) = self.wrong_bar {
            return Err(DescriptionError::NoSuchBar(bar));
        }
        for (index, bar) in (0_u8..).zip(&self.bars) {
            let Some(bar) = bar else { continue };
            let sizes = match bar.kind {
                Kind::Io => 4..=256,
                Kind::Memory32 { .. } => 16..=1 << 31,
                Kind::Memory64 { .. } => 16..=1 << 62,
            };
            if !bar.size.is_power_of_two() || !sizes.contains(&bar.size) {
                let size = bar.size;
                return Err(DescriptionError::BarSize { bar: index, size });
            }
            let upper = self.bars.get(usize::from(index) + 1);
            if matches!(bar.kind, Kind::Memory64 { .. }) && !matches!(upper, Some(None)) {
                return Err(DescriptionError::UpperHalf(index));
            }
            bar.check_areas(index)?;
        }
        Ok(())
    }

    fn check_msix(&self) -> Result<(), DescriptionError> {
        let Some(msix) = &self.msix else {
            return Ok(());
        };
        if !(1..=2048).contains(&msix.vectors) {
            return Err(DescriptionError::Vectors(msix.vectors));
        }
        let [table, pending] = [msix.table(), msix.pending()];
        let fits = |bar: u8, range: &Range<u64>| {
            range.start.is_multiple_of(8) && self.is_trapped(bar, range)
        };
        let apart = msix.table_bar != msix.pending_bar
            || table.end <= pending.start
            || pending.end <= table.start;
        if fits(msix.table_bar, &table) && fits(msix.pending_bar, &pending) && apart {
            Ok(())
        } else {
            Err(DescriptionError::Msix)
        }
    }

    fn check_doorbells(&self) -> Result<(), DescriptionError> {
        if self.doorbells.len() > MAX_DOORBELLS {
            return Err(DescriptionError::Doorbells);
        }
        for doorbell in &self.doorbells {
            let end = doorbell.offset.saturating_add(doorbell.size.into());
            let fits = self.is_trapped(doorbell.bar, &(doorbell.offset..end));
            let bits = 8 * u32::from(doorbell.size);
            let is_too_large = |value: u64| value.checked_shr(bits).is_some_and(|rest| rest != 0);
            let value_fits = !doorbell.value.is_some_and(is_too_large);
            if !matches!(doorbell.size, 1 | 2 | 4 | 8) || !fits || !value_fits {
                return Err(DescriptionError::Doorbell(*doorbell));
            }
        }
        Ok(())
    }

    /// Whether a range is in a BAR and in no part of it that can be mapped.
    fn is_trapped(&self, bar: u8, range: &Range<u64>) -> bool {
        let Some(Some(bar)) = self.bars.get(usize::from(bar)) else {
            return false;
        };
        let mapped = |area: &Range<u64>| area.start < range.end && range.start < area.end;
        range.end <= bar.size && !bar.areas.iter().any(mapped)
    }

    fn config_space(&self) -> Result<(ConfigSpace, Places, Option<WindowPlace>), DescriptionError> {
        let is_express = self
            .capabilities
            .iter()
            .any(|capability| capability.id == u16::from(EXPRESS));
        let size = if is_express {
            EXPRESS_SIZE
        } else {
            CONVENTIONAL_SIZE
        };
        let mut config = ConfigSpace::new(size);
        self.define_header(&mut config);
        let (places, window) = self.define_capabilities(&mut config)?;
        self.define_extended(&mut config)?;
        Ok((config, places, window))
    }

    fn define_header(&self, config: &mut ConfigSpace) {
        let ids = &self.ids;
        for (offset, id) in [
            (register::VENDOR, ids.vendor),
            (register::DEVICE, ids.device),
            (register::SUBSYSTEM_VENDOR, ids.subsystem_vendor),
            (register::SUBSYSTEM, ids.subsystem),
        ] {
            config.define(offset, &id.to_le_bytes(), &[0; 2]);
        }
        let class = ids.class << 8 | u32::from(ids.revision);
        config.define(register::REVISION, &class.to_le_bytes(), &[0; 4]);
        let mut writable = command::BUS_MASTER | command::PARITY | command::SERR;
        for (index, bar) in self.bars.iter().enumerate() {
            let Some(bar) = bar else { continue };
            let offset = register::BAR + 4 * index;
            let (flags, width) = match bar.kind {
                Kind::Io => (1, 4),
                Kind::Memory32 { prefetchable } => (u64::from(prefetchable) << 3, 4),
                Kind::Memory64 { prefetchable } => (1 << 2 | u64::from(prefetchable) << 3, 8),
            };
            writable |= if bar.is_io() {
                command::IO
            } else {
                command::MEMORY
            };
            let [value, mask] = [flags, !(bar.size - 1)].map(u64::to_le_bytes);
            config.define(
                offset,
                value.get(..width).unwrap_or(&value),
                mask.get(..width).unwrap_or(&mask),
            );
        }
        if self.intx {
            writable |= command::INTX_DISABLE;
            config.define(register::INTERRUPT_PIN, &[1], &[0]);
        }
        config.define(register::INTERRUPT_LINE, &[0], &[0xff]);
        config.define(register::CACHE_LINE_SIZE, &[0], &[0xff]);
        config.define(register::COMMAND, &[0; 2], &writable.to_le_bytes());
    }

    fn define_capabilities(
        &self,
        config: &mut ConfigSpace,
    ) -> Result<(Places, Option<WindowPlace>), DescriptionError> {
        let (mut places, mut window) = (Places::default(), None);
        let mut offset = 0x40_usize;
        let sizes = self.capabilities.iter().map(|each| 2 + each.body.len());
        let end = sizes.fold(offset, |end, size| end.next_multiple_of(16) + size);
        let alignment = if end > CONVENTIONAL_SIZE { 4 } else { 16 };
        for (index, capability) in self.capabilities.iter().enumerate() {
            let end = offset + 2 + capability.body.len();
            let is_last = index + 1 == self.capabilities.len();
            let next = end.next_multiple_of(alignment);
            if end > CONVENTIONAL_SIZE || (!is_last && next >= CONVENTIONAL_SIZE) {
                return Err(DescriptionError::Capabilities);
            }
            let pointer = if is_last { 0 } else { next };
            let [id, pointer, place] = [capability.id.into(), pointer, offset]
                .map(|value: usize| u8::try_from(value).unwrap_or(0));
            if index == 0 {
                config.define_capabilities(place);
            }
            config.define(offset, &[id, pointer], &[0; 2]);
            config.define(offset + 2, &capability.body, &capability.writable);
            match id {
                MSI => places.msi = Some(offset),
                MSIX => places.msix = Some(offset),
                EXPRESS => places.express = Some(offset),
                _ => {}
            }
            if let Some((_, found)) = self.window.filter(|(number, _)| *number == index) {
                window = Some(WindowPlace::new(found, offset + 2..end)?);
            }
            offset = next;
        }
        Ok((places, window))
    }

    fn define_extended(&self, config: &mut ConfigSpace) -> Result<(), DescriptionError> {
        let mut offset = 0x100;
        for (index, capability) in self.extended.iter().enumerate() {
            let end = offset + 4 + capability.body.len();
            let is_last = index + 1 == self.extended.len();
            let next = end.next_multiple_of(16);
            if end > config.size() || (!is_last && next >= config.size()) {
                return Err(DescriptionError::Capabilities);
            }
            let pointer = u32::try_from(if is_last { 0 } else { next }).unwrap_or(0);
            let version = u32::from(capability.version & 0xf);
            let header = u32::from(capability.id) | version << 16 | pointer << 20;
            config.define(offset, &header.to_le_bytes(), &[0; 4]);
            config.define(offset + 4, &capability.body, &capability.writable);
            offset = next;
        }
        Ok(())
    }
}
