//! What a device is: all that is asked of it once, when it is attached.

use std::ops::Range;
use std::sync::Arc;

use pci::{BarIndex, BarKind, BarSpec, Bars, ConfigSpace, MsixLayout};
use vfio_user_client::Descriptors;

use super::config::{self, Config};
use super::survey::{Attachment, Bar, Survey};
use crate::backend::{Backend, BackendError, Doorbell, MappableArea};

/// Why a device cannot be an endpoint.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// The device did not answer, or refused.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// It has no configuration space to speak of.
    #[error("its configuration space is {size} bytes; a PCI function has at least 64")]
    NoConfigSpace {
        /// The length of its region in bytes.
        size: u64,
    },
    /// It has no expansion ROM.
    #[error("it has no expansion ROM to show ({size} bytes): leave rom=on out")]
    NoRom {
        /// The length of its region in bytes.
        size: u64,
    },
    /// It is a bridge.
    #[error("its header type is {0:#x}: bridges cannot be passed through")]
    Bridge(u8),
    /// Its BARs make no sense.
    #[error(transparent)]
    Bars(#[from] pci::BarError),
    /// Its capability list makes no sense.
    #[error(transparent)]
    Capabilities(#[from] pci::CapabilityError),
    /// Its MSI-X capability makes no sense.
    #[error(transparent)]
    Msix(#[from] pci::MsixError),
    /// Another process has attached it, and tells what cannot be so.
    #[error("what was handed over of it makes no sense: {0}")]
    Handed(&'static str),
    /// A doorbell of it makes no sense.
    #[error(
        "it has a doorbell at {offset:#x} of {bar} that is not in it, is in its MSI-X table, or is {width} bytes wide"
    )]
    Doorbell {
        /// The BAR.
        bar: BarIndex,
        /// The doorbell's offset in bytes.
        offset: u64,
        /// Its width in bytes.
        width: u64,
    },
}

/// A device that has been asked all that an endpoint must know of it.
#[derive(Debug)]
pub struct Probe {
    pub(super) backend: Arc<dyn Backend>,
    pub(super) config: Config,
    pub(super) msix: Option<MsixLayout>,
    pub(super) survey: Survey,
    layouts: [Option<BarLayout>; 7],
}

/// A BAR and what is behind it, wherever the guest puts it.
#[derive(Debug, Clone)]
pub struct BarLayout {
    /// What space it is in, and its size.
    pub spec: BarSpec,
    /// Whether writes do anything.
    pub writable: bool,
    /// The parts that the guest may reach without an exit. The MSI-X table is in none of them.
    pub areas: Vec<MappableArea>,
    /// The places that only ring a bell.
    pub doorbells: Vec<Doorbell>,
}

impl Probe {
    /// Asks the device. The guest sees its expansion ROM only if it is to have one.
    pub fn new(backend: Arc<dyn Backend>, with_rom: bool) -> Result<Self, ProbeError> {
        let survey = Survey::new(backend.as_ref(), with_rom)?;
        Self::of(backend, survey)
    }

    /// A device that another process has attached, and that is not asked anything.
    pub fn inherit(
        backend: Arc<dyn Backend>,
        attachment: &Attachment,
        descriptors: &Descriptors,
    ) -> Result<Self, ProbeError> {
        Self::of(backend, attachment.survey(descriptors)?)
    }

    fn of(backend: Arc<dyn Backend>, survey: Survey) -> Result<Self, ProbeError> {
        let (space, size) = config_space(&survey.config)?;
        let header_type = space.byte(pci::header::HEADER_TYPE) & !pci::header::MULTI_FUNCTION;
        if header_type != 0 {
            return Err(ProbeError::Bridge(header_type));
        }
        let mut sizes = survey.bars.iter().map(|bar| bar.region.size);
        let mut bars = config::bars(&space, [(); 6].map(|()| sizes.next().unwrap_or(0)))?;
        let mut layouts = [const { None }; 7];
        if !survey.rom.is_empty() {
            bars = bars.with_rom(survey.rom.len() as u64)?;
        }
        let msix = find_msix(&space)?;
        if let Some(layout) = &msix {
            layout.check(|bar| bars.spec(bar).map_or(0, |spec| spec.size))?;
        }
        if let (Some(layout), Some(spec)) = (layouts.last_mut(), bars.spec(BarIndex::ROM)) {
            *layout = Some(BarLayout {
                spec: *spec,
                writable: false,
                areas: Vec::new(),
                doorbells: Vec::new(),
            });
        }
        let answers = BarIndex::ALL.into_iter().zip(&survey.bars);
        for ((bar, Bar { region, doorbells }), layout) in answers.zip(&mut layouts) {
            let Some(spec) = bars.spec(bar) else { continue };
            let mut areas = if spec.kind == BarKind::Io {
                Vec::new()
            } else {
                region.areas.clone()
            };
            let messages: Vec<_> = msix
                .iter()
                .flat_map(|msix| message_ranges(msix, bar))
                .collect();
            for hole in &messages {
                areas = areas.iter().flat_map(|area| without(area, hole)).collect();
            }
            for &Doorbell { offset, width, .. } in doorbells {
                if !is_doorbell(offset, width, spec.size, &messages) {
                    return Err(ProbeError::Doorbell { bar, offset, width });
                }
            }
            *layout = Some(BarLayout {
                spec: *spec,
                writable: region.writable,
                areas,
                doorbells: doorbells.clone(),
            });
        }
        Ok(Self {
            backend,
            config: Config::new(space, size, bars)?,
            msix,
            survey,
            layouts,
        })
    }

    /// Its BARs.
    pub fn bars(&self) -> &Bars {
        &self.config.bars
    }

    /// Sets the addresses of its BARs, as firmware would.
    pub fn set_bars(&mut self, bars: Bars) {
        self.config.set_bars(bars);
    }

    /// To which BARs writes may be posted: those in memory space of a device that is reached through the backend alone.
    /// A mapped area or a doorbell of any BAR would let the guest overtake them.
    pub(super) fn posted_bars(&self) -> [bool; 7] {
        let layouts = self.layouts.each_ref().map(Option::as_ref);
        let can_be_overtaken = layouts
            .iter()
            .flatten()
            .any(|layout| !layout.areas.is_empty() || !layout.doorbells.is_empty());
        layouts.map(|layout| {
            !can_be_overtaken && layout.is_some_and(|layout| layout.spec.kind != BarKind::Io)
        })
    }

    /// What is behind its BARs, and its ROM.
    pub fn layouts(&self) -> [Option<BarLayout>; 7] {
        self.layouts.clone()
    }
}

/// The device's configuration space, and how many bytes of it there are.
fn config_space(bytes: &[u8]) -> Result<(ConfigSpace, u16), ProbeError> {
    let size = bytes.len() as u64;
    let length = u16::try_from(size).unwrap_or(ConfigSpace::SIZE);
    if length < pci::header::END {
        return Err(ProbeError::NoConfigSpace { size });
    }
    let mut space = ConfigSpace::new();
    space.set(0, bytes);
    Ok((space, length))
}

fn find_msix(space: &ConfigSpace) -> Result<Option<MsixLayout>, ProbeError> {
    for capability in pci::capabilities(|offset| space.dword(offset)) {
        let capability = capability?;
        if capability.id == pci::Capability::MSIX {
            return Ok(Some(MsixLayout::parse(space, capability.offset)?));
        }
    }
    Ok(None)
}

/// What of a BAR the MSI-X table and its pending bits take: the VMM's own, so not to be mapped.
fn message_ranges(msix: &MsixLayout, bar: BarIndex) -> impl Iterator<Item = Range<u64>> {
    let table = (msix.table_bar == bar).then(|| msix.table_range());
    let pba = (msix.pba_bar == bar).then(|| msix.pba_range());
    table.into_iter().chain(pba)
}

/// Whether a write of this width to a BAR of `size` bytes may ring a bell: not where the VMM looks at writes itself.
fn is_doorbell(offset: u64, width: u64, size: u64, messages: &[Range<u64>]) -> bool {
    let Some(end) = offset.checked_add(width.max(1)) else {
        return false;
    };
    matches!(width, 0 | 1 | 2 | 4 | 8)
        && end <= size
        && messages
            .iter()
            .all(|range| end <= range.start || range.end <= offset)
}

/// What is left of an area without the pages that a range of the BAR touches.
fn without(area: &MappableArea, hole: &Range<u64>) -> impl Iterator<Item = MappableArea> {
    const PAGE: u64 = 4096;
    let end = area.offset + area.size;
    let hole_start = hole.start / PAGE * PAGE;
    let hole_end = hole.end.next_multiple_of(PAGE);
    let below = area.offset..hole_start.clamp(area.offset, end);
    let above = hole_end.clamp(area.offset, end)..end;
    let untouched = hole_end <= area.offset || hole_start >= end;
    let pieces = if untouched {
        [area.offset..end, end..end]
    } else {
        [below, above]
    };
    pieces
        .into_iter()
        .filter(|piece| !piece.is_empty())
        .map(|piece| MappableArea {
            offset: piece.start,
            size: piece.end - piece.start,
            file: area.file.clone(),
            file_offset: area.file_offset + (piece.start - area.offset),
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    #[test]
    fn doorbells_lie_in_their_bar_and_beside_the_message_table() {
        let table = [0x100..0x200, 0x800..0x808];
        for (offset, width, is_one) in [
            (0, 4, true),
            (0xffc, 4, true),
            (0xfff, 0, true),
            (0xffd, 4, false),
            (0x1000, 0, false),
            (u64::MAX, 8, false),
            (0, 3, false),
            (0xfc, 4, true),
            (0xfd, 4, false),
            (0x1ff, 0, false),
            (0x200, 8, true),
        ] {
            assert_eq!(
                is_doorbell(offset, width, 0x1000, &table),
                is_one,
                "{offset:#x}, {width}"
            );
        }
    }

    #[test]
    fn message_table_is_cut_out_in_whole_pages() {
        let area = MappableArea {
            offset: 0x1000,
            size: 0x4000,
            file: Arc::new(File::open("/dev/null").unwrap().into()),
            file_offset: 0x10000,
        };
        let left = |hole| {
            without(&area, &hole)
                .map(|area| (area.offset, area.size, area.file_offset))
                .collect::<Vec<_>>()
        };
        assert_eq!(
            left(0x2010..0x2020),
            [(0x1000, 0x1000, 0x10000), (0x3000, 0x2000, 0x12000)]
        );
        assert_eq!(left(0x1000..0x1008), [(0x2000, 0x3000, 0x11000)]);
        assert_eq!(left(0x4ff8..0x5000), [(0x1000, 0x3000, 0x10000)]);
        assert_eq!(left(0..0x1000), [(0x1000, 0x4000, 0x10000)]);
        assert_eq!(left(0x5000..0x6000), [(0x1000, 0x4000, 0x10000)]);
        assert_eq!(left(0..0x8000), []);
    }
}
