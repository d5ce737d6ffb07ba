//! The ACPI tables (ACPI specification 6.5): a hardware-reduced machine with one PCI host bridge.

mod dsdt;
mod x2apic;

use acpi_tables::Aml;
use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{IoApic, LocalInterruptController, MADT};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::xsdt::XSDT;
use devices::power;
use pci::Windows;
use vm_memory::{Bytes, GuestAddress};

use self::x2apic::LocalX2Apic;
use crate::layout;
use crate::memory::Ram;

const OEM_ID: [u8; 6] = *b"OUTRIG";
const OEM_TABLE_ID: [u8; 8] = *b"OUTRIGGR";
const OEM_REVISION: u32 = 1;

/// IA-PC boot architecture flags (5.2.9.3): there is no VGA and no CMOS clock to probe for.
const BOOT_VGA_ABSENT: u16 = 1 << 2;
const BOOT_RTC_ABSENT: u16 = 1 << 5;

/// The tables do not fit where they belong.
#[derive(Debug, thiserror::Error)]
#[error("the ACPI tables do not fit into guest RAM below 1 MiB (too many vCPUs?)")]
pub struct AcpiError;

/// What the tables tell of the machine.
#[derive(Debug, Clone)]
pub(crate) struct Machine {
    pub(crate) vcpus: u32,
    pub(crate) windows: Windows,
    /// Whether there is a serial port.
    pub(crate) serial: bool,
}

/// Writes the tables into RAM, and says where the root pointer is.
pub(crate) fn write_tables(ram: &Ram, machine: &Machine) -> Result<u64, AcpiError> {
    let mut tables = Tables {
        ram,
        next: *layout::ACPI_TABLES.start(),
    };
    // The root pointer comes first but needs the addresses of the others.
    let rsdp = tables.reserve(Rsdp::len());
    let dsdt = tables.write(&dsdt::dsdt(machine))?;
    let fadt = tables.write(&fadt(dsdt))?;
    let madt = tables.write(&madt(machine.vcpus))?;
    let mcfg = tables.write(&mcfg())?;
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    for table in [fadt, madt, mcfg] {
        xsdt.add_entry(table);
    }
    let xsdt = tables.write(&xsdt)?;
    tables.write_at(rsdp, &Rsdp::new(OEM_ID, xsdt))?;
    Ok(rsdp)
}

/// Lays one table after the other.
struct Tables<'a> {
    ram: &'a Ram,
    next: u64,
}

impl Tables<'_> {
    fn write(&mut self, table: &dyn Aml) -> Result<u64, AcpiError> {
        let mut bytes = Vec::new();
        table.to_aml_bytes(&mut bytes);
        let address = self.reserve(bytes.len());
        self.write_bytes(address, &bytes)?;
        Ok(address)
    }

    fn write_at(&self, address: u64, table: &dyn Aml) -> Result<(), AcpiError> {
        let mut bytes = Vec::new();
        table.to_aml_bytes(&mut bytes);
        self.write_bytes(address, &bytes)
    }

    fn write_bytes(&self, address: u64, bytes: &[u8]) -> Result<(), AcpiError> {
        let fits = address + bytes.len() as u64 - 1 <= *layout::ACPI_TABLES.end();
        if !fits {
            return Err(AcpiError);
        }
        self.ram
            .write_slice(bytes, GuestAddress(address))
            .map_err(|_| AcpiError)
    }

    fn reserve(&mut self, length: usize) -> u64 {
        const ALIGNMENT: u64 = 64;
        let address = self.next;
        self.next = (address + length as u64).next_multiple_of(ALIGNMENT);
        address
    }
}

/// The fixed description (5.2.9): no fixed hardware but the sleep and reset registers.
fn fadt(dsdt: u64) -> impl Aml {
    let port = |index| {
        let address = layout::POWER.start() + index;
        GAS::new(
            AddressSpace::SystemIo,
            8,
            0,
            AccessSize::ByteAccess,
            address,
        )
    };
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .flag(Flags::Wbinvd)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::Headless);
    fadt.iapc_boot_arch = (BOOT_VGA_ABSENT | BOOT_RTC_ABSENT).into();
    fadt.sleep_control_reg = port(power::SLEEP_CONTROL);
    fadt.sleep_status_reg = port(power::SLEEP_STATUS);
    fadt.reset_reg = port(power::RESET);
    fadt.reset_value = power::RESET_VALUE;
    fadt.finalize()
}

/// The interrupt controllers (5.2.12).
fn madt(vcpus: u32) -> impl Aml {
    let address = LocalInterruptController::Address(layout::LOCAL_APIC);
    let mut madt = MADT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION, address);
    for id in 0..vcpus {
        madt.add_structure(LocalX2Apic::new(id));
    }
    madt.add_structure(IoApic::new(0, layout::IO_APIC, 0));
    madt
}

/// Where configuration space is memory mapped (PCI Firmware 3.3, 4.1.2).
fn mcfg() -> impl Aml {
    let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    mcfg.add_ecam(*layout::ECAM.start(), 0, 0, layout::LAST_BUS);
    mcfg
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(vcpus: u32) -> Result<(Ram, u64), AcpiError> {
        let ram = Ram::from_ranges(&[(GuestAddress(0), 2 << 20)]).unwrap();
        let windows = layout::pci_windows(1 << 30);
        let rsdp = write_tables(
            &ram,
            &Machine {
                vcpus,
                windows,
                serial: true,
            },
        )?;
        Ok((ram, rsdp))
    }

    fn bytes(ram: &Ram, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        ram.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    /// A table with the checksum checked.
    fn table(ram: &Ram, address: u64) -> Vec<u8> {
        let length = ram.read_obj::<u32>(GuestAddress(address + 4)).unwrap();
        let table = bytes(ram, address, length as usize);
        assert_eq!(sum(&table), 0, "{:?}", String::from_utf8_lossy(&table[..4]));
        table
    }

    fn quad(bytes: &[u8], offset: usize) -> u64 {
        u64::from_le_bytes(bytes[offset..offset + 8].try_into().unwrap())
    }

    #[test]
    fn every_table_is_found_from_the_root() {
        let (ram, rsdp) = written(64).unwrap();
        let rsdp = bytes(&ram, rsdp, 36);
        assert_eq!(
            (&rsdp[..8], sum(&rsdp), sum(&rsdp[..20])),
            (b"RSD PTR ".as_slice(), 0, 0)
        );
        let xsdt = table(&ram, quad(&rsdp, 24));
        let tables: Vec<_> = xsdt[36..]
            .chunks(8)
            .map(|entry| table(&ram, quad(entry, 0)))
            .collect();
        let signatures: Vec<_> = tables.iter().map(|table| &table[..4]).collect();
        assert_eq!(signatures, [b"FACP", b"APIC", b"MCFG"]);
        let dsdt = table(&ram, quad(&tables[0], 140));
        assert_eq!(&dsdt[..4], b"DSDT");
        // A 16-byte x2APIC entry for each vCPU, and the I/O APIC.
        assert_eq!(tables[1].len(), 44 + 64 * 16 + 12);
        assert_eq!(quad(&tables[2], 44), *layout::ECAM.start());
    }

    #[test]
    fn tables_that_do_not_fit_are_refused() {
        assert!(written(10_000).is_err());
    }
}
