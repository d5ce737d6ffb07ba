//! The DSDT: the devices that cannot be discovered, and how to switch the machine off.

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Arg, Device, EISAName, Equal, IO, If, Interrupt,
    Memory32Fixed, Method, Name, Notify, ONE, Package, PackageBuilder, Path, ResourceTemplate,
    Return, ZERO,
};
use acpi_tables::sdt::Sdt;
use acpi_tables::{Aml, AmlSink};
use pci::{InterruptPin, Window, Windows};

use super::{Machine, OEM_ID, OEM_REVISION, OEM_TABLE_ID};
use crate::layout;

/// How many devices a bus has.
const DEVICES: u32 = 32;

/// Notification that a control-method button was pressed (ACPI 6.5, 4.8.2.2.1.2).
const BUTTON_PRESSED: u8 = 0x80;

pub(super) fn dsdt(machine: &Machine) -> Sdt {
    let mut body = Vec::new();
    pci_host_bridge(machine, &mut body);
    ecam_reservation(&mut body);
    if machine.serial {
        serial_port(&mut body);
    }
    power_button(&mut body);
    // \_S5: soft off. The value goes into the sleep control register.
    let soft_off = devices::power::SOFT_OFF;
    Name::new("_S5_".into(), &Package::new(vec![&soft_off])).to_aml_bytes(&mut body);

    const REVISION: u8 = 6;
    const HEADER: u32 = 36;
    let mut dsdt = Sdt::new(
        *b"DSDT",
        HEADER,
        REVISION,
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
    );
    dsdt.append_slice(&body);
    dsdt
}

fn pci_host_bridge(machine: &Machine, sink: &mut dyn AmlSink) {
    let Windows {
        io,
        memory32,
        memory64,
    } = machine.windows;
    let last = |window: &Window| window.start + (window.length - 1);
    let word = |value: u64| u16::try_from(value).unwrap_or(u16::MAX);
    let dword = |value: u64| u32::try_from(value).unwrap_or(u32::MAX);
    let config_ports = word(*layout::PCI_CONFIG_PORTS.start());
    let cacheable = || AddressSpaceCacheable::NotCacheable;
    let buses = AddressSpace::<u16>::new_bus_number(0, layout::LAST_BUS.into());
    let config_ports = IO::new(config_ports, config_ports, 1, 8);
    let io = AddressSpace::<u16>::new_io(word(io.start), word(last(&io)), None);
    let (start, end) = (dword(memory32.start), dword(last(&memory32)));
    let memory32 = AddressSpace::<u32>::new_memory(cacheable(), true, start, end, None);
    let (start, end) = (memory64.start, last(&memory64));
    let memory64 = AddressSpace::<u64>::new_memory(cacheable(), true, start, end, None);
    let resources = ResourceTemplate::new(vec![&buses, &config_ports, &io, &memory32, &memory64]);
    let routes: Vec<_> = (0..DEVICES).flat_map(interrupt_routes).collect();
    let mut routing = PackageBuilder::new();
    for [address, pin, gsi] in &routes {
        routing.add_element(&Package::new(vec![address, pin, &ZERO, gsi]));
    }
    Device::new(
        "\\_SB_.PCI0".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0A08")),
            &Name::new("_CID".into(), &EISAName::new("PNP0A03")),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("_SEG".into(), &ZERO),
            &Name::new("_BBN".into(), &ZERO),
            // The operating system may have all that it asks for: hotplug, PME, AER and the rest are its own.
            &Method::new("_OSC".into(), 4, false, vec![&Return::new(&Arg(3))]),
            &Name::new("_CRS".into(), &resources),
            &Name::new("_PRT".into(), &routing),
        ],
    )
    .to_aml_bytes(sink);
}

/// The four pins of a device on the root bus: its address with all functions, the pin, and the GSI.
fn interrupt_routes(device: u32) -> impl Iterator<Item = [u32; 3]> {
    const ALL_FUNCTIONS: u32 = 0xffff;
    InterruptPin::ALL
        .into_iter()
        .zip(0..)
        .map(move |(pin, number)| {
            let line = pin.line(u8::try_from(device).unwrap_or_default());
            [
                device << 16 | ALL_FUNCTIONS,
                number,
                layout::PCI_INTX_GSI + u32::from(line),
            ]
        })
}

/// Linux uses the ECAM only if a motherboard resource reserves it, and without it sees no extended configuration
/// space (PCI Firmware 3.3, 4.1.2).
fn ecam_reservation(sink: &mut dyn AmlSink) {
    let (start, end) = (layout::ECAM.start(), layout::ECAM.end());
    let [base, size] = [*start, end - start + 1].map(|value| u32::try_from(value).unwrap_or(0));
    Device::new(
        "\\_SB_.ECAM".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0C02")),
            &Name::new("_UID".into(), &ZERO),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![&Memory32Fixed::new(true, base, size)]),
            ),
        ],
    )
    .to_aml_bytes(sink);
}

fn serial_port(sink: &mut dyn AmlSink) {
    let port = u16::try_from(*layout::COM1.start()).unwrap_or_default();
    Device::new(
        "\\_SB_.COM1".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &ONE),
            &Name::new("_DDN".into(), &"COM1"),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &IO::new(port, port, 1, 8),
                    &Interrupt::new(true, true, false, false, layout::COM1_GSI),
                ]),
            ),
        ],
    )
    .to_aml_bytes(sink);
}

/// The power button, and the generic event device whose interrupt tells that it was pressed (5.6.9).
fn power_button(sink: &mut dyn AmlSink) {
    Device::new(
        "\\_SB_.PWRB".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0C0C")),
            &Name::new("_UID".into(), &ZERO),
        ],
    )
    .to_aml_bytes(sink);
    let gsi = layout::POWER_BUTTON_GSI;
    let button = Path::new("\\_SB_.PWRB");
    Device::new(
        "\\_SB_.GED0".into(),
        vec![
            &Name::new("_HID".into(), &"ACPI0013"),
            &Name::new("_UID".into(), &ZERO),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![&Interrupt::new(true, true, false, false, gsi)]),
            ),
            &Method::new(
                "_EVT".into(),
                1,
                true,
                vec![&If::new(
                    &Equal::new(&Arg(0), &gsi),
                    vec![&Notify::new(&button, &BUTTON_PRESSED)],
                )],
            ),
        ],
    )
    .to_aml_bytes(sink);
}
