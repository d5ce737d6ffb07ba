//! What a device answers when it is attached: all that it is ever asked of what it is.

use std::sync::Arc;

use pci::{BarIndex, Capability, ConfigSpace, InterruptPin, header};
use serde::{Deserialize, Serialize};
use vfio_user_client::Descriptors;

use super::probe::ProbeError;
use crate::backend::{Backend, Doorbell, Irq, IrqInfo, MappableArea, Region, RegionInfo};
use crate::handover::RemoteState;

/// The answers of a device.
#[derive(Debug, Clone)]
pub(super) struct Survey {
    /// Configuration space.
    pub(super) config: Vec<u8>,
    /// The BARs.
    pub(super) bars: Vec<Bar>,
    /// What the expansion ROM holds, if the guest is to have it.
    pub(super) rom: Vec<u8>,
    /// INTx, MSI and MSI-X; those that it does not have are all zeroes.
    pub(super) irqs: [IrqInfo; 3],
}

#[derive(Debug, Clone)]
pub(super) struct Bar {
    pub(super) region: RegionInfo,
    pub(super) doorbells: Vec<Doorbell>,
}

impl Survey {
    /// Asks the device.
    pub(super) fn new(backend: &dyn Backend, with_rom: bool) -> Result<Self, ProbeError> {
        let config = read_config(backend)?;
        let mut bars = Vec::with_capacity(BarIndex::ALL.len());
        for bar in BarIndex::ALL {
            let region = backend.region(Region::Bar(bar))?;
            let doorbells = match region.size {
                0 => Vec::new(),
                _ => backend.doorbells(Region::Bar(bar))?,
            };
            bars.push(Bar { region, doorbells });
        }
        let rom = if with_rom {
            read_rom(backend)?
        } else {
            Vec::new()
        };
        let mut space = ConfigSpace::new();
        space.set(0, &config);
        let has = |id| {
            let list = pci::capabilities(|offset| space.dword(offset));
            list.flatten().any(|capability| capability.id == id)
        };
        let pin = InterruptPin::from_register(space.byte(header::INTERRUPT_PIN));
        let ask = |irq, has: bool| {
            if has {
                backend.irq(irq)
            } else {
                Ok(IrqInfo::default())
            }
        };
        Ok(Self {
            bars,
            rom,
            irqs: [
                ask(Irq::Intx, pin.is_some())?,
                ask(Irq::Msi, has(Capability::MSI))?,
                ask(Irq::Msix, has(Capability::MSIX))?,
            ],
            config,
        })
    }
}

/// The device's configuration space.
fn read_config(backend: &dyn Backend) -> Result<Vec<u8>, ProbeError> {
    let size = backend.region(Region::Config)?.size;
    let length = u16::try_from(size).map_or(ConfigSpace::SIZE, |size| size.min(ConfigSpace::SIZE));
    let mut bytes = vec![0; length.into()];
    if length >= header::END {
        backend.read(Region::Config, 0, &mut bytes)?;
    }
    Ok(bytes)
}

/// The device's expansion ROM.
fn read_rom(backend: &dyn Backend) -> Result<Vec<u8>, ProbeError> {
    /// The largest that there is (the PCI firmware specification's limit).
    const MOST: u64 = 16 << 20;
    let region = Region::Bar(BarIndex::ROM);
    let size = backend.region(region)?.size;
    if !(1..=MOST).contains(&size) {
        return Err(ProbeError::NoRom { size });
    }
    let mut rom = vec![0; usize::try_from(size).unwrap_or(0)];
    backend.read(region, 0, &mut rom)?;
    Ok(rom)
}

/// A device as another process attaches it that does not ask it anything: the way to it, and its answers. Descriptors are
/// numbers in the list that goes with it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Attachment {
    /// The device's name.
    pub id: String,
    /// The way to it.
    pub remote: RemoteState,
    survey: SurveyState,
}

/// The answers of a device without an expansion ROM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SurveyState {
    config: Vec<u8>,
    bars: Vec<BarState>,
    /// How many there are, and whether they mask themselves.
    irqs: [(u32, bool); 3],
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct BarState {
    size: u64,
    writable: bool,
    areas: Vec<AreaState>,
    doorbells: Vec<DoorbellState>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct AreaState {
    offset: u64,
    size: u64,
    file: u32,
    file_offset: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct DoorbellState {
    offset: u64,
    width: u64,
    value: Option<u64>,
    event: u32,
}

impl Attachment {
    pub(super) fn new(
        id: &str,
        remote: RemoteState,
        survey: &Survey,
        descriptors: &mut Descriptors,
    ) -> Self {
        let mut bar = |Bar { region, doorbells }: &Bar| BarState {
            size: region.size,
            writable: region.writable,
            areas: region
                .areas
                .iter()
                .map(|area| AreaState {
                    offset: area.offset,
                    size: area.size,
                    file: descriptors.add(&area.file),
                    file_offset: area.file_offset,
                })
                .collect(),
            doorbells: doorbells
                .iter()
                .map(|doorbell| DoorbellState {
                    offset: doorbell.offset,
                    width: doorbell.width,
                    value: doorbell.value,
                    event: descriptors.add(&doorbell.event),
                })
                .collect(),
        };
        Self {
            id: id.to_owned(),
            remote,
            survey: SurveyState {
                config: survey.config.clone(),
                bars: survey.bars.iter().map(&mut bar).collect(),
                irqs: survey.irqs.map(|irq| (irq.count, irq.automasked)),
            },
        }
    }

    /// The answers, if a backend could have given them.
    pub(super) fn survey(&self, descriptors: &Descriptors) -> Result<Survey, ProbeError> {
        let SurveyState { config, bars, irqs } = &self.survey;
        if bars.len() != BarIndex::ALL.len() || config.len() > ConfigSpace::SIZE.into() {
            return Err(ProbeError::Handed("it has no BARs, or too much of them"));
        }
        let bars = bars.iter().map(|bar| bar.restored(descriptors));
        Ok(Survey {
            config: config.clone(),
            bars: bars.collect::<Result<_, _>>()?,
            rom: Vec::new(),
            irqs: irqs.map(|(count, automasked)| IrqInfo { count, automasked }),
        })
    }
}

impl BarState {
    fn restored(&self, descriptors: &Descriptors) -> Result<Bar, ProbeError> {
        let missing = || ProbeError::Handed("a descriptor is missing");
        let mut areas = Vec::with_capacity(self.areas.len());
        let mut free = 0;
        for area in &self.areas {
            let end = area.end().filter(|&end| end <= self.size);
            if area.offset < free || end.is_none() {
                return Err(ProbeError::Handed("a mappable area is not where it can be"));
            }
            free = end.unwrap_or_default();
            areas.push(MappableArea {
                offset: area.offset,
                size: area.size,
                file: descriptors.find(area.file).ok_or_else(missing)?.clone(),
                file_offset: area.file_offset,
            });
        }
        let doorbell = |doorbell: &DoorbellState| {
            Ok(Doorbell {
                offset: doorbell.offset,
                width: doorbell.width,
                value: doorbell.value,
                event: Arc::clone(descriptors.find(doorbell.event).ok_or_else(missing)?),
            })
        };
        let doorbells = self.doorbells.iter().map(doorbell);
        Ok(Bar {
            region: RegionInfo {
                size: self.size,
                writable: self.writable,
                areas,
            },
            doorbells: doorbells.collect::<Result<_, ProbeError>>()?,
        })
    }
}

impl AreaState {
    /// Where it ends, if it consists of pages.
    fn end(&self) -> Option<u64> {
        const PAGE: u64 = 4096;
        self.file_offset.checked_add(self.size)?;
        let is_paged = (self.offset | self.size | self.file_offset).is_multiple_of(PAGE);
        self.offset
            .checked_add(self.size)
            .filter(|_| is_paged && self.size > 0)
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use serde_json::{Value, json};

    use super::*;

    /// A device with a page that can be mapped, and a doorbell, as it is written down.
    fn attachment() -> Value {
        let limits = json!({
            "version": {"major": 0, "minor": 2}, "max_msg_fds": 8, "max_data_xfer_size": 4096,
            "max_dma_maps": 8, "page_sizes": 4096, "write_multiple": false, "twin_socket": null,
        });
        let none = json!({"size": 0, "writable": false, "areas": [], "doorbells": []});
        let bar = json!({
            "size": 0x4000, "writable": true,
            "areas": [
                {"offset": 0x1000, "size": 0x1000, "file": 0, "file_offset": 0x5000},
                {"offset": 0x2000, "size": 0x2000, "file": 0, "file_offset": 0x8000},
            ],
            "doorbells": [{"offset": 0x10, "width": 4, "value": 7, "event": 1}],
        });
        json!({
            "id": "it",
            "remote": {
                "connected": {"limits": limits, "socket": 0, "twin": null},
                "resettable": true, "migration": 0,
            },
            "survey": {
                "config": vec![0; 256],
                "bars": [bar, none, none, none, none, none],
                "irqs": [[1, true], [0, false], [5, false]],
            },
        })
    }

    fn survey(written: Value) -> Option<Survey> {
        let null = || File::open("/dev/null").unwrap().into();
        let descriptors = Descriptors::from(vec![null(), null()]);
        let attachment: Attachment = serde_json::from_value(written).ok()?;
        attachment.survey(&descriptors).ok()
    }

    #[test]
    fn what_is_handed_over_is_what_the_device_said() {
        let survey = survey(attachment()).unwrap();
        assert_eq!((survey.config.len(), survey.bars.len()), (256, 6));
        let [bar, ..] = &survey.bars[..] else {
            panic!("no BARs");
        };
        let areas = bar.region.areas.iter();
        let areas: Vec<_> = areas
            .map(|area| (area.offset, area.size, area.file_offset))
            .collect();
        assert_eq!(areas, [(0x1000, 0x1000, 0x5000), (0x2000, 0x2000, 0x8000)]);
        assert_eq!(bar.doorbells[0].value, Some(7));
        assert!(survey.irqs[0].automasked);
        assert_eq!(survey.irqs[2].count, 5);
    }

    #[test]
    fn what_no_device_says_is_refused() {
        let changes: [fn(&mut Value); 12] = [
            |it| it["config"] = json!(vec![0; 4097]),
            |it| it["config"] = json!([256]),
            |it| it["bars"] = json!([]),
            |it| it["irqs"] = json!([[1, true]]),
            |it| it["bars"][0]["areas"][0]["file"] = json!(2),
            |it| it["bars"][0]["areas"][0]["size"] = json!(0),
            |it| it["bars"][0]["areas"][0]["size"] = json!(0x1800),
            |it| it["bars"][0]["areas"][0]["size"] = json!(0x2000),
            |it| it["bars"][0]["areas"][1]["size"] = json!(0x3000),
            |it| it["bars"][0]["areas"][1]["offset"] = json!(0xffff_ffff_ffff_f000_u64),
            |it| it["bars"][0]["areas"][1]["file_offset"] = json!(0xffff_ffff_ffff_f000_u64),
            |it| it["bars"][0]["doorbells"][0]["event"] = json!(u32::MAX),
        ];
        for (number, change) in changes.iter().enumerate() {
            let mut written = attachment();
            change(&mut written["survey"]);
            assert!(survey(written).is_none(), "{number}");
        }
    }
}
